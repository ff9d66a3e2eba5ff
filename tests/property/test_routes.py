"""Routes and changes of placement, for any choices and placements."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.parallel.changes import changes_between, ranks_of
from poise.parallel.routes import Copies, route
from poise.spec.placement import Placement
from tests.route_cases import assert_follows


@st.composite
def placements(draw: st.DrawFn, count: int = 1) -> tuple[Placement, ...]:
    ranks, num_experts = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    per_rank = -(-num_experts // ranks) + draw(st.integers(0, 2))
    made = []
    for _ in range(count):
        rows = []
        for _ in range(2):
            more = draw(
                st.lists(st.integers(0, num_experts - 1), min_size=(n := ranks * per_rank - num_experts), max_size=n)
            )
            rows.append(draw(st.permutations([*range(num_experts), *more])))
        slots_LS = np.array(rows, dtype=np.int32)
        made.append(Placement(slot_to_expert_LS=slots_LS, layers=(3, 5), num_experts=num_experts, ranks=ranks))
    return tuple(made)


@settings(deadline=None)  # loops are compiled once
@given(placements(), st.integers(0, 20), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_every_choice_is_computed_once_by_a_rank_that_has_the_expert(
    placed: tuple[Placement], tokens: int, top_k: int, seed: int
) -> None:
    (placement,) = placed
    generator = torch.Generator().manual_seed(seed)
    num_experts, ranks = placement.num_experts, placement.ranks
    top_k = min(top_k, num_experts)
    choice_TK = (
        torch.stack([torch.randperm(num_experts + 1, generator=generator)[:top_k] for _ in range(tokens)])
        if tokens
        else torch.empty(0, top_k, dtype=torch.int64)
    )
    row_S = placement.slot_to_expert_LS[0]
    copies = Copies.of(row_S, num_experts=num_experts, num_ranks=ranks)
    routes = route(choice_TK, copies, source_rank=seed % ranks)
    held = ranks_of(row_S, ranks)
    copies_E = [[rank for rank in range(ranks) if expert in held[rank]] for expert in range(num_experts)]
    assert_follows(routes, choice_TK, lambda expert, i: copies_E[expert][(seed % ranks + i) % len(copies_E[expert])])
    computed: list[tuple[int, int]] = []
    loads = np.zeros((num_experts, ranks), dtype=int)
    begin = 0
    for rank, rows in enumerate(routes.sent_R):
        tokens_here = routes.token_N[begin : begin + rows].tolist()
        assert tokens_here == sorted(set(tokens_here)), "a token travels once to a rank"
        for token, experts in zip(tokens_here, routes.experts_NK[begin : begin + rows].tolist(), strict=True):
            wanted = [expert for expert in experts if expert < num_experts]
            assert wanted, "a row that nobody asked for"
            assert set(wanted) <= held[rank]
            computed += [(token, expert) for expert in wanted]
            loads[wanted, rank] += 1
        begin += rows
    real = [(token, e) for token, row in enumerate(choice_TK.tolist()) for e in row if e < num_experts]
    assert sorted(computed) == sorted(real)
    for expert in range(num_experts):
        shares = [loads[expert, rank] for rank in range(ranks) if expert in held[rank]]
        assert max(shares) - min(shares) <= 1, "copies share evenly"


@given(placements(count=2))
def test_changes_bring_each_rank_what_it_lacks_from_one_that_has_it(pair: tuple[Placement, Placement]) -> None:
    before, after = pair
    changes = changes_between(before, after)
    rows_LS = before.slot_to_expert_LS.copy()
    for change in changes:
        old_R = ranks_of(rows_LS[change.layer], before.ranks)
        new_R = ranks_of(change.slot_to_expert_S, before.ranks)
        got = [(arrival.to_rank, arrival.expert) for arrival in change.arrivals]
        assert sorted(got) == sorted((r, e) for r in range(before.ranks) for e in new_R[r] - old_R[r])
        for arrival in change.arrivals:
            assert arrival.expert in old_R[arrival.from_rank]
        rows_LS[change.layer] = change.slot_to_expert_S
    assert np.array_equal(rows_LS, after.slot_to_expert_LS)
