"""Caches on disk: rows that leave, an abort, the scratch file's life, a full disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from poise import LLM, SamplingParams
from poise.errors import ReadError, UsageError
from poise.model.cache import drop_rows, make_cache, movable_layers
from poise.model.inspect import build_meta_model
from poise.model.read_plan import ALIGNMENT
from poise.offload.kv_places import FilePlace
from poise.offload.kv_stream import KvStream
from poise.offload.scratch import Scratch
from poise.plan.memory import CACHE_LINE
from poise.plan.schedule import schedule_pass
from tests.conftest import DrawPrompts, MakeCheckpoint, tiny_config

LAYERS, KEY_HEADS, KEY_SIZE, VALUE_HEADS, VALUE_SIZE = 3, 2, 8, 1, 12
FINAL_TOKENS = 300


class _Pair:
    """One batch's cache twice: in memory, as transformers has it, and on disk."""

    def __init__(self, stream: KvStream, rows: int, seed: int) -> None:
        model = build_meta_model(tiny_config("mixtral", num_hidden_layers=LAYERS), torch.float32)
        self.in_memory, self.on_disk = make_cache(model), make_cache(model)
        stream.adopt(model, self.on_disk, rows=rows, final_tokens=FINAL_TOKENS)
        self.rows = rows
        self._generator = torch.Generator().manual_seed(seed)

    def check(self, layer: int, new_tokens: int) -> None:
        keys = torch.randn(self.rows, KEY_HEADS, new_tokens, KEY_SIZE, generator=self._generator)
        values = torch.randn(self.rows, VALUE_HEADS, new_tokens, VALUE_SIZE, generator=self._generator)
        wanted = self.in_memory.update(keys, values, layer)
        found = self.on_disk.update(keys, values, layer)
        for want, each in zip(wanted, found, strict=True):
            assert torch.equal(want, each)
        assert self.on_disk.get_seq_length(layer) == self.in_memory.get_seq_length(layer)

    def keep(self, rows: list[int]) -> None:
        for cache in (self.in_memory, self.on_disk):
            drop_rows(cache, torch.tensor(rows), self.rows)
        self.rows = len(rows)


def run_pass(
    stream: KvStream, pairs: list[_Pair], new_tokens: int, stretches: Sequence[Sequence[int]] = ((0,), (1,), (2,))
) -> None:
    """A pass as its schedule has it. ``stretches``: the layers that a batch goes through before the next one does."""
    schedule = schedule_pass(num_layers=len(stretches) - 1, num_batches=len(pairs), kv_on_disk=True)
    with torch.inference_mode():
        stream.begin_pass([pair.on_disk for pair in pairs])
        for step in schedule.steps:
            if step.kind == "kv":
                stream.expect(step.layer, step.batch or 0)
            elif step.kind == "attention":
                stream.attend(step.layer)
                for layer in stretches[step.layer]:
                    pairs[step.batch or 0].check(layer, new_tokens)


@pytest.fixture
def stream(tmp_path: Path) -> Any:
    made = KvStream(FilePlace(tmp_path))
    yield made
    made.close()


def test_what_comes_back_is_what_transformers_keeps_in_memory(stream: KvStream) -> None:
    pairs = [_Pair(stream, rows, seed) for seed, rows in enumerate((5, 3, 4))]
    for new_tokens in (33, 7, 1, 1):
        run_pass(stream, pairs, new_tokens)
    pairs[0].keep([0, 2, 4])
    pairs[2].keep([3])
    run_pass(stream, pairs, 1)
    pairs[0].keep([1, 2])
    pairs[0].keep([1])
    run_pass(stream, pairs, 1)
    assert stream.counters.late == 0


def test_batches_come_and_go(stream: KvStream) -> None:
    pairs = [_Pair(stream, 2, 0), _Pair(stream, 3, 1)]
    run_pass(stream, pairs, 20)
    pairs.append(_Pair(stream, 7, 2))
    run_pass(stream, pairs, 5)
    stream.forget(pairs[0].on_disk)
    run_pass(stream, pairs[1:], 5)
    assert stream.counters.late == 0


@pytest.mark.parametrize("stretches", [((0, 1), (2,)), ((), (0,), (), (1, 2)), ((0,), (1,), (2,), ())])
def test_which_layers_lie_in_which_stretch_is_learnt_from_a_pass_that_has_nothing_to_read(
    stream: KvStream, stretches: Sequence[Sequence[int]]
) -> None:
    for count in (3, 1):
        pairs = [_Pair(stream, 2, seed) for seed in range(count)]
        for _ in range(4):
            run_pass(stream, pairs, 3, stretches)
    assert stream.counters.late == 0


def test_another_order_than_expected_is_read_late_and_right(stream: KvStream) -> None:
    pairs = [_Pair(stream, 2, seed) for seed in range(3)]
    run_pass(stream, pairs, 3)
    run_pass(stream, pairs, 3, ((0, 1), (2,)))
    late = stream.counters.late
    assert late > 0
    run_pass(stream, pairs, 3, ((0, 1), (2,)))
    assert stream.counters.late == late


def test_a_pass_appends_its_tokens_and_reads_the_past_once(stream: KvStream) -> None:
    pairs = [_Pair(stream, 4, seed) for seed in range(4)]
    token_bytes = 4 * (KEY_HEADS * KEY_SIZE + VALUE_HEADS * VALUE_SIZE) * 4
    assert token_bytes // CACHE_LINE % 2 == 1, "a record takes an odd number of cache lines"
    run_pass(stream, pairs, 256)
    for past in (256, 257, 258):
        before = stream.counters.bytes_read, stream.counters.bytes_written
        run_pass(stream, pairs, 1)
        stretches = LAYERS * len(pairs)
        assert stream.counters.bytes_read - before[0] <= stretches * (past * token_bytes + 4095)
        assert stream.counters.bytes_written - before[1] <= stretches * (token_bytes + 2 * 4095)


def test_a_cache_outlives_a_pass_that_was_given_up(stream: KvStream) -> None:
    pairs = [_Pair(stream, 2, seed) for seed in range(2)]
    run_pass(stream, pairs, 10)
    run_pass(stream, pairs, 1, ((0,),))
    stream.forget_all()
    fresh = [_Pair(stream, 2, seed) for seed in range(2)]
    run_pass(stream, fresh, 10)
    run_pass(stream, fresh, 1)


def test_only_plain_layers_move() -> None:
    for architecture, places in (("gpt_oss", [1]), ("qwen3_next", [3]), ("mixtral", [0, 1]), ("mixtral_sliding", [])):
        model = build_meta_model(tiny_config(architecture), torch.float32)
        assert movable_layers(model, make_cache(model)) == places
    shared = tiny_config("mixtral")
    shared.num_kv_shared_layers = 1
    assert movable_layers(build_meta_model(shared, torch.float32), DynamicCache(config=shared)) == []


def test_the_scratch_file_has_no_name_and_its_space_comes_back(stream: KvStream, tmp_path: Path) -> None:
    pair = _Pair(stream, 2, 0)
    descriptors = len(os.listdir("/proc/self/fd"))
    run_pass(stream, [pair], 10)
    assert list(tmp_path.iterdir()) == []
    stream.forget(pair.on_disk)
    assert len(os.listdir("/proc/self/fd")) == descriptors - 1


def test_a_full_disk_is_said_in_one_line(
    checkpoint: MakeCheckpoint, draw_prompts: DrawPrompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [{"prompt_token_ids": ids} for ids in draw_prompts((9, 4))]
    with LLM(checkpoint("mixtral"), memory="1GiB", kv_on_disk=True, scratch_directory=tmp_path) as llm:

        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr("os.posix_fallocate", full)
            with pytest.raises(UsageError, match=r"the disk of .* has .* free and keys and values need .* more there"):
                llm.generate(prompts, SamplingParams(max_tokens=2))
        assert len(llm.generate(prompts, SamplingParams(max_tokens=2))) == 2
        with monkeypatch.context() as patch:
            patch.setattr("poise.engine.kv_file.os.statvfs", lambda _: os.statvfs_result((4096, 1, 9, 0, 0) + (0,) * 5))
            with pytest.raises(UsageError, match="keys and values need"):
                llm.generate(prompts, SamplingParams(max_tokens=2))


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_the_space_that_is_asked_for_is_what_batches_of_uneven_rows_take(
    batch_size: int,
    checkpoint: MakeCheckpoint,
    draw_prompts: DrawPrompts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = [{"prompt_token_ids": ids} for ids in draw_prompts((30, 2, 17, 5))]
    params = [SamplingParams(max_tokens=tokens, ignore_eos=True) for tokens in (2, 20, 2, 3)]
    options: dict[str, Any] = {"kv_on_disk": True, "groups": [(batch_size, 4)], "scratch_directory": tmp_path}
    path = checkpoint("mixtral", "bfloat16", num_hidden_layers=3, num_key_value_heads=1)
    with LLM(path, memory="1GiB", **options) as llm:
        taken: list[int] = []
        grow = Scratch.grow

        def grow_noted(scratch: Scratch, nbytes: int) -> int:
            taken.append(-(-nbytes // ALIGNMENT))
            return grow(scratch, nbytes)

        with monkeypatch.context() as patch:
            patch.setattr(Scratch, "grow", grow_noted)
            llm.generate(prompts, params)
        for free, fits in ((sum(taken), True), (sum(taken) - 1, False)):
            status = os.statvfs_result((ALIGNMENT, ALIGNMENT, 0, 0, free) + (0,) * 5)
            with monkeypatch.context() as patch:
                patch.setattr("poise.engine.kv_file.os.statvfs", lambda _, status=status: status)
                with nullcontext() if fits else pytest.raises(UsageError, match="keys and values need"):
                    assert len(llm.generate(prompts, params)) == 4


def test_what_is_no_disk_is_refused(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="is no directory"):
        LLM(checkpoint("mixtral"), memory="1GiB", kv_on_disk=True, scratch_directory=tmp_path / "none")
    monkeypatch.setattr("poise.engine.kv_file.in_memory", lambda _: True)
    with pytest.raises(UsageError, match="is memory"):
        LLM(checkpoint("mixtral"), memory="1GiB", kv_on_disk=True, scratch_directory=tmp_path)


def test_a_disk_that_fails_is_said_and_the_call_can_be_repeated(
    checkpoint: MakeCheckpoint, draw_prompts: DrawPrompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [{"prompt_token_ids": ids} for ids in draw_prompts((9, 4, 7))]
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    options: dict[str, Any] = {"kv_on_disk": True, "groups": [(1, 3)], "scratch_directory": tmp_path}
    with LLM(checkpoint("mixtral"), memory="1GiB", **options) as llm:
        want = [result.outputs[0].token_ids for result in llm.generate(prompts, params)]

        def fail(self: Scratch, offset: int, memory: memoryview) -> None:
            raise ReadError("reading a scratch file failed: Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(Scratch, "read", fail)
            with pytest.raises(ReadError):
                llm.generate(prompts, params)
        assert [result.outputs[0].token_ids for result in llm.generate(prompts, params)] == want


def test_ctrl_c_leaves_no_file_and_an_llm_that_works(
    checkpoint: MakeCheckpoint, draw_prompts: DrawPrompts, tmp_path: Path
) -> None:
    prompts = [{"prompt_token_ids": ids} for ids in draw_prompts((9, 4, 7))]
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    options: dict[str, Any] = {"kv_on_disk": True, "groups": [(1, 3)], "scratch_directory": tmp_path}
    with LLM(checkpoint("mixtral", num_hidden_layers=4), memory="1GiB", dense_layers=0, **options) as llm:
        want = [result.outputs[0].token_ids for result in llm.generate(prompts, params)]
        descriptors = len(os.listdir("/proc/self/fd"))

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        hook = llm.runner.model.model.layers[2].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(prompts, params)
        hook.remove()
        assert len(os.listdir("/proc/self/fd")) == descriptors
        assert list(tmp_path.iterdir()) == []
        assert [result.outputs[0].token_ids for result in llm.generate(prompts, params)] == want
