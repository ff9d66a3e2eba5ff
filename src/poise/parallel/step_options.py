"""How steps are balanced: one frozen object, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from poise.errors import UsageError
from poise.plan.balance import MOST_WORK

PREDICTORS = ("gate", "last", "none", "replayed")
AHEAD = ("auto", "inline", "thread")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOptions:
    """``predictor``: of the counts of the layer to come: its router asked a layer early ("gate"; with ``lookahead``, a file of
    `poise distill`, as it was trained); as in the last pass ("last"); not at all: replicas are fetched behind the router, and
    waited for ("none"); from ``replay``, a file of counts for each rank that an earlier run kept ("replayed", for
    measurements). ``online``: the first kind goes on learning from each rank's own tokens; without a file
    it begins with nothing but the routers. ``ahead``: predicts and plans on the computing thread ("inline"), or on one beside
    it ("thread"), which learns while nothing is to be predicted; "auto": on one beside it where all ranks have a core to spare.

    ``replica_slots``: on each rank, twice. ``suspends``: no chunk is asked for while tokens travel. ``chunk_bytes``: of a
    replica at a time; None: what a link carries in ``engine.stepwise.CHUNK_S``. ``most_work``: as the planner has it.
    ``copy_engines``: the threads that move replicas take no processor time from experts; on GPUs none do anyway.
    ``rests``: passes run as without balancing while that costs more than it brings (``plan.step_rest``).
    """

    predictor: str = "gate"
    lookahead: Path | None = None
    online: bool = False
    replay: Path | None = None
    replica_slots: int = 3
    suspends: bool = True
    chunk_bytes: int | None = None
    most_work: int = MOST_WORK
    copy_engines: bool = False
    rests: bool = True
    ahead: str = "auto"

    def __post_init__(self) -> None:
        if self.predictor not in PREDICTORS:
            raise UsageError(f"predictor {self.predictor!r} is not known; choose one of {', '.join(PREDICTORS)}")
        if self.ahead not in AHEAD:
            raise UsageError(f"steps are planned {self.ahead!r}; choose one of {', '.join(AHEAD)}")
        if not 0 <= self.replica_slots <= 16:
            raise UsageError(f"replica slots are {self.replica_slots}; give 0 to 16")
        if self.chunk_bytes is not None and self.chunk_bytes < 1:
            raise UsageError(f"chunks are {self.chunk_bytes} bytes; give 1 or more")
        if self.online and self.predictor != "gate":
            raise UsageError(f"predictor {self.predictor!r} has nothing that could learn online; choose 'gate'")
        if (self.replay is not None) != (self.predictor == "replayed"):
            raise UsageError("counts to replay go with predictor 'replayed', and only with it")
