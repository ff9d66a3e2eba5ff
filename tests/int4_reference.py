"""What a 4-bit matrix means, read through nothing but the kernel's definition: the reference of the 4-bit tests."""

from __future__ import annotations

import torch

from poise.model.int4 import GROUP, Int4Weight


def as_matrix(weight: Int4Weight) -> torch.Tensor:
    """The matrix that the kernel multiplies with, fp32, (outputs, inputs): the kernel's product with one-hot rows.

    Every one-hot product is exact in fp32 up to the last bit, and torch's own kernel says what the bytes mean.
    """
    inputs = weight.scale_zero_GN2.shape[0] * GROUP
    matrix_KN: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        torch.eye(inputs), weight.packed_NK, GROUP, weight.scale_zero_GN2.float()
    )
    return matrix_KN.t()[: weight.outputs, : weight.inputs].contiguous()
