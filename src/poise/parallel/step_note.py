"""What balancing did for one layer on one rank, and what travelled there: numbers for records and for the next plan."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class StepNote:
    """What balancing did for one layer on one rank; seconds and bytes are its own.

    ``home_pairs``: (token, expert) pairs that it would have computed with its experts at home alone. ``own_pairs``: of its own
    tokens, where these were predicted or nobody predicts, of which ``guessed_wrong`` were predicted for other experts.
    ``replicas_planned`` for it, of which ``replicas_used`` came in time; ``replica_bytes`` came in all. ``declined``: 1 where
    nothing paid; ``late``: 1 where no plan was there in time. ``told_s``: to tell and hear counts and, behind the router, to
    get replicas. ``counts_s``: what of waiting would not be without balancing: messages beyond the one that there is anyway,
    replicas that are waited for. ``balance_s``: predicting, planning and dividing on the computing thread (planning while rows
    travel); ``aux_s``: processor time of the auxiliary threads. ``rested``: 1 where it rested, in this layer
    (``plan.step_looks``) or as a whole.
    ``learnt_steps``, ``learnt_s``, ``learnt_late``: what the predictor did since the layer before (``parallel.learning``).
    """

    home_pairs: float = 0.0
    own_pairs: int = 0
    guessed_wrong: int = 0
    replicas_planned: int = 0
    replicas_used: int = 0
    replica_bytes: int = 0
    declined: int = 0
    late: int = 0
    counts_s: float = 0.0
    balance_s: float = 0.0
    aux_s: float = 0.0
    told_s: float = 0.0
    rested: int = 0
    learnt_steps: int = 0
    learnt_s: float = 0.0
    learnt_late: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Travel:
    """Rows, and (token, expert) pairs in them, that went to other ranks and came from them."""

    rows_out: int
    pairs_out: int
    rows_in: int
    pairs_in: int

    @property
    def permille(self) -> tuple[int, int]:
        """Rows over pairs, in and out; as many where none travel."""
        return (
            round(1000 * self.rows_in / self.pairs_in) if self.pairs_in else 1000,
            round(1000 * self.rows_out / self.pairs_out) if self.pairs_out else 1000,
        )
