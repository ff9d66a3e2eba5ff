"""Where plain transformers sends the tokens of real text in the bundled model, teacher-forced.

Recorded text is of the files that the model was trained on, held-out text of those it never saw (``bench.corpus``); both are
half code, half prose.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

from poise.bench.corpus import Domain, load_corpus

MODEL = Path(__file__).parents[1] / "assets" / "tiny-moe"
LAYERS, EXPERTS, TOP_K = 6, 32, 4
"""Of the bundled model."""
WINDOW_TOKENS = 256
RECORDED_WINDOWS = 64
HELD_OUT_WINDOWS = 128
"""Windows of each domain."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutedText:
    """``chosen_WLTK``: the experts that each token of each window chose at each layer. ``ids_WT``: the tokens."""

    ids_WT: Ints
    chosen_WLTK: Ints

    @property
    def tokens(self) -> int:
        """Tokens in all windows."""
        return int(self.ids_WT.size)

    def passes(self, tokens: int, *, num_passes: int, max_groups: int, seed: int = 0) -> list[Ints]:
        """Passes of one token from each of ``tokens`` windows, position by position; (L, tokens, K) each."""
        windows = np.random.default_rng(seed).permutation(len(self.chosen_WLTK))
        groups = min(max_groups, len(windows) // tokens)
        positions = min(self.chosen_WLTK.shape[2], -(-num_passes // groups))
        return [
            np.ascontiguousarray(self.chosen_WLTK[group, :, position].transpose(1, 0, 2))
            for group in np.split(windows[: groups * tokens], groups)
            for position in range(positions)
        ]


def route_text() -> tuple[RoutedText, RoutedText]:
    """(recorded, held out)."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto").eval()
    domains = load_corpus()
    recorded = np.concatenate([windows_of(tokenizer, one, "train", RECORDED_WINDOWS) for one in domains])
    held_out = np.concatenate([windows_of(tokenizer, one, "held_out", HELD_OUT_WINDOWS) for one in domains])
    return route(model, recorded, "Routing recorded text"), route(model, held_out, "Routing held-out text")


def windows_of(tokenizer: Any, domain: Domain, part: str, count: int, seed: int = 0) -> Ints:
    """The first ``count`` windows of a domain's files in a shuffled order."""
    texts = getattr(domain, part)
    ids: list[int] = []
    for index in np.random.default_rng(seed).permutation(len(texts)):
        ids += [*tokenizer(texts[index], verbose=False)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= count * WINDOW_TOKENS:
            break
    whole = min(count, len(ids) // WINDOW_TOKENS)
    return np.array(ids[: whole * WINDOW_TOKENS], dtype=np.int64).reshape(whole, WINDOW_TOKENS)


def route(model: Any, ids_WT: Ints, what: str) -> RoutedText:
    """Runs the windows one by one, and takes down what the routers choose."""
    chosen: list[Ints] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, arguments: chosen.append(arguments[1].numpy()))
        for name, module in model.named_modules()
        if name.endswith("mlp.experts")
    ]
    routed = []
    with torch.inference_mode():
        for window in track(torch.from_numpy(ids_WT), what, console=Console(stderr=True), transient=True):
            chosen.clear()
            model(input_ids=window[None], use_cache=False, logits_to_keep=1)
            routed.append(np.stack(chosen))
    for hook in hooks:
        hook.remove()
    return RoutedText(ids_WT=ids_WT, chosen_WLTK=np.stack(routed))
