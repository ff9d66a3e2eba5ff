"""A layer's placement while it is worked on, and what its ranks take: the state of the planner's compiled loops.

Named tuples of arrays, because numba knows no dataclasses. Letters: E experts, S slots, R ranks, B distinct curves, A nodes of
active experts, N nodes of tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from poise.plan.compiled import borrowing, compiled
from poise.plan.expert_loads import Floats, Ints

PER_OCTAVE = 32
"""Nodes of a cost table in each octave of tokens."""
_FRACTION_BITS, _FRACTION, _BIAS, _ONE = 52, (1 << 52) - 1, 1023, 1023 << 52
"""Of a float of 64 bits: its fraction, what is added to the exponent, and the number 1."""


class CostTable(NamedTuple):
    """``seconds_BAN`` at speed 1; node 0 is at 2^first_octave tokens; ``per_active`` nodes for each active expert."""

    seconds_BAN: Floats
    first_octave: int
    per_active: float
    curve_R: Ints
    slowness_R: Floats


class Limits(NamedTuple):
    """``most_alike``: copies of one expert on one rank. Nodes are consecutive ranks; an expert stays within its node."""

    slots_per_rank: int
    ranks_per_node: int
    most_alike: int


class Layer(NamedTuple):
    """A layer's placement while it is worked on. ``holds_ER``: copies of each expert on each rank.

    ``each_E``, ``share_E``: tokens of one copy of each expert, and the share of the steps in which these make it active.
    """

    load_E: Floats
    node_E: Ints
    copies_E: Ints
    each_E: Floats
    share_E: Floats
    slot_S: Ints
    filled_R: Ints
    tokens_R: Floats
    active_R: Floats
    seconds_R: Floats
    holds_ER: npt.NDArray[np.int16]


@compiled
def active_of(tokens: float) -> float:
    """Share of the steps in which a slot with these mean tokens gets any."""
    return -math.expm1(-tokens)


@borrowing
def rank_s(table: CostTable, rank: int, tokens: float, active: float) -> float:
    """Time of a rank, linear between the nodes of the table."""
    if tokens <= 0.0:
        return 0.0
    seconds_AN = table.seconds_BAN[table.curve_R[rank]]
    bits = np.float64(tokens).view(np.int64)  # as math.frexp, which is a call that takes 20 times as long
    mantissa = np.int64((bits & _FRACTION) | _ONE).view(np.float64)
    place = (mantissa + ((bits >> _FRACTION_BITS) - _BIAS - 1 - table.first_octave)) * PER_OCTAVE
    column, across = 0, 0.0
    if place > 0.0:
        column = min(int(place), seconds_AN.shape[1] - 2)
        across = place - column
    height = active * table.per_active
    row = min(int(height), seconds_AN.shape[0] - 2)
    low = seconds_AN[row, column] + across * (seconds_AN[row, column + 1] - seconds_AN[row, column])
    high = seconds_AN[row + 1, column] + across * (seconds_AN[row + 1, column + 1] - seconds_AN[row + 1, column])
    return float(table.slowness_R[rank] * (low + (height - row) * (high - low)))


@compiled
def empty_layer(load_E: Floats, node_E: Ints, copies_E: Ints, num_ranks: int, num_slots: int) -> Layer:
    """A layer without a placement."""
    each_E = load_E / copies_E
    return Layer(
        load_E,
        node_E,
        copies_E,
        each_E,
        -np.expm1(-each_E),
        np.full(num_slots, -1, dtype=np.int64),
        np.zeros(num_ranks, dtype=np.int64),
        np.zeros(num_ranks),
        np.zeros(num_ranks),
        np.zeros(num_ranks),
        np.zeros((len(load_E), num_ranks), dtype=np.int16),
    )


@compiled
def placed_layer(load_E: Floats, node_E: Ints, slot_S: Ints, table: CostTable, limits: Limits) -> Layer:
    """A layer with a placement."""
    copies_E = np.zeros(len(load_E), dtype=np.int64)
    for expert in slot_S:
        copies_E[expert] += 1
    layer = empty_layer(load_E, node_E, copies_E, len(table.curve_R), len(slot_S))
    for slot, expert in enumerate(slot_S):
        append(layer, table, limits, slot // limits.slots_per_rank, expert)
    return layer


@compiled
def append(layer: Layer, table: CostTable, limits: Limits, rank: int, expert: int) -> None:
    layer.slot_S[rank * limits.slots_per_rank + layer.filled_R[rank]] = expert
    layer.filled_R[rank] += 1
    layer.holds_ER[expert, rank] += 1
    layer.tokens_R[rank] += layer.each_E[expert]
    layer.active_R[rank] += layer.share_E[expert]
    layer.seconds_R[rank] = rank_s(table, rank, layer.tokens_R[rank], layer.active_R[rank])
