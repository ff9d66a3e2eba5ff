"""What the bundled model's routers see and choose on real text, teacher-forced by plain transformers: nothing is streamed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from poise.bench.corpus import load_corpus
from poise.bench.routed_text import MODEL, WINDOW_TOKENS, Ints, windows_of
from poise.engine.distillation import Teacher
from poise.model.inspect import find_experts
from poise.model.lookahead import Lookahead
from poise.model.lookahead_training import Training
from poise.predict.correlation import CorrelationTable
from poise.predict.lookahead_quality import recall

PASS_TOKENS = 1024
"""Of the passes in which captured text is learnt from."""
BATCH_WINDOWS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """Of the tokens of whole windows, one behind the other: hidden_LTH at each MoE layer's seam, and chosen_LTK."""

    hidden_LTH: torch.Tensor
    chosen_LTK: npt.NDArray[np.int64]

    @property
    def tokens(self) -> int:
        return int(self.hidden_LTH.shape[1])

    @property
    def windows(self) -> int:
        return self.tokens // WINDOW_TOKENS


def load_model() -> tuple[Any, list[Any]]:
    """The bundled model, all in memory, and its experts modules."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto").eval()
    return model, find_experts(model, model.config.model_type)


def windows(part: str, counts: Sequence[int]) -> list[Ints]:
    """Windows of each domain (code, prose) from one side of the corpus, as many of each as ``counts`` says."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return [windows_of(tokenizer, one, part, count) for one, count in zip(load_corpus(), counts, strict=True)]


def see(model: Any, modules: Sequence[Any], ids_WT: Ints) -> Seen:
    """Runs the windows, and takes down what stands at the experts."""
    states: list[list[torch.Tensor]] = [[] for _ in modules]
    chosen: list[list[Ints]] = [[] for _ in modules]

    def note(layer: int) -> Any:
        def hook(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            states[layer].append(arguments[0].clone())
            chosen[layer].append(arguments[1].numpy())

        return hook

    hooks = [
        model.get_submodule(module.name).register_forward_pre_hook(note(layer)) for layer, module in enumerate(modules)
    ]
    with torch.no_grad():
        for batch in torch.split(torch.from_numpy(ids_WT), BATCH_WINDOWS):
            model(input_ids=batch, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return Seen(
        hidden_LTH=torch.stack([torch.cat(each) for each in states]),
        chosen_LTK=np.stack([np.concatenate(each) for each in chosen]),
    )


def teach(
    lookahead: Lookahead,
    seen: Seen,
    *,
    training: Training,
    tokens: int,
    epochs: int = 1,
    table: CorrelationTable | None = None,
    seed: int = 0,
) -> None:
    """As `poise distill` does: passes of windows in random order, the rate falling to nothing."""
    order_W = np.random.default_rng(seed).permutation(seen.windows)[: tokens // WINDOW_TOKENS]
    teacher = Teacher(lookahead, training, total_tokens=epochs * len(order_W) * WINDOW_TOKENS, table=table, seed=seed)
    for _ in range(epochs):
        for some_W in np.split(order_W, range(4, len(order_W), PASS_TOKENS // WINDOW_TOKENS)):
            place_T = (some_W[:, None] * WINDOW_TOKENS + np.arange(WINDOW_TOKENS)).ravel()
            for layer in range(len(seen.hidden_LTH)):
                teacher.on_seam(layer, seen.hidden_LTH[layer, place_T], seen.chosen_LTK[layer, place_T])


def recall_L(lookahead: Lookahead, seen: Seen, *, frozen: bool = False) -> dict[int, float]:
    """Of each predicted layer."""
    ask = lookahead.own_choices_TK if frozen else lookahead.choices_TK
    return {
        layer: recall(
            ask(layer, seen.hidden_LTH[layer - 1]).numpy(), seen.chosen_LTK[layer], lookahead.experts_L[layer]
        )
        for layer in lookahead.predicted_layers
    }
