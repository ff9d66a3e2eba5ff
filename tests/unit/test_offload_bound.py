"""The limit of a pass: fewest reads against all policies in small cases, memory that is taken, compute at product rate."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from poise.bench.offload.bound import PassWork, Sizes, fewest_reads, pass_limits


def brute_force(used_NLE: np.ndarray[Any, Any], capacity: int) -> int:
    """The fewest reads of all choices of what stays after each layer."""
    states: dict[frozenset[tuple[int, int]], int] = {frozenset(): 0}
    for used_LE in used_NLE:
        for layer, used_E in enumerate(used_LE):
            wanted = {(layer, int(expert)) for expert in np.flatnonzero(used_E)}
            after: dict[frozenset[tuple[int, int]], int] = {}
            for held, reads in states.items():
                union = held | wanted
                total = reads + len(wanted - held)
                for kept in itertools.combinations(sorted(union), min(capacity, len(union))):
                    key = frozenset(kept)
                    after[key] = min(after.get(key, total), total)
            states = after
    return min(states.values())


@pytest.mark.parametrize("seed", range(6))
def test_no_policy_reads_fewer(seed: int) -> None:
    random = np.random.default_rng(seed)
    used_NLE = random.random((4, 2, 4)) < 0.5
    for capacity in (1, 2, 3, 5):
        reads_N = fewest_reads(used_NLE, [capacity] * 4)
        assert reads_N.sum() == brute_force(used_NLE, capacity)


def test_a_scan_of_everything_reads_all_but_what_fits() -> None:
    reads_N = fewest_reads(np.ones((3, 4, 8), dtype=bool), [10] * 3)
    assert reads_N.tolist() == [32, 22, 22]


def test_memory_that_shrinks_holds_less() -> None:
    everything = np.ones((3, 2, 4), dtype=bool)
    assert fewest_reads(everything, [8, 8, 8]).tolist() == [8, 0, 0]
    assert fewest_reads(everything, [8, 2, 2]).tolist() == [8, 6, 6]


class Products:
    """A second per token and expert, ten for a layer's token, a hundred for the logits of one."""

    def expert_s(self, tokens: Any) -> Any:
        return tokens * 1.0

    def layer_s(self, tokens: Any) -> Any:
        return tokens * 10.0

    def head_s(self, tokens: Any) -> Any:
        return tokens * 100.0


SIZES = Sizes(
    room_bytes=1000, expert_bytes=100, dense_bytes=300, cache_bytes_per_token=10, activation_bytes_per_token=5
)


def work(counts: list[list[int]], *, tokens: int = 2, logits: int = 0, cached: int = 0) -> PassWork:
    return PassWork(counts_LE=np.array(counts), tokens=tokens, logits=logits, cached_tokens=cached)


def test_experts_get_the_memory_that_dense_weights_caches_and_activations_leave() -> None:
    (limit,) = pass_limits([work([[1] * 8], cached=9)], SIZES, Products(), read_bytes_per_s=100.0)
    assert limit.resident == 6, "1000 - 300 - 9 x 10 - 2 x 5 = 600"
    assert limit.fewest_bytes == 800, "memory is empty at first"
    assert limit.disk_s == pytest.approx(8.0)


def test_what_does_not_fit_beside_the_experts_must_stream() -> None:
    (limit,) = pass_limits([work([[0, 1]], cached=80)], SIZES, Products(), read_bytes_per_s=100.0)
    assert limit.resident == 1
    assert limit.fewest_bytes == 100 + (300 + 800 + 10 - 1000)


def test_compute_counts_every_expert_at_its_own_tokens_and_the_larger_side_is_the_limit() -> None:
    (limit,) = pass_limits([work([[3, 1], [2, 2]], logits=1)], SIZES, Products(), read_bytes_per_s=100.0)
    assert limit.compute_s == pytest.approx(8.0 + 2 * 20.0 + 100.0)
    assert limit.seconds == limit.compute_s
    assert limit.disk_s == pytest.approx(4.0)
