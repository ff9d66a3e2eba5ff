"""An LLM that nobody closes: when it is dropped, its threads, files and memory go with it."""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from poise import LLM, SamplingParams
from poise.model.arena import Arena
from tests.conftest import MakeCheckpoint
from tests.quantised_checkpoints import write_mxfp4


def held() -> tuple[int, int, int]:
    """Threads, open files and arenas of this process. A read under way keeps what was dropped until it has ended."""
    end = time.monotonic() + 10
    gc.collect()
    while reader_threads() and time.monotonic() < end:
        time.sleep(0.01)
        gc.collect()
    arenas = sum(type(each) is Arena for each in gc.get_objects())
    return reader_threads(), len(os.listdir("/proc/self/fd")), arenas


def reader_threads() -> int:
    return sum(thread.name.startswith("poise-reader") for thread in threading.enumerate())


def generate_and_drop(path: Path, **options: Any) -> None:
    llm = LLM(path, memory="1GiB", **options)
    llm.generate({"prompt_token_ids": [5, 6, 7]}, SamplingParams(max_tokens=3))


@pytest.mark.parametrize("kind", ["plain", "converted", "packed", "dense and caches streamed"])
def test_a_dropped_llm_leaves_no_thread_no_file_and_no_memory(
    kind: str, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"expert_slots": 3}
    path = checkpoint("qwen3_moe")
    if kind == "converted":
        options["dtype"] = "bfloat16"
    elif kind == "packed":
        path = write_mxfp4(checkpoint("gpt_oss", "bfloat16"), tmp_path / "model")
    elif kind == "dense and caches streamed":
        path = checkpoint("qwen3_moe", num_hidden_layers=5)
        options |= {"dense_layers": 0, "kv_on_disk": True, "scratch_directory": tmp_path}
    generate_and_drop(path, **options)  # what a first run leaves in libraries for good
    before = held()
    for _ in range(3):
        generate_and_drop(path, **options)
    assert held() == before


def test_an_llm_dropped_in_the_middle_of_a_call_leaves_nothing(checkpoint: MakeCheckpoint) -> None:
    generate_and_drop(checkpoint("qwen3_moe"))
    before = held()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    llm = LLM(checkpoint("qwen3_moe"), memory="1GiB", expert_slots=2)
    with pytest.raises(KeyboardInterrupt):
        llm.generate({"prompt_token_ids": [5, 6, 7]}, on_progress=stop)
    del llm
    assert held() == before


def test_threads_end_when_the_last_reference_goes_without_a_collection(checkpoint: MakeCheckpoint) -> None:
    gc.collect()
    gc.disable()
    try:
        generate_and_drop(checkpoint("qwen3_moe"))
        end = time.monotonic() + 10
        while reader_threads() and time.monotonic() < end:
            time.sleep(0.01)
        assert reader_threads() == 0
    finally:
        gc.enable()
