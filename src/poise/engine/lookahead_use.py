"""Whether and how an ``LLM`` has a lookahead predictor, and what that takes in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poise.engine.online_lookahead import RANK_RULE, OnlineRule
from poise.errors import UsageError
from poise.model.checkpoint import Checkpoint
from poise.model.fingerprint import model_fingerprint
from poise.model.inspect import ExpertsModule
from poise.model.lookahead import Lookahead, saved_width
from poise.model.lookahead_sites import FromModel, RouterSite

KEPT_TOKENS = 8192
"""Of a pass with more tokens an even sample is learnt from, so that what is kept between two layers has a bound."""
FP32_BYTES = 4
COPIES_TO_LEARN = 4
"""Of each weight: itself, its gradient, Adam's two averages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LookaheadUse:
    """``width``: of residuals that are yet to learn; None: frozen routers only. ``file``: what `poise distill` wrote instead.

    ``learns``: room is kept for a teacher. ``online``: it goes on learning from what is generated.
    ``prefetches``: experts are read ahead by it instead of the correlation table or, with ``mixes``, mixed with it.
    Raises UsageError for values that cannot be.
    """

    width: int | None = None
    file: Path | None = None
    learns: bool = False
    online: bool = False
    prefetches: bool = False
    mixes: bool = False

    def __post_init__(self) -> None:
        if self.width is not None and self.width < 1:
            raise UsageError(f"a lookahead's width is {self.width}; it must be at least 1")
        assert self.width is None or self.file is None, "a trained predictor has its width"
        if self.online and self.width is None and self.file is None:
            raise UsageError(
                "a lookahead without a width and without a file has nothing that could learn; give one of them"
            )


def kept_weights(model: Any, sites: Sequence[RouterSite | None]) -> frozenset[str]:
    """Names of the parameters that predictions need outside their layer's turn: they stay in memory."""
    found = set()
    for site in sites[1:]:
        if site is not None:
            module = model.get_submodule(site.module)
            found |= {f"{site.module}.{name}" for name, _ in module.named_parameters()}
            own = [*site.arguments, *site.keywords.values()]
            found |= {value.name for value in own if isinstance(value, FromModel)}
    return frozenset(found)


def width_of(use: LookaheadUse, checkpoint: Checkpoint) -> int:
    """Of the residuals; 0: none. Raises TraceError for a file that is damaged or of another model."""
    if use.file is None:
        return use.width or 0
    return saved_width(use.file, fingerprint=model_fingerprint(checkpoint))


def lookahead_bytes(
    use: LookaheadUse, width: int, sites: Sequence[RouterSite | None], modules: Sequence[ExpertsModule]
) -> int:
    """Bytes beside the model: residuals, what learning them takes, hidden states kept from one layer to the next."""
    numbers = sum(
        width * (site.hidden_size + module.num_experts + module.num_idle)
        for site, module in zip(sites[1:], modules[1:], strict=True)
        if site is not None
    )
    sizes = [site.hidden_size * site.dtype.itemsize for site in sites if site is not None]
    kept = 2 * KEPT_TOKENS * max(sizes, default=0) if use.learns else 0
    copies = COPIES_TO_LEARN if use.learns or use.online else 1
    learnt_from = max(rule.most_bytes(sum(sizes)) for rule in (OnlineRule(), RANK_RULE)) if use.online and sizes else 0
    return numbers * FP32_BYTES * copies + kept + learnt_from


def make_lookahead(
    use: LookaheadUse,
    model: Any,
    modules: Sequence[ExpertsModule],
    sites: Sequence[RouterSite | None],
    checkpoint: Checkpoint,
) -> Lookahead:
    """For a loaded model. Raises TraceError for a file that is damaged or of another model."""
    if use.file is None:
        return Lookahead.of_model(model, modules, width=use.width, sites=sites)
    fingerprint = model_fingerprint(checkpoint)
    return Lookahead.load(use.file, model, modules, fingerprint=fingerprint, sites=sites)
