"""What is read next and who leaves for it: whatever is known and in memory, no rule of the policy is broken."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poise.plan.expert_reads import Dense, Holdings, Idle, NextRead, next_read
from poise.plan.outlook import Foreseen, Outlook
from poise.plan.residency import Floats, Key
from poise.plan.schedule import ExpertOrder, Policy, ReadAhead

ABSENT, COMING, IDLE, BUSY, WAITING = range(5)


def foreseen_of(chance_E: Floats) -> Foreseen:
    """As many tokens as are needed for the chance, if each came alone."""
    return Foreseen(chance_E=chance_E, tokens_E=-np.log1p(-np.minimum(chance_E, 0.999)))


@st.composite
def situations(draw: st.DrawFn) -> tuple[Policy, Outlook, Holdings, Key | None]:
    """A store in any state that it can be in, at any layer."""
    layers, experts = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    outlook = Outlook([experts] * layers)
    chance = st.floats(0, 1)
    outlook.enter(draw(st.integers(0, layers - 1)))
    outlook.probability_LE[:] = np.array(
        draw(st.lists(chance, min_size=layers * experts, max_size=layers * experts))
    ).reshape(layers, experts)
    outlook.enter(outlook.layer)  # distances follow the chances
    outlook.used.update(draw(st.sets(st.integers(0, experts - 1))))
    if draw(st.booleans()):
        chances = np.array(draw(st.lists(chance, min_size=experts, max_size=experts)))
        outlook.foresee(outlook.following, foreseen_of(chances))
    state = np.array(draw(st.lists(st.integers(0, 4), min_size=layers * experts, max_size=layers * experts)))
    state_LE = state.reshape(layers, experts)
    state_LE[np.arange(layers) != outlook.layer] = np.minimum(state_LE[np.arange(layers) != outlook.layer], IDLE)
    waiting = [(int(layer), int(expert)) for layer, expert in np.argwhere(state_LE == WAITING)]
    held = int((state_LE != ABSENT).sum())
    free = draw(st.integers(0, 2))
    absent_here = [(outlook.layer, int(expert)) for expert in np.flatnonzero(state_LE[outlook.layer] == ABSENT)]
    asked = draw(st.sampled_from([None, *absent_here]))
    holdings = Holdings(
        absent_LE=state_LE == ABSENT,
        idle_LE=state_LE == IDLE,
        num_slots=held + free,
        num_free=free,
        num_ahead=draw(st.integers(0, 2)),
        waiting=waiting,
    )
    policy = Policy(
        read_ahead=draw(st.sampled_from(get_args(ReadAhead))),
        order=draw(st.sampled_from(get_args(ExpertOrder))),
        ahead=draw(st.sampled_from([None, 1, 2, 8])),
    )
    return policy, outlook, holdings, asked


@given(situations())
def test_what_is_read_is_absent_and_who_leaves_is_the_farthest_that_nobody_needs(
    situation: tuple[Policy, Outlook, Holdings, Key | None],
) -> None:
    policy, outlook, holdings, asked = situation
    found = next_read(policy, outlook, holdings, asked)
    if isinstance(found, Idle):
        return
    assert holdings.absent_LE[found.key]
    assert (found.evict is None) == (holdings.num_free > 0), "a free slot is taken first"
    if found.evict is None:
        return
    if holdings.idle_LE[found.evict]:
        assert outlook.distance_LE[found.evict] == outlook.distance_LE[holdings.idle_LE].max()
    else:
        assert policy.order == "index"
        assert not found.is_ahead
        assert found.evict in holdings.waiting
        assert found.evict > found.key, "who waits gives way only to one that must compute before it"


@given(situations())
def test_demand_goes_first_and_waits_only_for_a_slot(
    situation: tuple[Policy, Outlook, Holdings, Key | None],
) -> None:
    policy, outlook, holdings, asked = situation
    found = next_read(policy, outlook, holdings, asked)
    if asked is None:
        assert isinstance(found, Idle) or found.is_ahead
    elif holdings.num_free or holdings.idle_LE.any():
        assert isinstance(found, NextRead)
        assert (found.key, found.is_ahead) == (asked, False)
    elif policy.order == "arrival":
        assert found is Idle.SLOTS_IN_USE


@given(situations())
def test_a_guess_is_what_the_policy_allows_and_displaces_only_what_is_needed_later(
    situation: tuple[Policy, Outlook, Holdings, Key | None],
) -> None:
    policy, outlook, holdings, _ = situation
    found = next_read(policy, outlook, holdings, None)
    if isinstance(found, Idle):
        return
    layer, expert = found.key
    assert policy.read_ahead != "none"
    if found.evict is not None:
        assert outlook.distance_LE[found.evict] > outlook.distance_LE[found.key]
    if policy.read_ahead != "layer":
        assert holdings.num_ahead < (policy.ahead or max(1, holdings.num_slots // 8))
    if policy.read_ahead in ("layer", "hot"):
        assert layer == outlook.following
    elif policy.read_ahead == "foreseen" and outlook.has_foresight:
        assert layer == outlook.following
        assert outlook.foreseen is not None
        assert outlook.foreseen.chance_E[expert] > 0.5
        likely_E = holdings.absent_LE[layer] & (outlook.foreseen.chance_E > 0.5)
        assert outlook.foreseen.tokens_E[expert] == outlook.foreseen.tokens_E[likely_E].max()
    else:
        assert layer != outlook.layer
        assert outlook.probability_LE[found.key] > 0.5


@given(situations(), st.integers(0, 4))
def test_dense_weights_come_behind_what_was_asked_for_and_before_what_is_only_likely(
    situation: tuple[Policy, Outlook, Holdings, Key | None], dense_for: int
) -> None:
    policy, outlook, holdings, asked = situation
    dense_for = min(dense_for, outlook.num_layers)
    alone = next_read(policy, outlook, holdings, asked)
    found = next_read(policy, outlook, holdings, asked, dense_for)
    if isinstance(alone, NextRead) and not alone.is_ahead:
        assert found == alone
    elif isinstance(alone, Idle) or dense_for % outlook.num_layers == outlook.following:
        assert found is Dense.FIRST_WAITING
    else:
        assert found == alone, "weights behind the next layer are less urgent than its experts"


def holdings_of(absent_LE: list[list[bool]], *, idle: list[Key] = [], **changes: int) -> Holdings:  # noqa: B006 - read only
    absent = np.array(absent_LE)
    idle_LE = np.zeros_like(absent)
    for key in idle:
        idle_LE[key] = True
    numbers = {"num_slots": 16, "num_free": 1, "num_ahead": 0} | changes
    return Holdings(absent_LE=absent, idle_LE=idle_LE, waiting=(), **numbers)


@pytest.mark.parametrize(
    ("policy", "want"),
    [
        (Policy(read_ahead="none"), Idle.NOT_AHEAD),
        (Policy(read_ahead="layer"), (1, 0)),
        (Policy(read_ahead="hot", ahead=2), (1, 2)),
        (Policy(read_ahead="likely"), (1, 2)),
        (Policy(read_ahead="foreseen"), (1, 1)),
        (Policy(read_ahead="foreseen", ahead=1), (1, 1)),
    ],
)
def test_what_each_policy_reads_ahead_at_the_first_of_two_layers(policy: Policy, want: Key | Idle) -> None:
    outlook = Outlook([3, 3])
    outlook.enter(0)
    outlook.used.add(0)
    outlook.probability_LE[1] = [0.1, 0.6, 0.9]
    outlook.enter(0)
    outlook.used.add(0)
    if policy.read_ahead == "foreseen":
        outlook.foresee(1, foreseen_of(np.array([0.2, 0.9, 0.3])))
    found = next_read(policy, outlook, holdings_of([[True] * 3, [True] * 3]), None)
    assert (found if isinstance(found, Idle) else found.key) == want


def test_each_reason_for_an_idle_disk_has_its_name() -> None:
    outlook = Outlook([2, 2])
    outlook.enter(0)
    outlook.used.add(0)
    absent = [[True, True], [True, True]]
    hot = Policy(read_ahead="hot", ahead=1)
    assert next_read(hot, outlook, holdings_of(absent, num_ahead=1), None) is Idle.ENOUGH_AHEAD
    assert next_read(hot, outlook, holdings_of([[True, True], [False, False]]), None) is Idle.ALL_THERE
    assert next_read(hot, outlook, holdings_of(absent, num_free=0), (0, 1)) is Idle.SLOTS_IN_USE
    assert next_read(Policy(read_ahead="likely"), outlook, holdings_of(absent), None) is Idle.UNLIKELY
    outlook.foresee(1, foreseen_of(np.array([0.9, 0.1])))
    foreseen = Policy()
    near = holdings_of([[True, True], [True, False]], idle=[(1, 1)], num_free=0)
    outlook.distance_LE[1] = [5.0, 1.0]
    assert next_read(foreseen, outlook, near, None) is Idle.NEEDED_SOONER
    outlook.enter(1)
    assert next_read(foreseen, outlook, holdings_of(absent), None) is Idle.NOT_FORESEEN
