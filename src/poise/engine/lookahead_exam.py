"""Examines predictors of routing on text that they have not learnt from, layer by layer, against simpler guesses.

``frozen``: each layer's own router asked a layer early; ``distilled``: with what it has learnt; ``correlation``: the table of
which experts follow which; ``frequency``: the experts chosen most. Counts are of steps of a simulated expert-parallel group: on
each rank, tokens drawn from its part of the text. What is left of imbalance: the most tokens of a rank when replicas were
chosen by predicted counts, over the same when they were chosen by the true ones; both times the router's tokens are divided.
Letters: T tokens, K choices, R ranks, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from poise.cost.experts import ExpertCurve
from poise.engine.routing import Ints
from poise.model.lookahead import Lookahead
from poise.model.lookahead_training import own_copy
from poise.plan.balance import Balancer
from poise.plan.rank_costs import RankCosts
from poise.predict.correlation import CorrelationTable
from poise.predict.lookahead_quality import counts_of, misplaced_frac, recall, top_of

RANKS = (8, 4, 2)
"""The first that divides the experts."""
RANK_TOKENS = 64
STEPS = 48
TOKEN_S = 1e-6
"""Of an assignment; links are so fast that slots alone limit replicas: what is left is the prediction's doing."""
FREE_LINK = 1e18
SCORED_TOKENS = 512
"""Tokens whose chances are worked out at once."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerMarks:
    """One MoE layer's marks, by predictor. ``recall``: of a token's true experts; ``misplaced_frac``: of a step's assignments.

    ``imbalance``: most tokens of a rank over the mean, without replicas; ``balanced``: planned on true counts; ``left``: what
    it is when planned on predicted counts, over ``balanced``.
    """

    layer: int
    recall: Mapping[str, float]
    misplaced_frac: Mapping[str, float]
    imbalance: float
    balanced: float
    left: Mapping[str, float]


class Examiner:
    """A seam listener that takes down what is predicted and what comes, until ``marks``. Nothing learns."""

    def __init__(self, lookahead: Lookahead, *, table: CorrelationTable | None = None) -> None:
        self._lookahead = lookahead
        self._table = table
        self._before_TH: torch.Tensor | None = None
        layers = range(len(lookahead.experts_L))
        self._true_L: list[list[Ints]] = [[] for _ in layers]
        self._named_L: list[dict[str, list[Ints]]] = [{} for _ in layers]

    def on_seam(self, layer: int, hidden_TH: torch.Tensor, chosen_TK: Ints) -> None:
        """See ``engine.routing``."""
        self._true_L[layer].append(chosen_TK)
        if layer and self._lookahead.predicts(layer):
            assert self._before_TH is not None, "a layer after another"
            named = {"frozen": self._lookahead.own_choices_TK(layer, self._before_TH)}
            if self._lookahead.width is not None:
                named["distilled"] = self._lookahead.choices_TK(layer, self._before_TH)
            for name, each_TK in named.items():
                self._named_L[layer].setdefault(name, []).append(each_TK.numpy(force=True))
        self._before_TH = own_copy(hidden_TH)

    @property
    def tokens(self) -> int:
        """Seen so far."""
        return sum(map(len, self._true_L[-1]))

    def recalls(self, name: str) -> dict[int, float]:
        """Of one predictor of experts, by the layers that it predicts."""
        return {
            layer: recall(np.concatenate(named[name]), np.concatenate(true), experts)
            for layer, (named, true, experts) in enumerate(
                zip(self._named_L, self._true_L, self._lookahead.experts_L, strict=True)
            )
            if name in named
        }

    def marks(self, *, seed: int = 0) -> list[LayerMarks]:
        """Of every layer but the first, which nothing can be predicted of. ``seed``: of the steps."""
        return [self._marks(layer, seed) for layer in range(1, len(self._true_L))]

    def _marks(self, layer: int, seed: int) -> LayerMarks:
        experts = self._lookahead.experts_L[layer]
        true_TK = np.concatenate(self._true_L[layer])
        named = {name: np.concatenate(parts) for name, parts in self._named_L[layer].items()}
        chances = self._chances(layer)
        recalls = {name: recall(each_TK, true_TK, experts) for name, each_TK in named.items()}
        top_k = true_TK.shape[1]
        recalls |= {name: recall(top_of(each_TE, top_k), true_TK, experts) for name, each_TE in chances.items()}
        steps = _Steps(len(true_TK), experts, seed)
        true_NRE = steps.counts(true_TK)
        counts = {name: steps.counts(each_TK) for name, each_TK in named.items()}
        counts |= {name: steps.sums(each_TE) for name, each_TE in chances.items()}
        pairs = {name: list(zip(each, true_NRE, strict=True)) for name, each in counts.items()}
        misplaced = {
            name: float(np.mean([misplaced_frac(guess.sum(axis=0), true.sum(axis=0)) for guess, true in each]))
            for name, each in pairs.items()
        }
        home, balanced, left = _balanced(true_NRE, counts, experts, top_k)
        return LayerMarks(
            layer=layer, recall=recalls, misplaced_frac=misplaced, imbalance=home, balanced=balanced, left=left
        )

    def _chances(self, layer: int) -> dict[str, npt.NDArray[np.float32]]:
        """What the table says of each token, by what it chose before or whatever it chose."""
        if self._table is None:
            return {}
        experts = self._lookahead.experts_L[layer]
        before_TK = np.concatenate(self._true_L[layer - 1])
        parts = [
            self._table.chances_TE(layer, before_TK[at : at + SCORED_TOKENS])
            for at in range(0, len(before_TK), SCORED_TOKENS)
        ]
        frequency_TE = np.broadcast_to(self._table.marginal_E(layer), (len(before_TK), self._table.num_experts))
        return {"correlation": np.concatenate(parts)[:, :experts], "frequency": frequency_TE[:, :experts]}


class _Steps:
    """Which tokens each rank has in each step: drawn from its consecutive part of the text."""

    def __init__(self, tokens: int, experts: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        ranks = num_ranks(experts)
        self._experts = experts
        share = tokens // ranks
        self._drawn_NRT = np.stack(
            [
                [rank * share + rng.choice(share, min(RANK_TOKENS, share), replace=False) for rank in range(ranks)]
                for _ in range(STEPS)
            ]
        )

    def counts(self, chosen_TK: Ints) -> Floats:
        """Assignments by step, rank and expert."""
        return np.array(
            [[counts_of(chosen_TK[drawn_T], self._experts) for drawn_T in step] for step in self._drawn_NRT],
            dtype=float,
        )

    def sums(self, chances_TE: npt.NDArray[np.float32]) -> Floats:
        """The same from each token's chances."""
        return np.array(
            [[chances_TE[drawn_T].sum(axis=0) for drawn_T in step] for step in self._drawn_NRT], dtype=float
        )


def num_ranks(experts: int) -> int:
    """Of the simulated group."""
    return next((ranks for ranks in RANKS if experts % ranks == 0), 1)


def _balanced(
    true_NRE: Floats, counts: Mapping[str, Floats], experts: int, top_k: int
) -> tuple[float, float, dict[str, float]]:
    """(imbalance at home, planned on true counts, the latter's multiple when planned on each predictor's)."""
    ranks = true_NRE.shape[1]
    tokens = float(true_NRE[0].sum())
    curve = ExpertCurve.from_points({1: ([1.0, tokens], [TOKEN_S, TOKEN_S * tokens])})
    balancer = Balancer(
        RankCosts.of_curves([curve] * ranks),
        np.arange(experts),
        num_experts=experts,
        link_bytes_per_s_R=FREE_LINK,
        token_bytes=1.0,
        expert_bytes=1.0,
        most_tokens=tokens,
    )
    free_R = np.ones(ranks)
    ideal_s = TOKEN_S * true_NRE.sum(axis=(1, 2)) / ranks

    def worst_s(guess_NRE: Floats) -> Floats:
        plans = [balancer.choose_replicas(np.rint(guess_RE).astype(np.int64), free_R) for guess_RE in guess_NRE]
        divided = [
            balancer.divide(true_RE.astype(np.int64), plan.replica_N3)
            for true_RE, plan in zip(true_NRE, plans, strict=True)
        ]
        return np.array([plan.predicted_s for plan in divided])

    of_rank_NR = true_NRE.sum(axis=1).reshape(len(true_NRE), ranks, -1).sum(axis=2)
    home = float((of_rank_NR.max(axis=1) / of_rank_NR.mean(axis=1)).mean())
    best_s = worst_s(true_NRE)
    left = {name: float(worst_s(each_NRE).sum() / best_s.sum()) for name, each_NRE in counts.items()}
    return home, float((best_s / ideal_s).mean()), left
