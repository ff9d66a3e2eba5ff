"""What reading ahead by a lookahead is worth to the engine: as `poise bench prefetch-engine`, beside the correlation table.

The bundled model widened, a third of its experts in memory, an eighth of the slots ahead. The same sampled texts for every
contender, each with an engine of its own that has run once before; rounds take turns.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from poise.bench.corpus import load_corpus
from poise.bench.lookahead.seen import load_model, see, teach, windows
from poise.bench.prefetch_engine import FACTOR, PROMPT_TOKENS, SLOTS, Outcome, Run, generate_once, outcome_of
from poise.bench.routed_text import MODEL, windows_of
from poise.engine.llm import LLM
from poise.engine.lookahead_use import LookaheadUse
from poise.model.checkpoint import open_checkpoint
from poise.model.fingerprint import model_fingerprint
from poise.model.lookahead import Lookahead
from poise.model.lookahead_training import WIDTH, Training
from poise.model.widen import widen_checkpoint
from poise.plan.schedule import Policy

SEQUENCES = (1, 4, 16)
ROUNDS = 2
AHEAD = SLOTS // 8
LEARNT_WINDOWS = (200, 200)


def measure() -> dict[str, Any]:
    """Misses, reads, hits and speed of each contender."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="poise-lookahead-") as scratch:
        wide, file = prepared(Path(scratch))
        uses = {
            "table": None,
            "frozen": LookaheadUse(prefetches=True, mixes=True),
            "distilled": LookaheadUse(file=file, prefetches=True, mixes=True),
            "distilled, online": LookaheadUse(file=file, prefetches=True, mixes=True, online=True),
        }
        outcomes = [
            each for sequences in SEQUENCES for each in measured(wide, uses, prompts_of(sequences), rounds=ROUNDS)
        ]
    return {"factor": FACTOR, "slots": SLOTS, "outcomes": [asdict(one) for one in outcomes]}


def prepared(directory: Path, factor: int = FACTOR) -> tuple[Path, Path]:
    """(the model widened ``factor`` times, a lookahead distilled for it), below ``directory``."""
    wide, file = directory / "wide", directory / "lookahead.safetensors"
    widen_checkpoint(MODEL, wide, factor)
    _distilled().save(file, model=model_fingerprint(open_checkpoint(wide)))
    return wide, file


def prompts_of(sequences: int) -> list[list[int]]:
    """Beginnings of held-out texts, code and prose in turn."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = [windows_of(tokenizer, one, "held_out", max(SEQUENCES)).tolist() for one in load_corpus()]
    return [window[:PROMPT_TOKENS] for pair in zip(*texts, strict=False) for window in pair][:sequences]


def measured(
    model: Path, uses: Mapping[str, LookaheadUse | None], prompts: Sequence[Sequence[int]], *, rounds: int
) -> list[Outcome]:
    """Each contender's medians over ``rounds``, behind one that is not counted."""
    runs: dict[str, list[Run]] = {name: [] for name in uses}
    texts = set()
    with ExitStack() as stack:
        policy = Policy(read_ahead="foreseen", ahead=AHEAD)
        llms = {
            name: stack.enter_context(LLM(model, memory="3GiB", expert_slots=SLOTS, policy=policy, lookahead=use))
            for name, use in uses.items()
        }
        for number in range(rounds + 1):
            for name in list(uses) if number % 2 else list(uses)[::-1]:
                measured, text = generate_once(llms[name], prompts)
                texts.add(text)
                if number:
                    runs[name].append(measured)
    assert len(texts) == 1, "reading ahead changed the text"
    return [outcome_of(name, AHEAD, len(prompts), each) for name, each in runs.items()]


def _distilled() -> Lookahead:
    """Of the bundled model, which routes as the widened one does."""
    model, modules = load_model()
    learnt = see(model, modules, np.concatenate(windows("train", LEARNT_WINDOWS)))
    lookahead = Lookahead.of_model(model, modules, width=WIDTH)
    teach(lookahead, learnt, training=Training(), tokens=learnt.tokens)
    return lookahead
