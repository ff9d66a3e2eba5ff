"""How well the next layer's experts are foreseen: the correlation table beside simpler guesses, on the bundled model.

Plain transformers routes held-out text, teacher-forced; nothing is streamed. A pass takes one token of each of T texts, as
decoding does. Each policy names K experts per layer before the layer is reached, and then learns from it. Quoted in the terms
of the Klotski paper: the share of the named that some token used, and the share of them that are truly among the K hottest
of the pass (experts tied at the K-th place count by their chance of being among them).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track
from rich.table import Table

from poise.bench.machine import stamp
from poise.bench.results import document, write_result
from poise.bench.routed_text import EXPERTS, LAYERS, TOP_K, RoutedText, route_text
from poise.engine.prefetcher import MAX_LEARNT
from poise.plan.outlook import PROBABILITY_WEIGHT
from poise.plan.residency import updated_probability_E
from poise.predict.correlation import CorrelationTable, sampled
from poise.predict.guesses import hits_in_passes

NAME = "prefetch"
TOKENS_PER_PASS = (1, 4, 16, 64, 256)
PASSES = 1024
MAX_GROUPS = 16
WARM_UP_PASSES = 64
"""Passes from which all policies learn before any is judged."""
COST_SHAPES = ((64, 8), (128, 8))
COST_TOKENS = 512

Ints = npt.NDArray[np.int64]
Scores = npt.NDArray[np.floating]


class Guess(Protocol):
    """A policy: scores the experts of ``layer`` from what the layer before chose, then learns what ``layer`` chose."""

    def scores_E(self, layer: int, previous_TK: Ints) -> Scores: ...

    def learn(self, layer: int, chosen_TK: Ints, previous_TK: Ints | None) -> None: ...


class Correlation:
    """What the engine does with a recorded table."""

    def __init__(self, recorded: RoutedText) -> None:
        self._table = CorrelationTable(num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K, forgets=False)
        for chosen_LTK in recorded.chosen_WLTK:
            for layer in range(LAYERS):
                self.learn(layer, chosen_LTK[layer], chosen_LTK[layer - 1] if layer else None)
        self._table.lighten()

    def scores_E(self, layer: int, previous_TK: Ints) -> Scores:
        return self._table.predict(layer, previous_TK)

    def learn(self, layer: int, chosen_TK: Ints, previous_TK: Ints | None) -> None:
        self._table.observe(layer, chosen_TK, previous_TK)


class Frequency(Correlation):
    """How often tokens choose each expert of the layer, whatever the layer before chose: the marginals of the same table."""

    def scores_E(self, layer: int, previous_TK: Ints) -> Scores:
        return self._table.marginal_E(layer)


class Running:
    """The running chance that a pass uses the expert, as the store keeps it."""

    def __init__(self, recorded: RoutedText) -> None:
        self._probability_LE = np.full((LAYERS, EXPERTS), 0.5)

    def scores_E(self, layer: int, previous_TK: Ints) -> Scores:
        return np.asarray(self._probability_LE[layer])

    def learn(self, layer: int, chosen_TK: Ints, previous_TK: Ints | None) -> None:
        used_E = np.bincount(chosen_TK.ravel(), minlength=EXPERTS) > 0
        self._probability_LE[layer] = updated_probability_E(self._probability_LE[layer], used_E, PROBABILITY_WEIGHT)


BEST = "best possible"
POLICIES: dict[str, Callable[[RoutedText], Guess] | None] = {
    "correlation": Correlation,
    "frequency": Frequency,
    "running": Running,
    BEST: None,
}
"""None: sees the future."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """Shares (0-1) of the experts that a policy named, by layer: used by some token; among the truly hottest."""

    tokens_per_pass: int
    named: int
    policy: str
    used_frac_L: tuple[float, ...]
    hottest_frac_L: tuple[float, ...]

    @property
    def used_frac(self) -> float:
        """Mean over the layers that have one before them."""
        return float(np.mean(self.used_frac_L[1:]))

    @property
    def hottest_frac(self) -> float:
        """Mean over the layers that have one before them."""
        return float(np.mean(self.hottest_frac_L[1:]))


def run(output: Path | None, json_output: bool) -> None:
    """`poise bench prefetch`."""
    recorded, held_out = route_text()
    todo = track(TOKENS_PER_PASS, "Guessing", console=Console(stderr=True), transient=True)
    qualities = [quality for tokens in todo for quality in measure(recorded, held_out, tokens)]
    costs = [
        {"experts": experts, "top_k": top_k, "tokens": COST_TOKENS, "layer_s": layer_cost_s(experts, top_k)}
        for experts, top_k in COST_SHAPES
    ]
    facts = stamp()
    results: dict[str, object] = {
        "model": "tiny-moe",
        "recorded_tokens": recorded.tokens,
        "held_out_tokens": held_out.tokens,
        "passes": PASSES,
        "cost": costs,
        "quality": [{**asdict(one), "used_frac": one.used_frac, "hottest_frac": one.hottest_frac} for one in qualities],
    }
    if json_output:
        print(json.dumps(document(NAME, facts, results)))
    else:
        for what in ("used", "hottest"):
            _print_table(qualities, what)
        for cost in costs:
            print(
                f"{cost['experts']} experts, top-{cost['top_k']}, {COST_TOKENS} tokens: {cost['layer_s'] * 1e3:.2f} ms a layer"
            )
    if output is not None:
        print(f"Wrote {write_result(output, NAME, facts, results, today=date.today())}", file=sys.stderr)


def measure(recorded: RoutedText, held_out: RoutedText, tokens: int) -> list[Quality]:
    """Every policy over the same passes of ``tokens`` tokens, naming top_k and twice as many experts."""
    passes_PLTK = held_out.passes(tokens, num_passes=PASSES, max_groups=MAX_GROUPS)
    judged = range(WARM_UP_PASSES, len(passes_PLTK))
    counts_PLE = np.stack(
        [[np.bincount(chosen_TK.ravel(), minlength=EXPERTS) for chosen_TK in one] for one in passes_PLTK]
    )
    qualities = []
    for name, make in POLICIES.items():
        scores_PLE = counts_PLE.astype(np.float64) if make is None else _scores_PLE(make(recorded), passes_PLTK)
        for named in (TOP_K, 2 * TOP_K):
            shares = [_shares(scores_PLE[judged, layer], counts_PLE[judged, layer], named) for layer in range(LAYERS)]
            used_L, hottest_L = zip(*shares, strict=True)
            qualities.append(
                Quality(tokens_per_pass=tokens, named=named, policy=name, used_frac_L=used_L, hottest_frac_L=hottest_L)
            )
    return qualities


def _scores_PLE(guess: Guess, passes_PLTK: Sequence[Ints]) -> Scores:
    scores_PLE = np.zeros((len(passes_PLTK), LAYERS, EXPERTS))
    for place, chosen_LTK in enumerate(passes_PLTK):
        for layer in range(LAYERS):
            scores_PLE[place, layer] = guess.scores_E(layer, chosen_LTK[max(0, layer - 1)])
        for layer in range(LAYERS):
            guess.learn(layer, chosen_LTK[layer], chosen_LTK[layer - 1] if layer else None)
    return scores_PLE


def _shares(scores_PE: Scores, counts_PE: Ints, named: int) -> tuple[float, float]:
    """(used, hottest) shares of the ``named`` experts with the highest scores."""
    found = hits_in_passes(counts_PE, np.argsort(-scores_PE, axis=1, kind="stable")[:, :named])
    return found.used / found.named, found.hottest / found.named


def layer_cost_s(num_experts: int, top_k: int, repeats: int = 50) -> float:
    """Median seconds that predicting one layer and learning from it take, as the engine does it for 512 tokens."""
    rng = np.random.default_rng(0)
    table = CorrelationTable(num_layers=2, num_experts=num_experts, top_k=top_k)
    times_s = []
    for _ in range(repeats):
        before_TK, after_TK = (np.argsort(rng.random((COST_TOKENS, num_experts)), axis=1)[:, :top_k] for _ in range(2))
        began = time.perf_counter()
        table.foresee(1, before_TK)
        table.observe(1, sampled(after_TK, MAX_LEARNT), sampled(before_TK, MAX_LEARNT))
        times_s.append(time.perf_counter() - began)
    return float(np.median(times_s[repeats // 5 :]))


def _print_table(qualities: Sequence[Quality], what: str) -> None:
    meaning = "used by some token" if what == "used" else "among the hottest of the pass"
    table = Table(
        "tokens a pass", "policy", title=f"Share of the experts named that are {meaning}", title_justify="left"
    )
    for layer in range(LAYERS):
        table.add_column(f"L{layer}", justify="right", no_wrap=True)
    table.add_column("mean L1-", justify="right", no_wrap=True)
    table.add_column(f"if {2 * TOP_K} named", justify="right", no_wrap=True)
    mean_of = {
        (q.tokens_per_pass, q.policy, q.named): q.used_frac if what == "used" else q.hottest_frac for q in qualities
    }
    for one in qualities:
        if one.named == TOP_K:
            shares = one.used_frac_L if what == "used" else one.hottest_frac_L
            key = (one.tokens_per_pass, one.policy)
            cells = [*shares, mean_of[*key, TOP_K], mean_of[*key, 2 * TOP_K]]
            table.add_row(str(key[0]), key[1], *(f"{cell:.0%}" for cell in cells), end_section=one.policy == BEST)
    Console().print(table)
