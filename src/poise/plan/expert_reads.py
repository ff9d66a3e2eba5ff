"""What is read next, and which expert leaves memory for it. Pure functions: what is known goes in, one read comes out.

The order is that of need. Experts that were asked for come first, in the order in which routers asked, or by number. Then the
dense weights on the way to the layer that follows, where these stream; then, as the policy says, experts of that layer that
nobody has asked for, which never displace one whose next use is nearer; then dense weights behind it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum, StrEnum

import numpy as np
import numpy.typing as npt

from poise.plan.outlook import Outlook
from poise.plan.residency import Key
from poise.plan.schedule import Policy

PREFETCH_PROBABILITY = 0.5
"""An expert is fetched unasked only when a pass is more likely than not to use it."""
MAX_AHEAD_FRAC = 1 / 8
"""Reading far ahead would turn slots that save a read in every pass into a buffer: not more of them than this."""

Bools = npt.NDArray[np.bool_]


class Idle(StrEnum):
    """Why nothing is read: the name of the disk's bubble."""

    SLOTS_IN_USE = "every slot is in use"
    NOT_AHEAD = "nothing is read ahead"
    ALL_THERE = "all that may be read ahead is there"
    ENOUGH_AHEAD = "as much is read ahead as planned"
    NOT_FORESEEN = "routers have not spoken, so nothing is foreseen"
    UNLIKELY = "nothing absent is likely to be used"
    NEEDED_SOONER = "what is in memory is needed sooner"
    CLOSED = "closed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Holdings:
    """What is in memory. ``absent_LE``: neither there nor coming; ``idle_LE``: there, and nobody waits for it or uses it.

    ``num_ahead``: experts there or coming that were not asked for and have not been used since. ``waiting``: experts
    that were asked for and are there, but have not begun to compute.
    """

    absent_LE: Bools
    idle_LE: Bools
    num_slots: int
    num_free: int
    num_ahead: int
    waiting: Collection[Key]


class Dense(Enum):
    """Not an expert but dense weights are read next."""

    FIRST_WAITING = "the first piece of dense weights that waits"


@dataclass(frozen=True, kw_only=True, slots=True)
class NextRead:
    """``evict``: who leaves memory for it; None: a slot is free."""

    key: Key
    evict: Key | None
    is_ahead: bool


def next_read(
    policy: Policy, outlook: Outlook, holdings: Holdings, asked: Key | None, dense_for: int | None = None
) -> NextRead | Dense | Idle:
    """``asked``: the first expert that was asked for and is absent; ``dense_for``: the MoE layer that the first dense weights
    that wait lead to, or the number of layers behind the last. None: there is none."""
    found = Idle.NOT_AHEAD if asked is None else _read_asked(policy, outlook, holdings, asked)
    if isinstance(found, NextRead):
        return found
    if dense_for is not None and dense_for % outlook.num_layers == outlook.following:
        return Dense.FIRST_WAITING
    if asked is None:
        found = _read_ahead(policy, outlook, holdings)
    return Dense.FIRST_WAITING if isinstance(found, Idle) and dense_for is not None else found


def _read_asked(policy: Policy, outlook: Outlook, holdings: Holdings, asked: Key) -> NextRead | Idle:
    if holdings.num_free:
        return NextRead(key=asked, evict=None, is_ahead=False)
    evict = _farthest(outlook, holdings) or (_last_waiting(holdings, asked) if policy.order == "index" else None)
    return Idle.SLOTS_IN_USE if evict is None else NextRead(key=asked, evict=evict, is_ahead=False)


def _read_ahead(policy: Policy, outlook: Outlook, holdings: Holdings) -> NextRead | Idle:
    key = next_ahead(policy, outlook, holdings)
    if isinstance(key, Idle) or holdings.num_free:
        return key if isinstance(key, Idle) else NextRead(key=key, evict=None, is_ahead=True)
    evict = _farthest(outlook, holdings)
    if evict is None or outlook.distance_LE[evict] < outlook.distance_LE[key] + 1.0:
        return Idle.NEEDED_SOONER
    return NextRead(key=key, evict=evict, is_ahead=True)


def next_ahead(policy: Policy, outlook: Outlook, holdings: Holdings) -> Key | Idle:
    """The absent expert to read unasked: of those that the policy allows, the hottest if foreseen, else the nearest."""
    if policy.read_ahead == "none" or (policy.read_ahead == "layer" and outlook.following == outlook.layer):
        return Idle.NOT_AHEAD
    if policy.read_ahead == "layer":
        absent = np.flatnonzero(holdings.absent_LE[outlook.following])
        return (outlook.following, int(absent[0])) if len(absent) else Idle.ALL_THERE
    if holdings.num_ahead >= (policy.ahead or max(1, int(holdings.num_slots * MAX_AHEAD_FRAC))):
        return Idle.ENOUGH_AHEAD
    if policy.read_ahead == "likely" or (policy.read_ahead == "foreseen" and not outlook.has_foresight):
        allowed_LE = holdings.absent_LE & (outlook.probability_LE > PREFETCH_PROBABILITY)
        allowed_LE[outlook.layer] = False
        nearest = int(np.where(allowed_LE, outlook.distance_LE, np.inf).argmin())
        key = divmod(nearest, allowed_LE.shape[1])
        return key if allowed_LE[key] else Idle.UNLIKELY
    allowed_E = holdings.absent_LE[outlook.following]
    if policy.read_ahead == "foreseen":
        if outlook.foreseen is None:
            return Idle.NOT_FORESEEN
        allowed_E = allowed_E & (outlook.foreseen.chance_E > PREFETCH_PROBABILITY)
    # With many tokens all chances are 1: the hottest is the one to have first, as its compute hides most reads.
    far_E = outlook.distance_LE[outlook.following] if outlook.foreseen is None else -outlook.foreseen.tokens_E
    nearest = int(np.where(allowed_E, far_E, np.inf).argmin())
    if allowed_E[nearest]:
        return outlook.following, nearest
    return Idle.ALL_THERE if policy.read_ahead == "hot" else Idle.UNLIKELY


def _farthest(outlook: Outlook, holdings: Holdings) -> Key | None:
    """The idle expert whose next use is farthest off."""
    farthest = int((outlook.distance_LE * holdings.idle_LE).argmax())
    key = divmod(farthest, holdings.idle_LE.shape[1])
    return key if holdings.idle_LE[key] else None


def _last_waiting(holdings: Holdings, asked: Key) -> Key | None:
    """By number, an expert that waits in memory for lower ones may hold the slot that those need: it is read again."""
    last = max(holdings.waiting, default=None)
    return last if last is not None and last > asked else None
