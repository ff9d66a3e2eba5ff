"""Every error a user can cause.

    PoiseError
    ├── UsageError          bad input: one line says the value, what is allowed, the remedy; exit code 2
    │   ├── CheckpointError     the model directory or a file in it
    │   ├── PromptError         a prompt or a prompt file
    │   ├── MachineError        a description of a machine, or what it does not describe
    │   ├── TraceError          a file of recorded routing: a trace, an engine's statistics, a correlation table
    │   ├── PlacementError      a placement of experts or its file, or what one is asked of: loads, ranks, slots, groups
    │   ├── RanksError          ranks of one job that do not meet, or do not run the same thing
    │   └── BudgetError         the memory budget; carries the smallest that works
    ├── RankLostError       a rank of the job died, stalled or gave up: all ranks end
    └── ReadError           the disk failed while weights were being read

Our own invariants are ``assert`` with a message, not exceptions of this tree.
"""

from __future__ import annotations


class PoiseError(Exception):
    """Base of all errors that Poise raises on purpose."""


class UsageError(PoiseError):
    """Bad input. The message is one line: what was given, what is allowed, what to do."""


class CheckpointError(UsageError):
    """A checkpoint that is missing, damaged, or of a kind that Poise does not run."""


class PromptError(UsageError):
    """A prompt, or a line of a prompt file, that cannot be used.

    ``index`` is its place among the prompts of the call (from 0) where the error is about one of them; ``reason`` is the
    message without the place.
    """

    def __init__(self, reason: str, *, index: int | None = None) -> None:
        super().__init__(reason if index is None else f"prompt {index}: {reason}")
        self.reason = reason
        self.index = index


class MachineError(UsageError):
    """A machine file that is damaged, or a machine that lacks the device, link, tier or curve asked for."""


class TraceError(UsageError):
    """A file of recorded routing that is missing, damaged, of another version, or of another model."""


class PlacementError(UsageError):
    """Loads, slots, groups, or a placement of experts that do not go together, or a placement file that is damaged."""


class RanksError(UsageError):
    """Ranks that were not started as one job, do not meet, or differ in checkpoint, versions, placement or options.

    ``is_shared``: rank 0 raises the same one and alone need print it, as where ranks differ.
    """

    def __init__(self, message: str, *, is_shared: bool = False) -> None:
        super().__init__(message)
        self.is_shared = is_shared


class BudgetError(UsageError):
    """A memory budget in which the job does not fit. ``smallest_bytes`` is the smallest that works."""

    def __init__(self, message: str, *, smallest_bytes: int) -> None:
        super().__init__(message)
        self.smallest_bytes = smallest_bytes


class RankLostError(PoiseError):
    """A rank died, stalled, gave up or was told to end. The same message on all ranks; ``is_speaker``: this rank is the one to
    print it. ``was_told_to_end``: by SIGTERM, while no rank was lost."""

    def __init__(self, message: str, *, is_speaker: bool, was_told_to_end: bool = False) -> None:
        super().__init__(message)
        self.is_speaker = is_speaker
        self.was_told_to_end = was_told_to_end


class ReadError(PoiseError):
    """Reading weights failed after the checkpoint had been checked."""
