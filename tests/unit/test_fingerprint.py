"""Fingerprints: the same of a model wherever it lies, another one when its weights are others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from poise.model.checkpoint import open_checkpoint
from poise.model.fingerprint import model_fingerprint, weights_fingerprint
from tests.conftest import MakeCheckpoint


def changed(path: Path, target: Path, part: str) -> Path:
    """A copy in which the first tensor whose name has ``part`` is one percent larger."""
    shutil.copytree(path, target)
    file = next(target.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if part in name)
    save_file({**tensors, name: tensors[name] * 1.01}, file, metadata={"format": "pt"})
    return target


def test_a_copy_has_the_same(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    path = checkpoint("qwen3_moe")
    shutil.copytree(path, tmp_path / "copy")
    for fingerprint in (model_fingerprint, weights_fingerprint):
        assert fingerprint(open_checkpoint(path)) == fingerprint(open_checkpoint(tmp_path / "copy"))


@pytest.mark.parametrize("part", ["q_proj", "down_proj", "embed_tokens", "norm"])
def test_weights_that_were_trained_further_are_others(part: str, checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    path = checkpoint("qwen3_moe")
    other = changed(path, tmp_path / "other", part)
    assert weights_fingerprint(open_checkpoint(path)) != weights_fingerprint(open_checkpoint(other))
