"""Which experts the next layer will use: the correlation table beside lookaheads mixed with it, on held-out text.

As ``bench.prefetch`` counts it: a pass takes one token of each of T texts; each policy names top_k experts of every layer but
the first before it is reached, and then learns from it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from poise.bench.lookahead.seen import Seen, load_model, see, teach, windows
from poise.bench.routed_text import EXPERTS, LAYERS, TOP_K, WINDOW_TOKENS
from poise.engine.lookahead_prefetcher import LookaheadPrefetcher
from poise.model.lookahead import Lookahead
from poise.model.lookahead_training import WIDTH, Training
from poise.plan.outlook import Foreseen
from poise.predict.correlation import CorrelationTable
from poise.predict.guesses import hits_in_passes
from poise.predict.hits import Hits

LEARNT_WINDOWS = (400, 400)
HELD_OUT_WINDOWS = (64, 64)
TOKENS_PER_PASS = (1, 4, 16, 64)
PASSES = 256
WARM_UP_PASSES = 32


def measure() -> dict[str, Any]:
    """Shares of the named that some token used, and that were among the hottest, and how exact the chances were."""
    model, modules = load_model()
    learnt = see(model, modules, np.concatenate(windows("train", LEARNT_WINDOWS)))
    held_out = see(model, modules, np.concatenate(windows("held_out", HELD_OUT_WINDOWS)))
    frozen, distilled = Lookahead.of_model(model, modules), Lookahead.of_model(model, modules, width=WIDTH)
    teach(distilled, learnt, training=Training(), tokens=learnt.tokens)
    rows = []
    for tokens in TOKENS_PER_PASS:
        passes = _passes(held_out, tokens)
        for name, lookahead in (("table", None), ("frozen, mixed", frozen), ("distilled, mixed", distilled)):
            hits, brier = _judge(held_out, passes, lookahead, frozen)
            rows.append(
                {
                    "tokens_per_pass": tokens,
                    "policy": name,
                    "used_frac": hits.used_frac,
                    "hottest_frac": hits.hottest_frac,
                    "brier": brier,
                }
            )
    return {"named": TOP_K, "passes": PASSES, "rows": rows}


def _passes(seen: Seen, tokens: int) -> list[np.ndarray[Any, Any]]:
    """Places of one token from each of ``tokens`` windows, position by position, group by group."""
    order_W = np.random.default_rng(0).permutation(seen.windows)
    groups = min(16, seen.windows // tokens)
    positions = min(WINDOW_TOKENS, -(-PASSES // groups))
    return [
        group * WINDOW_TOKENS + position
        for group in np.split(order_W[: groups * tokens], groups)
        for position in range(positions)
    ]


def _judge(
    seen: Seen, passes: list[np.ndarray[Any, Any]], lookahead: Lookahead | None, frozen: Lookahead
) -> tuple[Hits, float]:
    """Each with a table that begins empty; the table alone is what the prefetcher would ask for a layer without a router."""
    table = CorrelationTable(num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K)
    foreseen: dict[int, Foreseen] = {}
    prefetcher = LookaheadPrefetcher(lookahead or frozen, table, foreseen.__setitem__, mixes=True)
    hits, errors = Hits(), []
    for number, place_T in enumerate(passes):
        for layer in range(LAYERS):
            chosen_TK = seen.chosen_LTK[layer, place_T]
            if layer and number >= WARM_UP_PASSES:
                counts_E = np.bincount(chosen_TK.ravel(), minlength=EXPERTS)
                named_K = np.argsort(-np.asarray(foreseen[layer].tokens_E), kind="stable")[:TOP_K]
                hits += hits_in_passes(counts_E[None], named_K[None])
                errors.append(float(np.mean((foreseen[layer].chance_E - (counts_E > 0)) ** 2)))
            by_table = None if lookahead is not None else table.foresee((layer + 1) % LAYERS, chosen_TK)
            prefetcher.on_seam(layer, seen.hidden_LTH[layer, place_T], chosen_TK)
            if by_table is not None:
                foreseen[(layer + 1) % LAYERS] = Foreseen(chance_E=by_table[0], tokens_E=by_table[1])
    return hits, float(np.mean(errors))
