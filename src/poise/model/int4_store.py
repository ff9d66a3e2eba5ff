"""Poise's own 4-bit copy of a model's experts: where it is, what belongs to it, and whether it is whole.

A directory in the user's cache, named by a fingerprint of the checkpoint, holds safetensors files and ``manifest.json``, which
is written last. Each expert is one aligned stretch: for each matrix its packed weights (U8), scales and zeros (BF16) and bias
(F32, as it was), then padding. Where everything lies follows from the model's shapes alone, so a file is either the planned
one or none of ours. ``model.int4_making`` makes the files; their bytes are checked when they are read (``model.weights``).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from poise.errors import CheckpointError
from poise.model.checkpoint import Checkpoint, TensorRef
from poise.model.int4 import GROUP, kernel_layout, padded_shape
from poise.model.layout import CheckpointLayout, ExpertSource
from poise.model.scaled import Int4Ref

FORMAT = 1
MANIFEST = "manifest.json"
ALIGNMENT = 4096
MAX_SHARD_BYTES = 512 << 20
"""A making that was killed loses the file it was at: seconds of work."""
_MATRICES = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedExpert:
    """One expert in the store: its place in the layout and its matrices by parameter; ``nbytes`` without ``padding``."""

    layer: int
    expert: int
    matrices: Mapping[str, Int4Ref]
    padding: TensorRef | None

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Everything of this expert, in the order in which it lies on disk."""
        own = tuple(ref for matrix in self.matrices.values() for ref in matrix.refs)
        return own if self.padding is None else (*own, self.padding)

    @property
    def nbytes(self) -> int:
        """Bytes that a checksum covers."""
        return sum(ref.nbytes for matrix in self.matrices.values() for ref in matrix.refs)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One file: consecutive experts of one layer behind a header of ``header_bytes``."""

    file: Path
    experts: tuple[PlannedExpert, ...]
    header_bytes: int

    @property
    def nbytes(self) -> int:
        """The file's size."""
        return self.header_bytes + sum(ref.nbytes for expert in self.experts for ref in expert.refs)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardFacts:
    """What is only known once a file is made: per expert the CRC-32 and the relative error of its weights."""

    checksums: tuple[int, ...]
    errors: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Int4Store:
    """A whole store. ``weight_error``: |rounded - original| / |original| (Frobenius), mean over experts."""

    directory: Path
    facts: Mapping[str, ShardFacts]

    @property
    def weight_error(self) -> float:
        """Relative error of an expert's weights, mean over all experts."""
        errors = [error for facts in self.facts.values() for error in facts.errors]
        return sum(errors) / len(errors)


def fingerprint(checkpoint: Checkpoint) -> str:
    """Names what a store is made from and for: configuration, headers, files, format, and the processor's kernel."""
    files = sorted({tensor.file for tensor in checkpoint.tensors.values()})
    stats = [(file.name, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    tensors = sorted((ref.name, ref.file.name, ref.dtype, ref.shape, ref.offset) for ref in checkpoint.tensors.values())
    made_for = [FORMAT, GROUP, kernel_layout()]
    facts = json.dumps([made_for, checkpoint.config, stats, tensors], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:32]


def store_directory(checkpoint: Checkpoint) -> Path:
    """``poise/int4/<fingerprint>`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. Nothing is made there."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(named) if Path(named).is_absolute() else Path.home() / ".cache"
    return root / "poise" / "int4" / fingerprint(checkpoint)


def plan_store(
    directory: Path, layout: CheckpointLayout, *, transposed: bool, max_shard_bytes: int = MAX_SHARD_BYTES
) -> tuple[Shard, ...]:
    """The files of a store for these experts, all offsets included. ``transposed``: the model has its matrices (K, N).

    Raises CheckpointError for experts with parameters that are neither one of the usual matrices nor the bias of one.
    """
    groups = [group for layer, row in enumerate(layout.experts_LE) for group in _grouped(layer, row, max_shard_bytes)]
    return tuple(
        _shard(directory / f"experts-{number:05d}-of-{len(groups):05d}.safetensors", group, transposed)
        for number, group in enumerate(groups, start=1)
    )


def _grouped(layer: int, row: Sequence[ExpertSource], max_bytes: int) -> list[list[tuple[int, ExpertSource]]]:
    per_expert = max(math.prod(shape) for shape in row[0].shapes.values())
    count = max(1, max_bytes // per_expert)
    return [[(layer, source) for source in row[begin : begin + count]] for begin in range(0, len(row), count)]


def _shard(file: Path, group: Sequence[tuple[int, ExpertSource]], transposed: bool) -> Shard:
    """Placed twice: the offsets within the data do not depend on the header, whose length they decide."""
    experts, _ = _placed(file, group, transposed, 0)
    empty = ShardFacts(checksums=(0,) * len(group), errors=(0.0,) * len(group))
    header_bytes = len(header(Shard(file=file, experts=experts, header_bytes=0), empty))
    experts, _ = _placed(file, group, transposed, header_bytes)
    return Shard(file=file, experts=experts, header_bytes=header_bytes)


def _placed(
    file: Path, group: Sequence[tuple[int, ExpertSource]], transposed: bool, begin: int
) -> tuple[tuple[PlannedExpert, ...], int]:
    offset = begin

    def place(name: str, dtype: str, shape: tuple[int, ...], itemsize: int) -> TensorRef:
        nonlocal offset
        nbytes = math.prod(shape) * itemsize
        ref = TensorRef(name=name, file=file, dtype=dtype, shape=shape, offset=offset, nbytes=nbytes)
        offset += nbytes
        return ref

    experts = []
    for layer, source in group:
        matrices = {}
        for param, (outputs, inputs) in matrix_shapes(source, transposed=transposed).items():
            name = f"{source.module}.{source.expert}.{param}"
            N, K = padded_shape(outputs, inputs)
            matrices[param] = Int4Ref(
                outputs=outputs,
                inputs=inputs,
                packed=place(f"{name}.packed", "U8", (N, K // 2), 1),
                scale_zero=place(f"{name}.scale_zero", "BF16", (K // GROUP, N, 2), 2),
                bias=place(f"{name}.bias", "F32", (N,), 4) if f"{param}_bias" in source.shapes else None,
            )
        more = (begin - offset) % ALIGNMENT
        padding = place(f"{source.module}.{source.expert}.padding", "U8", (more,), 1) if more else None
        experts.append(PlannedExpert(layer=layer, expert=source.expert, matrices=matrices, padding=padding))
    return tuple(experts), offset


def matrix_shapes(source: ExpertSource, *, transposed: bool) -> Mapping[str, tuple[int, int]]:
    """(outputs, inputs) of an expert's matrices by parameter. Raises CheckpointError for other parameters than the usual."""
    shapes: dict[str, tuple[int, int]] = {}
    for param, shape in source.shapes.items():
        if param in _MATRICES and len(shape) == 2:
            shapes[param] = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
        elif param.removesuffix("_bias") not in source.shapes:
            raise CheckpointError(
                f"{source.module} has parameter {param} of shape {list(shape)}, which quantize 'int4' does not know; "
                "leave quantize at 'none'"
            )
    return shapes


def header(shard: Shard, facts: ShardFacts) -> bytes:
    """The file's beginning, up to its first tensor; as long for all ``facts``. The format is safetensors' own."""
    metadata = {
        "format": f"poise-int4-{FORMAT}",
        "crc32": " ".join(f"{checksum:08x}" for checksum in facts.checksums),
        "relative_error": " ".join(f"{error:.4e}" for error in facts.errors),
    }
    entries: dict[str, Any] = {"__metadata__": metadata}
    for expert in shard.experts:
        for ref in expert.refs:
            begin = ref.offset - shard.experts[0].refs[0].offset
            entries[ref.name] = {
                "dtype": ref.dtype,
                "shape": ref.shape,
                "data_offsets": [begin, begin + ref.nbytes],
            }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def facts_of(shard: Shard) -> ShardFacts | None:
    """What a file that is there says of itself; None unless it is the planned file and whole."""
    try:
        if shard.file.stat().st_size != shard.nbytes:
            return None
        with open(shard.file, "rb") as stream:
            found = stream.read(shard.header_bytes)
        metadata = json.loads(found[8:])["__metadata__"]
        facts = ShardFacts(
            checksums=tuple(int(word, 16) for word in metadata["crc32"].split()),
            errors=tuple(map(float, metadata["relative_error"].split())),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return facts if found == header(shard, facts) else None


def open_store(directory: Path, shards: Sequence[Shard]) -> Int4Store | None:
    """The store, or None where it is not made to its end. Raises CheckpointError, with the remedy, where it is damaged."""
    remedy = f"remove {directory}, and it is made again"
    try:
        found = json.loads((directory / MANIFEST).read_bytes())
        facts = {
            name: ShardFacts(checksums=tuple(entry["crc32"]), errors=tuple(entry["relative_error"]))
            for name, entry in found["shards"].items()
        }
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the 4-bit store's {directory / MANIFEST} cannot be read ({type(error).__name__}); {remedy}"
        ) from None
    if found.get("format") != FORMAT or {shard.file.name for shard in shards} != set(facts):
        raise CheckpointError(f"{directory / MANIFEST} belongs to other files than these; {remedy}")
    for shard in shards:
        size = shard.file.stat().st_size if shard.file.exists() else 0
        if size != shard.nbytes or len(facts[shard.file.name].checksums) != len(shard.experts):
            raise CheckpointError(
                f"the 4-bit store's {shard.file} has {size} bytes, not {shard.nbytes}: it is damaged; {remedy}"
            )
    return Int4Store(directory=directory, facts=facts)


def manifest(checkpoint: Checkpoint, shards: Sequence[Shard], facts: Sequence[ShardFacts]) -> str:
    """What ``manifest.json`` holds."""
    made = {
        shard.file.name: {"bytes": shard.nbytes, "crc32": each.checksums, "relative_error": each.errors}
        for shard, each in zip(shards, facts, strict=True)
    }
    document = {"format": FORMAT, "group": GROUP, "kernel_layout": kernel_layout(), "made_from": str(checkpoint.path)}
    return json.dumps(document | {"shards": made}, indent=1) + "\n"


def int4_layout(layout: CheckpointLayout, shards: Sequence[Shard], store: Int4Store | None) -> CheckpointLayout:
    """The same experts, read from the store; None: as they will lie in one that is not made yet, without checksums."""
    placed = {
        (expert.layer, expert.expert): (expert.matrices, checksum)
        for shard in shards
        for expert, checksum in zip(
            shard.experts, store.facts[shard.file.name].checksums if store else [None] * len(shard.experts), strict=True
        )
    }
    rows = tuple(
        tuple(
            replace(source, recipes=(), int4=placed[layer, source.expert][0], crc32=placed[layer, source.expert][1])
            for source in row
        )
        for layer, row in enumerate(layout.experts_LE)
    )
    return replace(layout, experts_LE=rows)
