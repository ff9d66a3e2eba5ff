"""A rank's experts on a GPU all at once: pairs sorted by expert, one grouped product up, one down, each row's outputs added.

One after the other they are bound by whoever launches them, 0.13 ms each. A grouped product wants matrices at even distances:
slots of one piece of memory are such, and slots between two of a layer's experts are groups without rows, so that experts may
lie in any slots. What lies elsewhere (replicas) is a product of its own. Sums do not depend on what else came (decision 003).
Letters: M rows, K choices of a row, P pairs of both, E experts, G groups, H hidden, I intermediate, N columns of the first
product (2 I with a gate).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from poise.model.int4 import Int4Weight
from poise.model.layout import Weights

LEAST_CAPABILITY = (9, 0)
"""Of GPUs for which torch has one kernel for a grouped product; on others it is a loop of its own, which was not measured."""
MOST_GROUPS = 1000
"""Of one product: torch takes fewer than 1024."""
ALIGNED_BYTES = 16
"""Rows of matrices begin on multiples of it."""
Ends = npt.NDArray[np.int32]
"""On the host, of each group: behind its last pair; last, behind those that others compute."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Stack:
    """Groups ``first`` to ``first + G``: ``up_GNH`` and ``down_GHI`` share memory with their experts, and with what lies
    between these."""

    first: int
    up_GNH: torch.Tensor
    down_GHI: torch.Tensor

    @property
    def end(self) -> int:
        """Behind the last group."""
        return self.first + len(self.up_GNH)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Groups:
    """Where the experts ``held`` lie, and ``group_of`` each, also as tables on the rows' device: ``boundary_G1`` (0 to G), and
    ``group_E1`` (G for "not yours", which is E; one more for experts that are not here)."""

    held: Mapping[int, Weights]
    stacks: Sequence[Stack]
    group_of: Mapping[int, int]
    boundary_G1: torch.Tensor
    group_E1: torch.Tensor

    @classmethod
    def of(cls, module: Any, held: Mapping[int, Weights], device: torch.device) -> Groups:
        """``can_group`` holds for them."""
        stacks, group_of = stacks_of(held, "gate_up_proj" if module.has_gate else "up_proj")
        groups = stacks[-1].end
        rows = [*range(groups + 1), *(group_of.get(expert, groups + 1) for expert in range(module.num_experts)), groups]
        both = torch.tensor(rows, dtype=torch.int16).to(device)
        boundary_G1, group_E1 = both[: groups + 1], both[groups + 1 :]
        return cls(held=dict(held), stacks=stacks, group_of=group_of, boundary_G1=boundary_G1, group_E1=group_E1)

    def are_of(self, held: Mapping[int, Weights]) -> bool:
        """Whether nothing has moved: the same experts in the same places."""
        return len(held) == len(self.held) and all(self.held.get(expert) is each for expert, each in held.items())


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Grouped:
    """``partial_MH``: each row's outputs, added up. ``pairs`` of a row and an expert, of which ``active`` had any."""

    partial_MH: torch.Tensor
    pairs: int
    active: int


def pays_on(device: torch.device) -> bool:
    """Whether ``run_grouped`` is faster there than a loop."""
    return (
        device.type == "cuda"
        and hasattr(nn.functional, "grouped_mm")
        and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
    )


def can_group(module: Any, dtype: torch.dtype, held: Mapping[int, Weights]) -> bool:
    """Whether these experts, all of one form, are plain matrices in bf16 with nothing between but a gate."""
    special = ("expert_forward", "scales_input", "has_bias", "is_transposed", "has_post_expert_norm")
    if dtype != torch.bfloat16 or any(getattr(module, mark, False) for mark in special):
        return False
    return all(_is_plain(parts, dtype) for weights in islice(held.values(), 1) for parts in weights.values())


def run_grouped(
    module: Any, rows_MH: torch.Tensor, experts_MK: torch.Tensor, weights_MK: torch.Tensor, groups: Groups
) -> Grouped:
    """A rank's experts over rows whose choices are ``experts_MK`` (``num_experts`` for those that others compute).

    A routing weight multiplies what its expert's last matrix is given, not what that makes.
    """
    top_k, count = experts_MK.shape[1], len(groups.boundary_G1) - 1
    group_P, pair_P = groups.group_E1[experts_MK.reshape(-1)].sort()
    end_G1 = torch.searchsorted(group_P, groups.boundary_G1, right=True, out_int32=True)
    # Queued ahead of where the host waits for counts, though they take more than pairs for here.
    place_P = torch.empty_like(pair_P).scatter_(0, pair_P, torch.arange(len(pair_P), device=pair_P.device))
    row_P = pair_P // top_k
    host_end_G1: Ends = end_G1.numpy(force=True)
    assert host_end_G1[count] == len(pair_P), (
        f"tokens came for experts that are not here, which has {sorted(groups.held)}"
    )
    pairs = int(host_end_G1[count - 1])
    taken = min(pairs + 1, len(pair_P))  # where any pair is not for here, one row more, which stands for those
    out_PH = _outputs(
        module,
        rows_MH.index_select(0, row_P[:taken]),
        weights_MK.reshape(-1).index_select(0, pair_P[:taken]),
        list(_parts(groups.stacks, end_G1, host_end_G1, taken)),
    )
    partial_MH = nn.functional.embedding_bag(
        place_P.clamp_(max=pairs).view(-1, top_k), out_PH, mode="sum", padding_idx=pairs if pairs < taken else None
    )
    return Grouped(
        partial_MH=partial_MH, pairs=pairs, active=int(np.count_nonzero(np.diff(host_end_G1[:count], prepend=0)))
    )


def stacks_of(held: Mapping[int, Weights], up_name: str) -> tuple[list[Stack], dict[int, int]]:
    """Experts by where they lie: stacks, and each one's group."""
    stacks: list[Stack] = []
    group_of: dict[int, int] = {}
    first = 0
    for piece in _pieces(sorted((*_place(weights, up_name), expert) for expert, weights in held.items())):
        weights, groups = held[piece.experts[0]], piece.span // piece.distance + 1
        up_GNH, down_GHI = (_repeated(weights[name], groups, piece.distance) for name in (up_name, "down_proj"))
        stacks.append(Stack(first=first, up_GNH=up_GNH, down_GHI=down_GHI))
        for offset, expert in zip(piece.offsets, piece.experts, strict=True):
            group_of[expert] = first + offset // piece.distance
        first += groups
    return stacks, group_of


@dataclass(slots=True)
class _Piece:
    """Experts in one piece of memory, ascending: bytes from the first, all multiples of ``distance`` (of a lone one: 1)."""

    memory: tuple[int, int]
    begin: int
    offsets: list[int]
    experts: list[int]
    distance: int = 1

    @property
    def span(self) -> int:
        return self.offsets[-1]


def _pieces(places: Sequence[tuple[tuple[int, int], int, int]]) -> list[_Piece]:
    """From (memory, address, expert), ascending. A piece ends where there would be too many groups between."""
    pieces: list[_Piece] = []
    for memory, address, expert in places:
        last = pieces[-1] if pieces else None
        if last is not None and last.memory == memory:
            offset = address - last.begin
            distance = math.gcd(offset, last.distance if last.span else 0)
            if offset < MOST_GROUPS * distance:
                last.distance = distance
                last.offsets.append(offset)
                last.experts.append(expert)
                continue
        pieces.append(_Piece(memory, address, [0], [expert]))
    return pieces


def _outputs(
    module: Any,
    rows_PH: torch.Tensor,
    weight_P: torch.Tensor,
    parts: Sequence[tuple[Stack, torch.Tensor, slice]],
) -> torch.Tensor:
    """Of pairs sorted by group, times their weights, shape (P, H)."""
    outputs = []
    for stack, end_G, where in parts:
        up_PN = nn.functional.grouped_mm(rows_PH[where], stack.up_GNH.transpose(1, 2), offs=end_G)
        inner_PI = module._apply_gate(up_PN) if module.has_gate else module.act_fn(up_PN)
        del up_PN
        inner_PI = inner_PI.mul_(weight_P[where, None])
        outputs.append(nn.functional.grouped_mm(inner_PI, stack.down_GHI.transpose(1, 2), offs=end_G))
    if not outputs:
        return torch.zeros_like(rows_PH)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _parts(
    stacks: Sequence[Stack], end_G1: torch.Tensor, host_end_G1: Ends, rows: int
) -> Iterator[tuple[Stack, torch.Tensor, slice]]:
    """Of each stack that has pairs: where its groups end, counted from its own first pair, and which pairs are its own."""
    bounds = [(_begin(stack, host_end_G1), int(host_end_G1[stack.end - 1])) for stack in stacks]
    used = [(stack, begin, end) for stack, (begin, end) in zip(stacks, bounds, strict=True) if end > begin]
    for stack, begin, end in used:
        own_G = end_G1[stack.first : stack.end]
        yield stack, own_G - begin if begin else own_G, slice(begin, rows if stack is used[-1][0] else end)


def _begin(stack: Stack, host_end_G1: Ends) -> int:
    return int(host_end_G1[stack.first - 1]) if stack.first else 0


def _place(weights: Weights, up_name: str) -> tuple[tuple[int, int], int]:
    """Which memory, with how far apart the two matrices lie in it, and the address of the first."""
    up, down = _matrix(weights[up_name]), _matrix(weights["down_proj"])
    address = up.data_ptr()
    return (up.untyped_storage().data_ptr(), down.data_ptr() - address), address


def _repeated(parts: tuple[torch.Tensor, ...] | Int4Weight, groups: int, distance: int) -> torch.Tensor:
    """The matrix, and ``groups`` - 1 more behind it, so many bytes apart."""
    matrix = _matrix(parts)
    step = distance // matrix.itemsize if groups > 1 else matrix.numel()
    return matrix.as_strided((groups, *matrix.shape), (step, *matrix.stride()))


def _matrix(parts: tuple[torch.Tensor, ...] | Int4Weight) -> torch.Tensor:
    assert isinstance(parts, tuple), "4-bit matrices are computed one by one"
    return parts[0]


def _is_plain(parts: tuple[torch.Tensor, ...] | Int4Weight, dtype: torch.dtype) -> bool:
    """One matrix of that type whose rows are aligned."""
    if isinstance(parts, Int4Weight) or len(parts) != 1:
        return False
    (matrix,) = parts
    return (
        matrix.dim() == 2
        and matrix.dtype == dtype
        and matrix.is_contiguous()
        and all(size * matrix.itemsize % ALIGNED_BYTES == 0 for size in matrix.shape)
        and matrix.data_ptr() % ALIGNED_BYTES == 0
    )
