"""A model by its hub id: the ordinary cache, built here by hand; the network is never asked for real."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from poise import LLM
from poise.errors import CheckpointError
from poise.model import hub
from poise.model.hub import find_model
from tests.conftest import MakeCheckpoint

MODEL = "some-lab/tiny-moe"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds MODEL as the hub's client leaves it: a snapshot of links to blobs. The network is off."""
    root = tmp_path / "hub"
    fill(root, checkpoint("qwen3_moe"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return root


def fill(cache: Path, source: Path) -> Path:
    """Puts a checkpoint into a cache; returns the snapshot."""
    repository = cache / "models--some-lab--tiny-moe"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(source.iterdir())):
        blob = repository / "blobs" / f"{number:064x}"
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def snapshot_of(cache: Path) -> Path:
    return cache / "models--some-lab--tiny-moe" / "snapshots" / COMMIT


@pytest.mark.parametrize("model", ["", None, 5])
def test_what_names_no_model_is_refused_and_is_not_the_current_directory(
    model: Any, checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint("qwen3_moe"))
    with pytest.raises(CheckpointError, match=rf"model {model!r} names nothing; give a folder with config\.json"):
        LLM(model, memory="1GiB")


def test_a_snapshot_of_links_in_the_cache_is_used_as_it_is(cache: Path) -> None:
    assert find_model(MODEL) == snapshot_of(cache)
    with LLM(MODEL, memory="1GiB") as llm:
        assert len(llm.generate({"prompt_token_ids": [5, 6, 7]})) == 1


def test_the_command_takes_an_id_offline(cache: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt_token_ids": [5, 6, 7]}) + "\n")
    command = [
        sys.executable,
        "-m",
        "poise",
        "generate",
        "--memory",
        "1GiB",
        "--max-tokens",
        "2",
        "--prompts",
        str(prompts),
    ]
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--json", MODEL], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_directory_comes_before_an_id_of_the_same_name(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / MODEL).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_model(MODEL) == Path(MODEL)


@pytest.mark.parametrize("model", ["nowhere", "/no/where", "./no/where", "a/b/c", "../model", "~/x", "C:\\x", "a//b"])
def test_what_cannot_be_an_id_is_a_path(model: str, cache: Path) -> None:
    assert find_model(model) == Path(model)


def test_an_id_that_is_nowhere_is_refused_in_one_line_with_the_remedy(cache: Path) -> None:
    with pytest.raises(CheckpointError) as refusal:
        LLM("some-lab/other")
    assert str(refusal.value) == (
        "some-lab/other is no directory and not in the Hugging Face cache, and the hub is out of reach; give a directory, "
        "or an id that this command can fetch: hf download some-lab/other"
    )


def test_a_snapshot_that_is_not_whole_is_refused_by_the_file_that_is_missing(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    snapshot = snapshot_of(cache)
    weight_map = {"lm_head.weight": "model-00001-of-00002.safetensors"}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"shard model-00001-of-00002\.safetensors .* is missing"):
        LLM(MODEL)
    assert "asking the hub" in caplog.text


class Hub:
    """Stands for the hub's client: says what it was asked, and answers or fails as told."""

    def __init__(self, answer: Callable[[], str]) -> None:
        self.answer = answer
        self.asked: list[dict[str, Any]] = []

    def __call__(self, model: str, *, local_files_only: bool, **options: Any) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("not there")
        self.asked.append({"model": model, **options})
        return self.answer()


def failing(error: Exception) -> Callable[[], str]:
    def answer() -> str:
        raise error

    return answer


def test_what_is_not_in_the_cache_is_fetched_without_pickles_and_second_copies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    there = [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
    ]
    not_there = [
        "pytorch_model.bin",
        "model.pt",
        "consolidated.00.pth",
        "original/model.safetensors",
        "metal/config.json",
        "modeling_x.py",
        "weights.gguf",
        "README.md",
    ]
    client = Hub(lambda: str(tmp_path))
    monkeypatch.setattr(hub, "snapshot_download", client)
    assert find_model(MODEL) == tmp_path
    (asked,) = client.asked
    patterns = {"allow_patterns": asked["allow_patterns"], "ignore_patterns": asked["ignore_patterns"]}
    fetched = huggingface_hub.utils.filter_repo_objects([*there, *not_there], **patterns)
    assert list(fetched) == there


def response() -> Any:
    """An answer of the hub's HTTP library, as its errors carry one."""
    library = pytest.importorskip("httpx2") if huggingface_hub.__version__ >= "2" else pytest.importorskip("httpx")
    return library.Response(403, request=library.Request("GET", "https://huggingface.co"))


@pytest.mark.parametrize(
    ("error", "pattern"),
    [
        (lambda: LocalEntryNotFoundError("x"), "the hub is out of reach"),
        (lambda: RepositoryNotFoundError("x", response=response()), "shows you no model of that name .*hf auth login"),
        (lambda: GatedRepoError("x", response=response()), "accept its terms first"),
        (lambda: HFValidationError("bad name\nmore"), "bad name; give"),
        (lambda: OSError(28, "No space left on device"), "No space left on device; give"),
        (lambda: RuntimeError(""), "RuntimeError; give"),
    ],
)
def test_whatever_the_hub_says_no_with_is_one_line(
    error: Callable[[], Exception], pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "snapshot_download", Hub(failing(error())))
    with pytest.raises(CheckpointError, match=pattern) as refusal:
        find_model(MODEL)
    assert "\n" not in str(refusal.value)
    assert MODEL in str(refusal.value)
