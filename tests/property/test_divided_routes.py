"""A step that was balanced: choices are computed once, where the experts are, and no rank is sent more rows than it expects."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.parallel.routes import Routes, route_by
from poise.parallel.step_planner import Links, StepPlanner
from poise.plan.balance_assignment import Dispatch
from tests.balance_cases import EXPERT_BYTES, LINK, TOKEN_BYTES, costs_of
from tests.route_cases import assert_follows


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """``choices``: (T, K) of each rank; E: none. ``homes_S``: with or without redundant slots. ``came_N3``: replicas."""

    choices: list[torch.Tensor]
    homes_S: np.ndarray
    came_N3: np.ndarray
    speed_R: np.ndarray
    frac_2R: np.ndarray
    num_experts: int

    @property
    def num_ranks(self) -> int:
        return len(self.choices)

    @property
    def counts_RE(self) -> np.ndarray:
        width = self.num_experts + 1
        return np.stack([np.bincount(each.flatten(), minlength=width) for each in self.choices])[:, :-1]

    @property
    def holds_RE(self) -> np.ndarray:
        """Homes and replicas."""
        holds_RE = (self.homes_S.reshape(self.num_ranks, -1, 1) == np.arange(self.num_experts)).any(axis=1)
        holds_RE[self.came_N3[:, 2], self.came_N3[:, 0]] = True
        return holds_RE


@st.composite
def steps(draw: st.DrawFn) -> Step:
    ranks, per_rank = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    experts, slots = ranks * per_rank, draw(st.integers(0, 3))
    rng = np.random.default_rng(draw(st.integers(0, 100_000)))
    homes_RS = rng.permutation(experts).reshape(ranks, per_rank)
    if draw(st.booleans()):
        homes_RS = np.hstack([homes_RS, rng.integers(0, experts, (ranks, 1))])  # maybe of its own experts once more
    came = [
        (expert, int(rng.choice(np.flatnonzero((homes_RS == expert).any(axis=1)))), target)
        for target in range(ranks)
        for expert in rng.permutation(np.setdiff1d(np.arange(experts), homes_RS[target]))[:slots].tolist()
        if rng.random() < 0.7
    ]
    tokens_R = rng.integers(0, draw(st.sampled_from([3, 12, 60])), ranks) * (rng.random(ranks) < 0.8)
    share_E = rng.permutation(1.0 / np.arange(1, experts + 1) ** draw(st.sampled_from([0.0, 2.0])))
    padded_E1 = np.append(share_E / share_E.sum(), draw(st.sampled_from([0.0, 0.3])))
    top_k = draw(st.integers(1, 3))  # drawn apart, so that a token may choose an expert twice
    choices = [rng.choice(experts + 1, (tokens, top_k), p=padded_E1 / padded_E1.sum()) for tokens in tokens_R]
    return Step(
        choices=[torch.from_numpy(each) for each in choices],
        homes_S=homes_RS.ravel(),
        came_N3=np.array(came, dtype=np.int64).reshape(-1, 3),
        speed_R=rng.choice([0.3, 1.0], ranks),
        frac_2R=rng.uniform(0.3, 1.0, (2, ranks)),
        num_experts=experts,
    )


def pieces(routes: Routes) -> list[tuple[list[int], list[list[int]]]]:
    """By rank: tokens that go there, and the experts that each wants there."""
    experts = torch.split(routes.experts_NK, list(routes.sent_R))
    tokens = torch.split(routes.token_N, list(routes.sent_R))
    wanted = [[[e for e in row if e < routes.num_experts] for row in each.tolist()] for each in experts]
    return list(zip([each.tolist() for each in tokens], wanted, strict=True))


def first_copy(dispatch: Dispatch, expert: int, i: int) -> int:
    """Of those that are to have more than ``i`` of the tokens; else the last."""
    copies = dispatch.rank_EC[expert][dispatch.until_EC[expert] > i]
    return int(copies[0] if len(copies) else dispatch.rank_EC[expert, -1])


@settings(deadline=None, max_examples=120)
@given(steps())
def test_divided_tokens_reach_copies_and_no_more_rows_than_expected_come(step: Step) -> None:
    ranks, counts_RE = step.num_ranks, step.counts_RE
    links = Links(bytes_per_s_R=np.full(ranks, LINK), token_bytes=round(TOKEN_BYTES), expert_bytes=round(EXPERT_BYTES))
    planner = StepPlanner(
        step.homes_S[None],
        links,
        num_experts=step.num_experts,
        replica_slots=3,
        most_work=500,
        costs=costs_of(step.speed_R, expert_s=1e-9),
    )
    divided = [planner.dispatch(0, counts_RE, step.came_N3, *step.frac_2R, rank=rank) for rank in range(ranks)]
    if not len(step.came_N3) and not planner.has_choice(0):
        assert divided == [None] * ranks
        return
    routes, most_RR = [], []
    for choice_TK, made in zip(step.choices, divided, strict=True):
        assert made is not None
        routes.append(route_by(choice_TK, made[0], num_ranks=ranks))
        assert_follows(routes[-1], choice_TK, partial(first_copy, made[0]))
        most_RR.append(made[1])
    for source, (choice_TK, own) in enumerate(zip(step.choices, routes, strict=True)):
        computed = []
        for target, (tokens, wanted) in enumerate(pieces(own)):
            assert len(tokens) <= min(most_RR[target][source], len(choice_TK)), "more rows than the receiver expects"
            assert sum(map(len, wanted)) == most_RR[target][source], "it expects as many pairs as come"
            assert tokens == sorted(set(tokens)), "a token travels once to a rank"
            assert all(wanted), "a row that nobody asked for"
            assert step.holds_RE[target][[e for row in wanted for e in row]].all(), "the expert is not there"
            computed += [(token, e) for token, row in zip(tokens, wanted, strict=True) for e in row]
        chosen = [(token, e) for token, row in enumerate(choice_TK.tolist()) for e in row if e < step.num_experts]
        assert sorted(computed) == sorted(chosen)
