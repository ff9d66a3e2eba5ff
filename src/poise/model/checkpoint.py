"""A checkpoint directory: its configuration and where every tensor lies, byte for byte.

Reads the JSON headers of safetensors files and nothing else of them. Everything that can be wrong with a directory is
found here, before memory is spent: each error is one line that names the file and the remedy. It does not know what the
tensors mean (``model.layout`` does) and reads no weights (``offload.reader`` and ``model.dense`` do).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poise.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
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
    """A checked directory: parsed ``config.json`` and all tensors by name."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorRef]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Reads ``config.json`` and every safetensors header of a directory.

    Raises CheckpointError when the path, the configuration or a file is missing, damaged, truncated, or not safetensors.
    """
    root = Path(path)
    if not root.exists():
        raise CheckpointError(f"no such model directory: {root}; give a folder with config.json and *.safetensors")
    if not root.is_dir():
        raise CheckpointError(f"{root} is a file; give the folder that holds config.json and *.safetensors")
    config = _read_json(root / "config.json", "a model directory holds config.json beside its weights")
    method = config.get("quantization_config")
    if method is not None:
        name = method.get("quant_method", "unnamed") if isinstance(method, dict) else method
        raise CheckpointError(
            f"{root} has quantization_config {name!r}, which is not supported; use an unquantised checkpoint (bf16, fp16, fp32)"
        )
    tensors: dict[str, TensorRef] = {}
    for file in _weight_files(root):
        for tensor in read_header(file):
            if tensor.name in tensors:
                raise CheckpointError(
                    f"tensor {tensor.name} is in {tensors[tensor.name].file.name} and in {file.name}; keep one"
                )
            tensors[tensor.name] = tensor
    return Checkpoint(path=root, config=config, tensors=tensors)


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


def _weight_files(root: Path) -> list[Path]:
    """The shards of the index, or the single file, or every safetensors file where there is neither."""
    if (root / INDEX_NAME).exists():
        weight_map = _read_json(root / INDEX_NAME, "").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{root / INDEX_NAME} has no weight_map; fetch it again")
        files = [root / name for name in sorted(set(weight_map.values()))]
        for file in files:
            if not file.exists():
                raise CheckpointError(f"shard {file.name} named in {INDEX_NAME} is missing from {root}; fetch it again")
        return files
    if (root / SINGLE_NAME).exists():
        return [root / SINGLE_NAME]
    files = sorted(root.glob("*.safetensors"))
    if files:
        return files
    if any(root.glob("*.bin")) or any(root.glob("*.pt")) or any(root.glob("*.pth")):
        raise CheckpointError(
            f"{root} holds pickled weights only, which can run code; convert them to safetensors first"
        )
    raise CheckpointError(f"{root} holds no *.safetensors file; fetch the weights beside config.json")


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
        dtype, shape, (begin, end) = entry["dtype"], tuple(int(size) for size in entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        return None
    bits = ITEM_BITS.get(dtype)
    if bits is None or begin < 0 or end - begin != math.prod(shape) * bits // 8:
        return None
    return TensorRef(name=name, file=file, dtype=dtype, shape=shape, offset=data_start + begin, nbytes=end - begin)
