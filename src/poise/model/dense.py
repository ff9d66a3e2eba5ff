"""Everything of a model that is not a routed expert, loaded into memory; the experts' parameters taken out of the model.

transformers loads the tensors with its own conversions and finishes the model (buffers, tied weights). The tensors are
read with ``pread`` into memory of their own, never mapped: a mapped file would count against the memory budget.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from poise.errors import CheckpointError, ReadError
from poise.model.checkpoint import Checkpoint, TensorRef
from poise.model.dequantise import dequantised
from poise.model.inspect import ExpertsModule
from poise.model.layout import CheckpointLayout
from poise.model.scaled import Stored

logger = logging.getLogger(__name__)

_TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}


def as_tensor(buffer: torch.Tensor, ref: TensorRef) -> torch.Tensor:
    """A uint8 tensor of ``ref.nbytes`` seen with the dtype and shape of ``ref``; shares memory where alignment allows."""
    dtype = _TORCH_DTYPES[ref.dtype]
    if buffer.storage_offset() % dtype.itemsize:
        buffer = buffer.clone()
    return buffer.view(dtype).view(ref.shape)


def read_tensor(ref: TensorRef) -> torch.Tensor:
    """A tensor from disk in memory of its own; the page cache is left as it was. Raises ReadError."""
    buffer = torch.empty(ref.nbytes, dtype=torch.uint8)
    view = memoryview(buffer.numpy().data)
    descriptor = os.open(ref.file, os.O_RDONLY)
    try:
        done = 0
        while done < ref.nbytes:
            count = os.preadv(descriptor, [view[done:]], ref.offset + done)
            if count == 0:
                raise ReadError(f"{ref.file} became shorter while tensor {ref.name} was read")
            done += count
        os.posix_fadvise(descriptor, ref.offset, ref.nbytes, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return as_tensor(buffer, ref)


class _LazyTensor:
    """Stands for a tensor on disk in the state dict that transformers loads from; reads when sliced with ``[...]``.

    A quantised tensor shows itself, and comes, in ``dtype``.
    """

    def __init__(self, stored: Stored, dtype: torch.dtype) -> None:
        self._stored = stored
        self.shape = stored.shape
        self.dtype = _TORCH_DTYPES[stored.dtype] if isinstance(stored, TensorRef) else dtype

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return next(name for name, dtype in _TORCH_DTYPES.items() if dtype == self.dtype)

    def __getitem__(self, index: Any) -> torch.Tensor:
        if isinstance(self._stored, TensorRef):
            return read_tensor(self._stored)[index]
        values, scales = read_tensor(self._stored.values), read_tensor(self._stored.scales)
        return dequantised(self._stored, values, scales, self.dtype)[index]


def take_out_experts(model: nn.Module, modules: Sequence[ExpertsModule]) -> None:
    """Unregisters the per-expert parameters, so that nothing can load, move or initialise them."""
    for experts in modules:
        module = model.get_submodule(experts.name)
        for param in experts.params:
            meta = getattr(module, param).detach()
            del module._parameters[param]
            object.__setattr__(module, param, meta)


def load_dense(
    model: Any,
    checkpoint: Checkpoint,
    layout: CheckpointLayout,
    dtype: torch.dtype,
    device: torch.device,
    *,
    leave_out: Collection[str] = (),
) -> None:
    """Fills the meta model's dense parameters and buffers in place; the experts must have been taken out.

    ``leave_out``: tensors of the checkpoint that are not read; their parameters must have been taken out as well.
    Raises CheckpointError when a dense tensor is missing or has the wrong shape. Warns of what the checkpoint holds for the
    decoder layers beyond what the model takes.
    """
    config = LoadStateDictConfig(
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=list(layout.conversions),
        use_safetensors=True,
    )
    state = {name: _LazyTensor(stored, dtype) for name, stored in layout.dense.items() if name not in leave_out}
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    shows_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        info, _ = model._load_pretrained_model(model, state, None, config)
        for name, found, wanted in sorted(info.mismatched_keys):
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name} has shape {list(found)}; config.json asks for {list(wanted)}"
            )
        info = model._finalize_model_loading(model, config, info)
    except RuntimeError as error:
        raise CheckpointError(
            f"{checkpoint.path} does not fit its config.json: {str(error).strip().splitlines()[-1]}"
        ) from None
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shows_bars:
            transformers_logging.enable_progress_bar()
    if info.missing_keys:
        raise CheckpointError(f"{checkpoint.path} lacks tensor {min(info.missing_keys)}; fetch the missing shard again")
    _warn_of_unused(checkpoint, layout, info.unexpected_keys)
    model.eval()


def _warn_of_unused(checkpoint: Checkpoint, layout: CheckpointLayout, names: Iterable[str]) -> None:
    """``names``: tensors without a place in the model, less those that transformers' class says to ignore."""
    layers = re.split(r"\.\d+\.", layout.experts_LE[0][0].module)[0]
    unused = sorted(name for name in names if re.match(rf"{re.escape(layers)}\.\d+\.", name))
    if unused:
        logger.warning(
            "%s holds weights of decoder layers that its config.json does not describe, such as %s: they are not used; if "
            "the text is poor, fetch config.json again",
            checkpoint.path,
            unused[0],
        )


def dense_nbytes(model: Any) -> int:
    """Bytes of all parameters and buffers that the model holds or, on the meta device, will hold; tied weights once."""
    model.tie_weights()
    return sum({id(tensor): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}.values())
