"""A checkpoint directory: its configuration and where every tensor lies, byte for byte.

Reads the JSON headers of safetensors files and nothing else of them. Everything that can be wrong with a directory is
found here, before memory is spent: each error is one line that names the file and the remedy. It does not know what the
tensors mean (``model.layout`` does) and reads no weights (``model.reader`` and ``model.dense`` do).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poise.errors import CheckpointError
from poise.model.quantisation import Scheme, read_scheme

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SHARD = re.compile(r"-\d+-of-(?P<total>\d+)\.safetensors$")
MAX_HEADER_BYTES = 100_000_000
"""The safetensors library's own limit."""

ITEM_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRef:
    """One tensor on disk. ``offset`` and ``nbytes`` in bytes from the start of ``file``; ``dtype`` in safetensors' names."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checked directory: parsed ``config.json``, all tensors by name, and how they are quantised, if they are."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorRef]
    scheme: Scheme | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Reads ``config.json`` and every safetensors header of a directory.

    Raises CheckpointError when the path, the configuration or a file is missing, damaged, truncated, or not safetensors,
    and for a quantisation that Poise does not read.
    """
    root = Path(path)
    if not root.exists():
        raise CheckpointError(
            f"no such model directory: {root}; give a folder with config.json and *.safetensors, or a hub id"
        )
    if not root.is_dir():
        raise CheckpointError(f"{root} is a file; give the folder that holds config.json and *.safetensors")
    config = _read_json(root / "config.json", "a model directory holds config.json beside its weights")
    scheme = read_scheme(config, root)
    tensors: dict[str, TensorRef] = {}
    indexed = _read_index(root)
    for file in _weight_files(root, indexed):
        for tensor in read_header(file):
            if tensor.name in tensors:
                raise CheckpointError(
                    f"tensor {tensor.name} is in {tensors[tensor.name].file.name} and in {file.name}; keep one"
                )
            tensors[tensor.name] = tensor
    for name, shard in indexed.items():
        if name not in tensors:
            raise CheckpointError(f"{INDEX_NAME} says that {shard} holds tensor {name}; it does not: fetch both again")
    return Checkpoint(path=root, config=config, tensors=tensors, scheme=scheme)


def _read_json(file: Path, purpose: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; {purpose}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds a JSON {type(value).__name__}, not an object; fetch it again")
    return value


def _read_index(root: Path) -> Mapping[str, str]:
    """Which shard holds each tensor, as the index says; empty where there is no index."""
    if not (root / INDEX_NAME).exists():
        return {}
    weight_map = _read_json(root / INDEX_NAME, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{root / INDEX_NAME} has no weight_map; fetch it again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or Path(shard).name != shard:
            raise CheckpointError(f"{root / INDEX_NAME}: {name} is in {shard!r}, which is no file name; fetch it again")
    return weight_map


def _weight_files(root: Path, indexed: Mapping[str, str]) -> list[Path]:
    """The shards of the index, or the single file, or every safetensors file where there is neither."""
    if indexed:
        files = [root / name for name in sorted(set(indexed.values()))]
        for file in files:
            if not file.exists():
                raise CheckpointError(f"shard {file.name} named in {INDEX_NAME} is missing from {root}; fetch it again")
        return files
    if (root / SINGLE_NAME).exists():
        return [root / SINGLE_NAME]
    files = sorted(root.glob("*.safetensors"))
    if files:
        _check_numbering(root, files)
        return files
    if any(any(root.glob(pattern)) for pattern in PICKLES):
        raise CheckpointError(
            f"{root} holds pickled weights only, which can run code; convert them to safetensors first"
        )
    raise CheckpointError(f"{root} holds no *.safetensors file; fetch the weights beside config.json")


def _check_numbering(root: Path, files: Sequence[Path]) -> None:
    """Where there is no index, shards still say in their names how many they are."""
    numbered = [match for file in files if (match := _SHARD.search(file.name))]
    wanted = max((int(match["total"]) for match in numbered), default=0)
    if len(numbered) < wanted:
        raise CheckpointError(f"{root} holds {len(numbered)} of {wanted} shards and no {INDEX_NAME}; fetch the others")


def read_header(file: Path) -> list[TensorRef]:
    """The tensors of one safetensors file, checked against the file's size. Raises CheckpointError."""
    damaged = f"{file} is not a whole safetensors file"
    try:
        size = os.stat(file).st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(f"{damaged}: header of {length} bytes in a file of {size}; fetch it again")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}; check that it is there and readable") from None
    except ValueError:
        raise CheckpointError(f"{damaged}: its header is not JSON; fetch it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{damaged}: its header is a JSON {type(header).__name__}, not an object; fetch it again")
    data_start = 8 + length
    tensors = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        tensor = _parse_entry(name, entry, file, data_start)
        if tensor is None:
            raise CheckpointError(f"{damaged}: the entry of tensor {name} is malformed; fetch it again")
        if tensor.offset + tensor.nbytes > size:
            missing = tensor.offset + tensor.nbytes - size
            raise CheckpointError(
                f"{file} is truncated: tensor {name} ends {missing} bytes past its end; fetch it again"
            )
        tensors.append(tensor)
    return tensors


def _parse_entry(name: str, entry: Any, file: Path, data_start: int) -> TensorRef | None:
    try:
        dtype, shape, (begin, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        return None
    bits = ITEM_BITS.get(dtype)
    if bits is None or not all(isinstance(size, int) and size >= 0 for size in (*shape, begin, end)):
        return None
    if end - begin != math.prod(shape) * bits // 8:
        return None
    return TensorRef(name=name, file=file, dtype=dtype, shape=shape, offset=data_start + begin, nbytes=end - begin)
