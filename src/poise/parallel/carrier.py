"""What carries tensors between ranks: NCCL from GPU to GPU, Gloo from memory to memory, a GPU's tensors copied there and back.

NCCL refuses ranks that share a GPU, and is not everywhere; Gloo on the CPU always works. A copy to the host is made before
a tensor leaves, and one back when it has come, on the stream of the calling thread, which waits for both: at PCIe's rate, so
that it is no way to be fast. Decision 052.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Carrier:
    """``backend``: of ``torch.distributed``. ``through_host``: it takes tensors in host memory only, and others are copied."""

    backend: str
    through_host: bool = False

    def __str__(self) -> str:
        return f"{self.backend}{' through host memory' if self.through_host else ''}"

    def taken(self, tensor: torch.Tensor) -> torch.Tensor:
        """What the backend can send: the tensor, or a copy of what is in it when the work that fills it is done."""
        if not self.through_host:
            return tensor
        copy = self.place_for(tensor)
        copy.copy_(tensor)
        return copy

    def place_for(self, tensor: torch.Tensor) -> torch.Tensor:
        """What the backend can fill in place of the tensor: itself, or memory of the host."""
        if not self.through_host:
            return tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)

    def put_back(self, place: torch.Tensor, tensor: torch.Tensor) -> None:
        """What has come in a ``place_for`` the tensor is in the tensor when this returns."""
        if self.through_host:
            tensor.copy_(place)


GLOO = Carrier(backend="gloo")
NCCL = Carrier(backend="nccl")
GLOO_THROUGH_HOST = Carrier(backend="gloo", through_host=True)
"""For GPUs."""
