"""Which experts stay: the policy in a simulated memory, against Belady's optimum and LRU."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
import pytest

from poise.plan.residency import Floats, expected_distance_LE, updated_probability_E

Key = tuple[int, int]
Pass = Sequence[Sequence[int]]
"""For every layer the experts that a pass uses."""


def policy_hits(passes: Iterable[Pass], num_layers: int, num_experts: int, capacity: int) -> tuple[list[int], set[Key]]:
    """Hits of every pass, and who is resident at the end, when the farthest expected use is evicted.

    As the store does it: residents of a layer compute first, then the others come in; what has computed is a whole
    circle away; the chance of every expert is learnt from pass to pass.
    """
    probability_LE: Floats = np.full((num_layers, num_experts), 0.5)
    resident: set[Key] = set()
    hits = []
    for each in passes:
        hits.append(0)
        for layer, used in enumerate(each):
            distance_LE = expected_distance_LE(layer - 1, probability_LE)
            here = [(layer, expert) for expert in used]
            hits[-1] += len(resident.intersection(here))
            for key in sorted(here, key=lambda key: key not in resident):
                if key not in resident and len(resident) == capacity:
                    resident.remove(max(resident, key=lambda held: (distance_LE[held], held)))
                resident.add(key)
                distance_LE[key] += num_layers
            mask_E = np.isin(np.arange(num_experts), used)
            probability_LE[layer] = updated_probability_E(probability_LE[layer], mask_E, 0.2)
    return hits, resident


def belady_hits(accesses: Sequence[Key], capacity: int) -> list[bool]:
    """Whether each access hits when the one used again last is evicted: nothing that must load what it uses does better."""
    next_use: dict[Key, int] = {}
    upcoming = [0] * len(accesses)
    for place in range(len(accesses) - 1, -1, -1):
        upcoming[place] = next_use.get(accesses[place], len(accesses))
        next_use[accesses[place]] = place
    resident: dict[Key, int] = {}
    hits = []
    for place, key in enumerate(accesses):
        hits.append(key in resident)
        if key not in resident and len(resident) == capacity:
            del resident[max(resident, key=lambda held: resident[held])]
        resident[key] = upcoming[place]
    return hits


def lru_hits(accesses: Sequence[Key], capacity: int) -> list[bool]:
    resident: OrderedDict[Key, None] = OrderedDict()
    hits = []
    for key in accesses:
        hits.append(key in resident)
        if key not in resident and len(resident) == capacity:
            resident.popitem(last=False)
        resident[key] = None
        resident.move_to_end(key)
    return hits


def scan(num_layers: int, num_experts: int, passes: int) -> tuple[list[Pass], list[Key]]:
    """Every expert of every layer in every pass: what a large batch asks for."""
    one: Pass = [range(num_experts)] * num_layers
    return [one] * passes, [
        (layer, expert) for _ in range(passes) for layer in range(num_layers) for expert in one[layer]
    ]


@pytest.mark.parametrize(("num_layers", "capacity"), [(12, 2), (12, 5), (12, 11), (40, 13)])
def test_a_circular_scan_of_one_expert_a_layer_hits_as_often_as_belady(num_layers: int, capacity: int) -> None:
    period = num_layers - 1
    passes, accesses = scan(num_layers, 1, 3 * period)
    hits, _ = policy_hits(passes, num_layers, 1, capacity)
    optimum = belady_hits(accesses, capacity)[num_layers * period : 2 * num_layers * period]
    assert sum(hits[period : 2 * period]) == sum(optimum) == num_layers * (capacity - 1)
    assert sum(lru_hits(accesses, capacity)) == 0


@pytest.mark.parametrize(("num_layers", "num_experts", "capacity"), [(6, 8, 24), (6, 8, 40), (4, 16, 20), (3, 4, 11)])
def test_a_scan_with_a_large_batch_misses_only_what_does_not_fit(
    num_layers: int, num_experts: int, capacity: int
) -> None:
    """Residents first makes N - C misses a pass possible, fewer than Belady's in a fixed order; LRU misses all N."""
    total = num_layers * num_experts
    passes, accesses = scan(num_layers, num_experts, 30)
    hits, _ = policy_hits(passes, num_layers, num_experts, capacity)
    assert hits[-10:] == [capacity] * 10
    assert sum(hits[-10:]) >= sum(belady_hits(accesses, capacity)[-10 * total :])
    assert sum(lru_hits(accesses, capacity)) == 0


def test_with_skewed_use_the_popular_experts_stay() -> None:
    """One sequence, top-2 of 16, Zipf popularity that differs from layer to layer; a quarter of the experts fit."""
    num_layers, num_experts, top_k, capacity = 6, 16, 2, 24
    random = np.random.default_rng(0)
    weights = 1.0 / np.arange(1, num_experts + 1) ** 1.5
    order_LE = np.array([random.permutation(num_experts) for _ in range(num_layers)])
    passes = [
        [
            order[random.choice(num_experts, top_k, replace=False, p=weights / weights.sum())].tolist()
            for order in order_LE
        ]
        for _ in range(400)
    ]
    hits, resident = policy_hits(passes, num_layers, num_experts, capacity)
    most_popular = {(layer, int(order[rank])) for layer, order in enumerate(order_LE) for rank in range(2)}
    assert most_popular <= resident
    accesses = [(layer, expert) for each in passes for layer, used in enumerate(each) for expert in used]
    late = len(accesses) // 2
    assert sum(hits[200:]) > 0.7 * sum(belady_hits(accesses, capacity)[late:])
    assert sum(hits[200:]) > sum(lru_hits(accesses, capacity)[late:])


def test_the_next_layer_is_nearest_and_the_layer_just_done_is_a_whole_circle_away() -> None:
    distance_LE = expected_distance_LE(1, np.ones((4, 2)))
    assert distance_LE.tolist() == [[3.0, 3.0], [4.0, 4.0], [1.0, 1.0], [2.0, 2.0]]


def test_an_expert_used_every_other_pass_is_a_circle_further_away_and_one_never_used_is_last() -> None:
    distance_LE = expected_distance_LE(0, np.array([[1.0, 0.5], [0.0, 1.0]]))
    assert distance_LE[0].tolist() == [2.0, 4.0]
    assert distance_LE[1, 0] == distance_LE.max()
    assert np.isfinite(distance_LE).all()


def test_a_habit_is_learnt_from_pass_to_pass() -> None:
    probability_E = np.array([0.5, 0.5])
    for _ in range(20):
        probability_E = updated_probability_E(probability_E, np.array([True, False]), 0.2)
    assert probability_E[0] > 0.99
    assert probability_E[1] < 0.01
