"""How wide residuals should be, how fast and how long they learn: a small grid on the bundled model (decision 043)."""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np

from poise.bench.lookahead.seen import load_model, recall_L, see, teach, windows
from poise.model.lookahead import Lookahead
from poise.model.lookahead_training import WIDTH, Training

LEARNT_WINDOWS = (391, 391)
HELD_OUT_WINDOWS = (40, 40)
WIDTHS = (16, 64, 128, 256, 512)
RATES = (1e-3, 5e-3, 2e-2)
TOKENS = (12_500, 50_000, 200_000)
EPOCHS = (2, 4)
EPOCH_TOKENS = 50_000


def measure() -> dict[str, Any]:
    """Held-out recall of each combination, by layer, and what learning took."""
    model, modules = load_model()
    learnt = see(model, modules, np.concatenate(windows("train", LEARNT_WINDOWS)))
    held_out = see(model, modules, np.concatenate(windows("held_out", HELD_OUT_WINDOWS)))
    most = max(TOKENS)
    wanted = [(width, Training().learning_rate, most, 1) for width in WIDTHS]
    wanted += [(WIDTH, rate, most, 1) for rate in RATES if rate != Training().learning_rate]
    wanted += [(WIDTH, Training().learning_rate, tokens, 1) for tokens in TOKENS if tokens != most]
    wanted += [(WIDTH, Training().learning_rate, EPOCH_TOKENS, epochs) for epochs in EPOCHS]
    frozen_L = recall_L(Lookahead.of_model(model, modules), held_out, frozen=True)
    rows = [{"width": 0, "recall": fmean(frozen_L.values()), "recall_L": list(frozen_L.values())}]
    for width, rate, tokens, epochs in wanted:
        lookahead = Lookahead.of_model(model, modules, width=width)
        began_s = time.perf_counter()
        training = replace(Training(), learning_rate=rate)
        teach(lookahead, learnt, training=training, tokens=tokens, epochs=epochs)
        took_s = time.perf_counter() - began_s
        named_L = recall_L(lookahead, held_out)
        rows.append(
            {
                "width": width,
                "learning_rate": rate,
                "tokens": tokens,
                "epochs": epochs,
                "seconds": took_s,
                "recall": fmean(named_L.values()),
                "recall_L": list(named_L.values()),
            }
        )
    return {"held_out_tokens": held_out.tokens, "rows": rows}
