"""The same function and the same routing at any size, so that a small trained model can stand in for a large one.

Every expert neuron is copied ``factor`` times and its column of the down-projection divided by ``factor``: exact in
bf16 and fp32, where dividing by a power of two changes only the exponent. Expert bytes and FLOPs grow by the factor;
routing, attention and the vocabulary stay. What is left is the rounding of longer sums: none to speak of in fp32; when
computing in bf16, a choice between nearly equal experts may flip (0.4 % of them in the bundled model at factor 16).
Tensors stream through blocks of a few MiB into shards; the directory appears under its name only when it is whole.

It widens a checkpoint whose experts are tensors of their own: ``mlp.experts.N.{gate,up,down}_proj.weight`` (Qwen,
OLMoE, DeepSeek) and ``block_sparse_moe.experts.N.{w1,w3,w2}.weight`` (Mixtral). Shared experts stay as they are, except
where the configuration has no width for them alone (DeepSeek): there they widen with the others. It makes no model
better, and it adds no experts.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from poise.errors import CheckpointError, UsageError
from poise.model.checkpoint import ITEM_BITS, Checkpoint, TensorRef, open_checkpoint
from poise.model.new_checkpoint import MAX_SHARD_BYTES, shard_names, whole_directory, write_index
from poise.units import MIB

BLOCK_BYTES = 4 * MIB

_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}
_EXPERT = re.compile(
    r"(?P<module>.*\b(?:mlp|block_sparse_moe)\.experts\.\d+)\.(?P<matrix>gate_proj|up_proj|down_proj|w1|w2|w3)\.weight"
)
_SHARED = re.compile(r"(?P<module>.*\.shared_experts?)\.(?P<matrix>gate_proj|up_proj|down_proj)\.weight")
_DENSE = re.compile(r".*\.(?:gate_proj|up_proj|down_proj|gate_up_proj|w1|w2|w3)\.weight")
_SHARED_WIDTH_KEYS = ("shared_expert_intermediate_size", "shared_intermediate_size")
_COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "LICENSE*",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class WidenedTensor:
    """A tensor to be written: ``source`` with each row, or each column, copied ``factor`` times.

    Copied columns are divided by the factor. ``group`` names what lies in one shard: an expert, or the tensor alone.
    """

    source: TensorRef
    group: str
    copied: Literal["rows", "columns", None]
    factor: int

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def shape(self) -> tuple[int, ...]:
        if self.copied is None:
            return self.source.shape
        rows, columns = self.source.shape
        return (rows * self.factor, columns) if self.copied == "rows" else (rows, columns * self.factor)

    @property
    def nbytes(self) -> int:
        return self.source.nbytes * (1 if self.copied is None else self.factor)


def widen_checkpoint(
    source: Path,
    target: Path,
    factor: int,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes to ``target`` the checkpoint of ``source`` with experts ``factor`` times as wide; a factor of 1 copies it.

    ``on_progress`` is called with (bytes written, bytes in all). ``config.json`` is adapted; tokenizer files, the
    generation configuration and licences are copied; anything else in ``source`` is not. Needs some tens of MiB of
    memory, whatever the size. Directories above ``target`` are made when missing.

    Raises CheckpointError for a layout, a dtype or a configuration that cannot be widened, for a target that exists,
    and when the disk is too small; UsageError for a factor that is not a power of two. An error leaves nothing behind.
    """
    if factor < 1 or factor & (factor - 1):
        raise UsageError(
            f"factor {factor} is not a power of two, so dividing by it would round; choose 1, 2, 4, 8, ..."
        )
    checkpoint = open_checkpoint(source)
    tensors = _plan(checkpoint, factor)
    config = _widen_config(checkpoint, tensors, factor)
    total_bytes = sum(tensor.nbytes for tensor in tensors)
    with whole_directory(target, total_bytes) as partial:
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for pattern in _COMPANIONS:
            for file in source.glob(pattern):
                shutil.copyfile(file, partial / file.name)
        _write_shards(partial, _into_shards(tensors, max_shard_bytes), on_progress or (lambda done, total: None))


def _plan(checkpoint: Checkpoint, factor: int) -> list[WidenedTensor]:
    """What becomes of each tensor, in order of name."""
    has_shared_width = any(checkpoint.config.get(key) is not None for key in _SHARED_WIDTH_KEYS)
    planned = []
    for name, tensor in sorted(checkpoint.tensors.items()):
        expert = _EXPERT.fullmatch(name)
        widened = expert or (None if has_shared_width else _SHARED.fullmatch(name))
        if expert is None and ".experts." in name:
            raise CheckpointError(
                f"tensor {name} is not of a layout that can be widened: "
                "experts.N.{gate_proj,up_proj,down_proj}.weight or experts.N.{w1,w3,w2}.weight; choose another model"
            )
        if widened is None:
            planned.append(WidenedTensor(source=tensor, group=name, copied=None, factor=factor))
            continue
        if tensor.dtype not in _DTYPES or len(tensor.shape) != 2:
            found = f"tensor {name} is {tensor.dtype} of shape {list(tensor.shape)}"
            raise CheckpointError(f"{found}; only BF16 and F32 matrices widen exactly: convert the checkpoint first")
        copied: Literal["rows", "columns"] = "columns" if widened["matrix"] in ("down_proj", "w2") else "rows"
        planned.append(WidenedTensor(source=tensor, group=widened["module"], copied=copied, factor=factor))
    if not any(_EXPERT.fullmatch(name) for name in checkpoint.tensors):
        raise CheckpointError(
            f"{checkpoint.path} has no tensor such as mlp.experts.0.gate_proj.weight; nothing to widen"
        )
    return planned


def _widen_config(checkpoint: Checkpoint, tensors: Sequence[WidenedTensor], factor: int) -> dict[str, Any]:
    """``config.json`` with the experts' width multiplied. Raises CheckpointError where other layers share it."""
    config = dict(checkpoint.config)
    key = "moe_intermediate_size" if config.get("moe_intermediate_size") is not None else "intermediate_size"
    for tensor in tensors:
        width = tensor.source.shape[0 if tensor.copied == "rows" else 1] if _EXPERT.fullmatch(tensor.name) else None
        if width is not None and width != config.get(key):
            found = f"{tensor.name} is {width} wide, but {key} in config.json is {config.get(key)!r}"
            raise CheckpointError(f"{checkpoint.path}: {found}; they must agree: fetch both again")
        if key == "intermediate_size" and tensor.copied is None and _DENSE.fullmatch(tensor.name):
            raise CheckpointError(
                f"{tensor.name} takes its width from the experts' {key}; choose another model to widen"
            )
    config[key] *= factor
    return config


def _into_shards(tensors: Sequence[WidenedTensor], max_shard_bytes: int) -> list[list[WidenedTensor]]:
    """Consecutive tensors, as many as fit. An expert is never split: one larger than the limit has a shard alone."""
    shards: list[list[WidenedTensor]] = [[]]
    used_bytes = 0
    for _, members in itertools.groupby(tensors, key=lambda tensor: tensor.group):
        group = list(members)
        group_bytes = sum(tensor.nbytes for tensor in group)
        if shards[-1] and used_bytes + group_bytes > max_shard_bytes:
            shards.append([])
            used_bytes = 0
        shards[-1] += group
        used_bytes += group_bytes
    return shards


def _write_shards(directory: Path, shards: list[list[WidenedTensor]], on_progress: Callable[[int, int], None]) -> None:
    names = shard_names(len(shards))
    total_bytes = sum(tensor.nbytes for shard in shards for tensor in shard)
    done_bytes = 0
    for name, shard in zip(names, shards, strict=True):
        # The safetensors library's order: wide items first, which aligns every tensor to its items; then by name.
        ordered = sorted(shard, key=lambda tensor: (-ITEM_BITS[tensor.source.dtype], tensor.name))
        with open(directory / name, "wb") as stream:
            stream.write(_header(ordered))
            for tensor in ordered:
                for block in _blocks(tensor):
                    done_bytes += stream.write(block)
                    on_progress(done_bytes, total_bytes)
    if len(shards) > 1:
        write_index(
            directory,
            {name: [tensor.name for tensor in shard] for name, shard in zip(names, shards, strict=True)},
            total_bytes,
        )


def _header(tensors: Iterable[WidenedTensor]) -> bytes:
    """Length and JSON header of a safetensors file, padded so that the data starts at a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        span = [offset, offset + tensor.nbytes]
        entries[tensor.name] = {"dtype": tensor.source.dtype, "shape": list(tensor.shape), "data_offsets": span}
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _blocks(tensor: WidenedTensor) -> Iterator[memoryview]:
    """The widened tensor's bytes in order, about ``BLOCK_BYTES`` at a time."""
    source = tensor.source
    row_bytes = source.nbytes // source.shape[0] if tensor.copied else 1
    rows = max(1, BLOCK_BYTES // (row_bytes * (tensor.factor if tensor.copied else 1)))
    with open(source.file, "rb", buffering=0) as stream:
        stream.seek(source.offset)
        for begin in range(0, source.nbytes, rows * row_bytes):
            block = _read_exactly(stream, min(rows * row_bytes, source.nbytes - begin), source)
            yield memoryview(block) if tensor.copied is None else _repeat(block, tensor)


def _read_exactly(stream: Any, nbytes: int, source: TensorRef) -> bytearray:
    block = bytearray(nbytes)
    filled = 0
    while filled < nbytes:
        count = stream.readinto(memoryview(block)[filled:])
        if not count:
            raise CheckpointError(f"{source.file} ended inside tensor {source.name}; fetch it again")
        filled += count
    return block


def _repeat(block: bytearray, tensor: WidenedTensor) -> memoryview:
    values = torch.frombuffer(block, dtype=_DTYPES[tensor.source.dtype]).view(-1, tensor.source.shape[1])
    if tensor.copied == "rows":
        widened = values.repeat_interleave(tensor.factor, dim=0)
    else:
        widened = (values / tensor.factor).repeat_interleave(tensor.factor, dim=1)
    return widened.view(torch.uint8).numpy().data
