"""Poise: mixture-of-experts inference kept in balance.

``from poise import LLM, SamplingParams`` loads torch and transformers on first use only, so that the command line and
the planners start without them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "RequestOutput", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from poise.engine.llm import LLM
    from poise.engine.request import Completion, RequestOutput
    from poise.engine.sampling import SamplingParams


def __getattr__(name: str) -> object:
    if name == "LLM":
        from poise.engine.llm import LLM

        return LLM
    if name in ("Completion", "RequestOutput"):
        from poise.engine import request

        return getattr(request, name)
    if name == "SamplingParams":
        from poise.engine.sampling import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'poise' has no attribute {name!r}")
