"""An untrained model as control: how much of a frozen router's foresight is there before anything was learnt.

A layer adds little to what goes through it, so even random routers of two layers agree to some extent on a token. What is
quoted of a trained model is to be read beside that. The control is a checkpoint of random weights of the same configuration,
in a directory that is gone afterwards.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from poise.engine.llm import LLM
from poise.engine.lookahead_exam import Examiner
from poise.engine.lookahead_use import LookaheadUse
from poise.engine.sampling import SamplingParams
from poise.model.checkpoint import Checkpoint
from poise.model.inspect import load_config, own_dtype
from poise.model.random_checkpoint import make_checkpoint
from poise.units import GIB

MOST_BYTES = 2 * GIB
"""Of a model of which a control is made unless that is asked for: it is written to disk whole."""


def is_cheap(checkpoint: Checkpoint) -> bool:
    """Whether a control of this model is small enough to be made unasked."""
    return sum(tensor.nbytes for tensor in checkpoint.tensors.values()) <= MOST_BYTES


def untrained_recalls(
    checkpoint: Checkpoint, windows: Sequence[Sequence[int]], *, memory: str | int, seed: int = 0
) -> dict[int, float]:
    """Recall of the frozen routers of a random model on these token ids, by MoE layer. Raises UsageError as ``LLM`` does."""
    config = load_config(checkpoint)
    dtype = str(own_dtype(checkpoint)).removeprefix("torch.")
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with tempfile.TemporaryDirectory(prefix="poise-control-") as scratch:
        path = Path(scratch) / "untrained"
        make_checkpoint(config, path, dtype=dtype, seed=seed)
        with LLM(path, memory=memory, lookahead=LookaheadUse()) as llm:
            assert llm.lookahead is not None, "it was asked for"
            examiner = Examiner(llm.lookahead)
            llm.runner.watch(examiner)
            llm.generate([{"prompt_token_ids": one} for one in windows], SamplingParams(max_tokens=1))
            return examiner.recalls("frozen")
