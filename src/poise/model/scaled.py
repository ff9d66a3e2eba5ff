"""Tensors that a checkpoint stores as low-bit values with scales beside them, each pair seen as the one tensor it stands for.

MXFP4 stores ``NAME_blocks`` and ``NAME_scales`` (both uint8; 32 values of a row share a power of two), fp8 stores ``NAME``
(F8_E4M3) and ``NAME_scale_inv`` (a number per block). The rest of the package sees the tensor NAME, shaped as in an
unquantised checkpoint. Pairs and shapes are checked here; no weight is read (``model.dequantise`` does the arithmetic).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from poise.errors import CheckpointError
from poise.model.checkpoint import Checkpoint, TensorRef
from poise.model.quantisation import Method

MXFP4_GROUP = 32
"""Weights that share a scale; two to a byte."""
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
_SCALE_SUFFIXES = ("_scale_inv", "_scales", ".weight_scale", ".activation_scale", ".input_scale")
_QUANTISED_DTYPES = ("F8_E5M2", "I8", "U8")
"""Dtypes that only a quantised weight has; left over once the pairs are found, they are of a kind that is not read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaled:
    """A quantised tensor. ``shape`` is that of the unquantised tensor; ``block`` the rows and columns of one scale.

    The values on disk are those of the transposed matrix where ``is_transposed`` says so.
    """

    name: str
    method: Method
    shape: tuple[int, ...]
    values: TensorRef
    scales: TensorRef
    block: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes on disk, scales included."""
        return self.values.nbytes + self.scales.nbytes

    @property
    def is_transposed(self) -> bool:
        """Whether rows on disk are columns of the tensor (GPT-OSS)."""
        return self.method == "mxfp4"


Stored = TensorRef | Scaled
"""A tensor as it is stored: plain, or quantised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Int4Ref:
    """A matrix in Poise's own 4-bit store (``model.int4_store``), by name of its parameter: three tensors side by side."""

    outputs: int
    inputs: int
    packed: TensorRef
    scale_zero: TensorRef
    bias: TensorRef | None

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """In the order in which they lie on disk."""
        return (self.packed, self.scale_zero) if self.bias is None else (self.packed, self.scale_zero, self.bias)


def on_disk(stored: Stored) -> tuple[TensorRef, ...]:
    """The pieces of the disk that a tensor is made from."""
    return (stored,) if isinstance(stored, TensorRef) else (stored.values, stored.scales)


def stored_tensors(checkpoint: Checkpoint) -> Mapping[str, Stored]:
    """All tensors of a checkpoint by the name they would have unquantised.

    Raises CheckpointError for values without scales, scales without values, and dtypes and shapes that do not fit.
    """
    scheme = checkpoint.scheme
    if scheme is None:
        return checkpoint.tensors
    tensors = checkpoint.tensors
    pair = _fp8_pair if scheme.method == "fp8" else _mxfp4_pair
    found = [scaled for ref in tensors.values() if (scaled := pair(ref, tensors, scheme.block)) is not None]
    if not found:
        raise CheckpointError(
            f"{checkpoint.path} declares quantization_config {scheme.method!r} and holds no tensor of that kind; "
            "fetch the weights again, or take quantization_config out of config.json"
        )
    taken = {ref.name for scaled in found for ref in on_disk(scaled)}
    plain = {name: ref for name, ref in tensors.items() if name not in taken}
    for name, ref in plain.items():
        if name.endswith(_SCALE_SUFFIXES):
            raise CheckpointError(f"{ref.file}: {name} scales no {scheme.method} tensor; fetch the checkpoint again")
        if ref.dtype in _QUANTISED_DTYPES:
            raise CheckpointError(f"{ref.file}: {name} is {ref.dtype} without scales of {scheme.method}; not supported")
    return plain | {scaled.name: scaled for scaled in found}


def slice_of(stored: Stored, index: int) -> Stored:
    """One entry along dim 0 of a stacked tensor, as a tensor of its own."""
    if isinstance(stored, TensorRef):
        nbytes = stored.nbytes // stored.shape[0]
        return TensorRef(
            name=f"{stored.name}[{index}]",
            file=stored.file,
            dtype=stored.dtype,
            shape=stored.shape[1:],
            offset=stored.offset + index * nbytes,
            nbytes=nbytes,
        )
    values, scales = slice_of(stored.values, index), slice_of(stored.scales, index)
    assert isinstance(values, TensorRef), "a slice is of the kind of its whole"
    assert isinstance(scales, TensorRef), "a slice is of the kind of its whole"
    return replace(stored, name=f"{stored.name}[{index}]", shape=stored.shape[1:], values=values, scales=scales)


def _fp8_pair(ref: TensorRef, tensors: Mapping[str, TensorRef], block: tuple[int, int]) -> Scaled | None:
    if ref.dtype != "F8_E4M3":
        return None
    scales = tensors.get(f"{ref.name}_scale_inv")
    if scales is None:
        raise CheckpointError(
            f"{ref.file}: fp8 tensor {ref.name} has no {ref.name}_scale_inv; fetch the checkpoint again"
        )
    grid = (*ref.shape[:-2], *(math.ceil(size / step) for size, step in zip(ref.shape[-2:], block, strict=False)))
    if len(ref.shape) < 2 or scales.shape != grid or scales.dtype not in _SCALE_DTYPES:
        raise CheckpointError(
            f"{ref.file}: {scales.name} is {scales.dtype} {list(scales.shape)}; fp8 tensor {ref.name} of "
            f"{list(ref.shape)} in blocks of {list(block)} needs {list(grid)} in F32, BF16, F16 or F8_E8M0"
        )
    return Scaled(name=ref.name, method="fp8", shape=ref.shape, values=ref, scales=scales, block=block)


def _mxfp4_pair(ref: TensorRef, tensors: Mapping[str, TensorRef], block: tuple[int, int]) -> Scaled | None:
    name = ref.name.removesuffix("_blocks")
    if name == ref.name:
        return None
    scales = tensors.get(f"{name}_scales")
    if scales is None:
        raise CheckpointError(f"{ref.file}: MXFP4 tensor {ref.name} has no {name}_scales; fetch the checkpoint again")
    *stack, rows, groups, nbytes = ref.shape if len(ref.shape) > 2 else (0, 0, 0)
    if nbytes * 2 != MXFP4_GROUP or scales.shape != ref.shape[:-1] or {ref.dtype, scales.dtype} != {"U8"}:
        raise CheckpointError(
            f"{ref.file}: {ref.name} is {ref.dtype} {list(ref.shape)} and {scales.name} {scales.dtype} "
            f"{list(scales.shape)}; MXFP4 needs U8 [..., rows, groups, 16] and U8 [..., rows, groups]"
        )
    shape = (*stack, groups * MXFP4_GROUP, rows)
    return Scaled(name=name, method="mxfp4", shape=shape, values=ref, scales=scales, block=(1, MXFP4_GROUP))
