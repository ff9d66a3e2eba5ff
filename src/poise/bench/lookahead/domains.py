"""Live traffic that switches from code to prose, and back: what a lookahead names right that learns online, and others.

One engine, experts streamed, sampled text. The same passes are predicted by a lookahead that was distilled on code and goes on
learning, by the same one as it was, by one distilled on both domains, by frozen routers; and, in a second engine, by one that
begins with nothing and learns online only. Each pass is judged before anything is learnt from it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from poise.bench.lookahead.seen import Seen, load_model, see, teach, windows
from poise.bench.routed_text import MODEL, Ints
from poise.engine.llm import LLM
from poise.engine.lookahead_use import LookaheadUse
from poise.engine.sampling import SamplingParams
from poise.model.checkpoint import open_checkpoint
from poise.model.fingerprint import model_fingerprint
from poise.model.lookahead import Lookahead
from poise.model.lookahead_training import WIDTH, Training
from poise.predict.lookahead_quality import recall

LEARNT_WINDOWS = 400
SEQUENCES = 32
PROMPT_TOKENS = 32
NEW_TOKENS = 64
CALLS = ("code", "prose", "prose", "prose", "prose", "code", "code")
"""Each of ``SEQUENCES`` new texts."""
BLOCK_PASSES = 16
EXPERT_SLOTS = 96
"""Of 192 experts."""


def measure() -> dict[str, Any]:
    """Mean recall of blocks of passes, by lookahead, and the share of the time that learning took."""
    torch.set_num_threads(1)
    fingerprint = model_fingerprint(open_checkpoint(MODEL))
    model, modules = load_model()
    code, prose = (see(model, modules, ids_WT) for ids_WT in windows("train", (LEARNT_WINDOWS, LEARNT_WINDOWS)))
    prompts = _prompts()
    with tempfile.TemporaryDirectory(prefix="poise-lookahead-") as scratch:
        file = Path(scratch) / "code.safetensors"
        on_code = Lookahead.of_model(model, modules, width=WIDTH)
        teach(on_code, code, training=Training(), tokens=code.tokens)
        on_code.save(file, model=fingerprint)
        on_both = Lookahead.of_model(model, modules, width=WIDTH)
        teach(on_both, _joined(code, prose), training=Training(), tokens=2 * code.tokens)
        beside = {"as distilled on code": on_code, "distilled on both": on_both}
        after_code = _run(LookaheadUse(file=file, online=True), "distilled on code, online", beside, prompts)
        from_nothing = _run(LookaheadUse(width=WIDTH, online=True), "online only", {}, prompts)
    return {
        "calls": list(CALLS),
        "block_passes": BLOCK_PASSES,
        "sequences": SEQUENCES,
        "runs": {"distilled on code": after_code, "from nothing": from_nothing},
    }


class Marker:
    """A seam listener that judges several lookaheads on every pass. ``marks``: by name, mean recall of each pass."""

    def __init__(self, lookaheads: Mapping[str, Lookahead], frozen: Lookahead) -> None:
        self._lookaheads = lookaheads
        self._frozen = frozen
        self._before_TH: torch.Tensor | None = None
        self._pass: dict[str, list[float]] = {}
        self.marks: dict[str, list[float]] = {name: [] for name in (*lookaheads, "frozen")}

    def on_seam(self, layer: int, hidden_TH: torch.Tensor, chosen_TK: Ints) -> None:
        """See ``engine.routing``."""
        if layer == 0:
            self._pass = {name: [] for name in self.marks}
        else:
            assert self._before_TH is not None, "a layer after another"
            asked = {name: one.choices_TK(layer, self._before_TH) for name, one in self._lookaheads.items()}
            asked["frozen"] = self._frozen.own_choices_TK(layer, self._before_TH)
            for name, named_TK in asked.items():
                self._pass[name].append(recall(named_TK.numpy(), chosen_TK, self._frozen.experts_L[layer]))
        self._before_TH = hidden_TH.clone()
        if layer + 1 == len(self._frozen.experts_L):
            for name, layers in self._pass.items():
                self.marks[name].append(float(np.mean(layers)))


def _run(
    use: LookaheadUse, name: str, beside: Mapping[str, Lookahead], prompts: Mapping[str, Sequence[Sequence[int]]]
) -> dict[str, Any]:
    with LLM(MODEL, memory="1GiB", expert_slots=EXPERT_SLOTS, lookahead=use) as llm:
        assert llm.lookahead is not None, "it was asked for"
        assert llm.online is not None, "it was asked for"
        marker = Marker({name: llm.lookahead, **beside}, llm.lookahead)
        llm.runner.watch(marker)
        ends, began_s, taken = [], time.perf_counter(), dict.fromkeys(prompts, 0)
        for seed, domain in enumerate(CALLS):
            some = prompts[domain][taken[domain] : taken[domain] + SEQUENCES]
            taken[domain] += SEQUENCES
            params = [
                SamplingParams(max_tokens=NEW_TOKENS, temperature=0.9, seed=seed * SEQUENCES + at, ignore_eos=True)
                for at in range(len(some))
            ]
            llm.generate([{"prompt_token_ids": ids} for ids in some], params)
            ends.append(len(marker.marks["frozen"]))
        elapsed_s = time.perf_counter() - began_s
        return {
            "steps": llm.online.steps,
            "time_frac": llm.online.spent_s / elapsed_s,
            "elapsed_s": elapsed_s,
            "passes_at_ends": ends,
            "recall": {one: _blocks(marks, ends) for one, marks in marker.marks.items()},
        }


def _blocks(marks: Sequence[float], ends: Sequence[int]) -> list[list[float]]:
    """Of each call, the means of blocks of passes; a block does not span calls."""
    begins = [0, *ends[:-1]]
    return [
        [float(np.mean(marks[at : min(at + BLOCK_PASSES, end)])) for at in range(begin, end, BLOCK_PASSES)]
        for begin, end in zip(begins, ends, strict=True)
    ]


def _prompts() -> dict[str, list[list[int]]]:
    """Beginnings of windows of text that neither the model nor a lookahead has learnt."""
    need = {domain: SEQUENCES * CALLS.count(domain) for domain in ("code", "prose")}
    found = windows("held_out", tuple(need.values()))
    short = {domain: len(ids_WT) for domain, ids_WT in zip(need, found, strict=True)}
    assert short == need, f"too little held-out text: {short} windows of {need}"
    return {domain: ids_WT[:, :PROMPT_TOKENS].tolist() for domain, ids_WT in zip(need, found, strict=True)}


def _joined(one: Seen, other: Seen) -> Seen:
    return Seen(
        hidden_LTH=torch.cat([one.hidden_LTH, other.hidden_LTH], dim=1),
        chosen_LTK=np.concatenate([one.chosen_LTK, other.chosen_LTK], axis=1),
    )
