"""Which published quantisation a ``config.json`` declares. Numbers and names only: it sees no tensor.

Two are read as they lie on disk: MXFP4 (GPT-OSS) and block-scaled fp8 (DeepSeek-V3, Qwen3-FP8). Which tensors are
quantised is not decided here: a tensor with scales beside it is, one without (``modules_to_not_convert``) is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from poise.errors import CheckpointError

Method = Literal["fp8", "mxfp4"]
DEFAULT_BLOCK = (128, 128)

_ALLOWED: dict[str, dict[str, tuple[object, ...] | None]] = {
    "mxfp4": {"modules_to_not_convert": None, "dequantize": None},
    "fp8": {
        "modules_to_not_convert": None,
        "ignored_layers": None,
        "modules_to_convert": None,
        "dequantize": None,
        "weight_block_size": None,
        "activation_scheme": ("dynamic",),
        "fmt": ("e4m3",),
        "scale_fmt": ("float", "ue8m0"),
        "expert_dtype": ("fp8",),
    },
}
"""By method, the keys that may be there and the values they may have (None: any)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """How the checkpoint's quantised tensors are stored. ``block``: rows and columns that share a scale (fp8)."""

    method: Method
    block: tuple[int, int]


def read_scheme(config: Mapping[str, Any], root: Path) -> Scheme | None:
    """The scheme of a parsed ``config.json``; None where it declares none.

    Raises CheckpointError for any method, key or value other than those above, and names it.
    """
    declared = config.get("quantization_config")
    if declared is None:
        return None
    remedy = "use a checkpoint in bf16, fp16, fp32, MXFP4 or block-scaled fp8"
    method = declared.get("quant_method") if isinstance(declared, dict) else declared
    if not isinstance(method, str) or method not in _ALLOWED:
        raise CheckpointError(
            f"{root} has quantization_config {method or 'unnamed'!r}, which is not supported; {remedy}"
        )
    assert isinstance(declared, dict), "a method was found"
    allowed = _ALLOWED[method]
    for key, value in declared.items():
        if key == "quant_method" or value is None:
            continue
        values = allowed.get(key, ())
        if values is not None and value not in values:
            raise CheckpointError(
                f"{root} has quantization_config {method!r} with {key} {value!r}, which is not supported; {remedy}"
            )
    return Scheme(method="fp8" if method == "fp8" else "mxfp4", block=_block(declared, root))


def stated_dtype(config: Mapping[str, Any]) -> str:
    """The dtype in which a quantised model is meant to run, in torch's name; bfloat16 where it is not said."""
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")


def _block(declared: Mapping[str, Any], root: Path) -> tuple[int, int]:
    block = declared.get("weight_block_size", DEFAULT_BLOCK)
    if not (
        isinstance(block, (list, tuple))
        and len(block) == 2
        and all(isinstance(size, int) and size > 0 for size in block)
    ):
        raise CheckpointError(
            f"{root} has weight_block_size {block!r} in its quantization_config; Poise reads fp8 with a scale per block, "
            "such as [128, 128]"
        )
    return block[0], block[1]
