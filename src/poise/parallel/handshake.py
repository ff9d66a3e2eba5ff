"""Before ranks compute together they compare what they run: one that differs is refused, by the same message everywhere.

It goes through the store, not through collectives, so that ranks of different versions of torch can still tell each other.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import transformers
from torch.distributed.distributed_c10d import Store

from poise.errors import PoiseError, RanksError, UsageError
from poise.parallel.launch import Launch
from poise.spec.placement import Placement

logger = logging.getLogger(__name__)

REMEDIES = {
    "checkpoint": "give every rank the same MODEL",
    "lookahead": "give every rank the same file",
    "placement": "give every rank the same placement",
    "poise": "install one version on every machine",
    "torch": "install one version on every machine",
    "transformers": "install one version on every machine",
}
_POLL_S = 0.02
_CALLED_OFF, _GAVE_UP = "called off", "gave up"
"""In place of facts."""
_TELL_S = 5.0


class CalledOff(Exception):  # noqa: N818 - it is no error
    """Rank 0 has nothing to do: the others may go."""


def facts_of(fingerprint: str, placement: Placement, *, version: str, options: Mapping[str, object]) -> dict[str, str]:
    """What ranks must have in common: checkpoint, versions (``version``: of Poise), placement, the options of the run."""
    return {
        "checkpoint": fingerprint,
        "poise": version,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **{name: str(value) for name, value in options.items()},
        "placement": hashlib.sha256(json.dumps(placement.to_json()).encode()).hexdigest()[:12],
    }


def shake_hands(store: Store, rank: int, num_ranks: int, facts: Mapping[str, str], *, timeout_s: float) -> None:
    """Returns when all ranks have shown the same facts. Raises RanksError, on every rank the same one, for the lowest rank
    that differs from rank 0, cannot start or has not come within ``timeout_s``; CalledOff where rank 0 has nothing to do."""
    store.set(f"hello/{rank}", json.dumps(dict(facts)))
    deadline = time.monotonic() + timeout_s
    first: dict[str, str] = {}
    for other in range(num_ranks):
        theirs: dict[str, str] = json.loads(_await(store, f"hello/{other}", deadline, other, timeout_s))
        first = first or theirs
        if _CALLED_OFF in theirs:
            store.set(f"read/{rank}", "yes")
            raise CalledOff
        failure = theirs.get(_GAVE_UP)
        difference = _difference(first, theirs, other) if failure is None else f"rank {other} gave up: {failure}"
        if difference is not None:
            store.set(f"read/{rank}", "yes")
            if rank == 0:  # which may keep the store
                wait_for_keys(store, [f"read/{each}" for each in range(num_ranks)], timeout_s=min(timeout_s, _TELL_S))
            raise RanksError(difference, is_shared=True)


@contextmanager
def heard_by_others(launch: Launch) -> Iterator[None]:
    """What a rank does before it shakes hands: where it fails, the others hear why, instead of waiting for it.

    Raises a shared RanksError on a rank that found the same wrong with its input as rank 0 did.
    """
    try:
        yield
    except BaseException as error:
        if _tell(launch, error):
            raise RanksError(str(error), is_shared=True) from None
        raise


def call_off(launch: Launch, *, timeout_s: float) -> None:
    """On rank 0, in place of joining: tells the others, who may be starting yet, that there is nothing to do."""
    store = launch.connect(timeout_s=timeout_s)
    store.set("hello/0", json.dumps({_CALLED_OFF: "yes"}))
    wait_for_keys(store, [f"read/{other}" for other in range(1, launch.num_ranks)], timeout_s=timeout_s)


def wait_for_keys(store: Store, keys: list[str], *, timeout_s: float) -> bool:
    """Waits until all keys are set, in steps that let Ctrl-C through; False after ``timeout_s``, or if the store is gone."""
    deadline = time.monotonic() + timeout_s
    try:
        while not store.check(keys):
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
    except RuntimeError:
        return False
    return True


def _tell(launch: Launch, error: BaseException) -> bool:
    """Whether rank 0 says the same of bad input."""
    kind = "" if isinstance(error, PoiseError) else f"{type(error).__name__}: "
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    reason = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{kind}{line}"
    try:
        store = launch.connect(timeout_s=_TELL_S)
        store.set(f"hello/{launch.rank}", json.dumps({_GAVE_UP: reason}))
        is_alike = launch.rank > 0 and isinstance(error, UsageError) and _first_gave_up(store) == reason
        store.set(f"read/{launch.rank}", "yes")
        if launch.keeps_store:
            wait_for_keys(store, [f"read/{other}" for other in range(launch.num_ranks)], timeout_s=_TELL_S)
    except (RanksError, RuntimeError):
        logger.debug("the other ranks cannot be told that rank %d gives up", launch.rank)
        return False
    return is_alike


def _first_gave_up(store: Store) -> str | None:
    """What rank 0 says is wrong, if it comes to that soon; None: nothing, or not yet."""
    if not wait_for_keys(store, ["hello/0"], timeout_s=_TELL_S):
        return None
    theirs: dict[str, str] = json.loads(store.get("hello/0"))
    return theirs.get(_GAVE_UP)


def _await(store: Store, key: str, deadline: float, rank: int, timeout_s: float) -> str:
    if not wait_for_keys(store, [key], timeout_s=deadline - time.monotonic()):
        raise RanksError(
            f"rank {rank} has not joined within {timeout_s:g} s; start all ranks, on every machine", is_shared=rank > 0
        )
    value: bytes = store.get(key)
    return value.decode()


def _difference(first: Mapping[str, str], theirs: Mapping[str, str], rank: int) -> str | None:
    for name in {**first, **theirs}:
        if first.get(name) != theirs.get(name):
            remedy = REMEDIES.get(name, "give every rank the same options")
            return f"rank {rank} has {name} {theirs.get(name)}, rank 0 has {first.get(name)}; {remedy}"
    return None
