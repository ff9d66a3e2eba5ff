"""The time of a layer outside its experts, taken at the seam: a forward is stopped at each experts module and timed between.

From one stop to the next runs the rest of one layer and the attention and router of the next: exactly what the engine's
compute thread does between two layers of experts, for any architecture. The part from entering the block around the
experts to the stop is the gate; all else is attention (with norms, shared experts and layers without experts). The
forward is given up at the last stop that is wanted, so later layers need no weights.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from poise.model.cache import drop_rows, keep_in_place, make_cache, tensors_in
from poise.model.seam import Forward
from poise.profile.measure import Clock, Run
from poise.profile.subject import Subject

PROBE_TOKENS = (8, 16)


class Layers:
    """Runs of the layers of a subject; a context manager, as it watches the model's blocks while it lives."""

    def __init__(self, subject: Subject, clock: Clock = time.perf_counter, device: str = "cpu") -> None:
        """``device``: where the model's layers are put while the measurement lives; ``clock`` must wait for its work."""
        self._model = subject.model
        self._clock = clock
        self._device = device
        self._stops = min(subject.period + 1, len(subject.modules))
        self._entered_s = 0.0
        self._one_row: dict[tuple[int, int | None], Any] = {}
        self._accepted = frozenset(inspect.signature(self._model.forward).parameters)
        blocks = [module.name.rpartition(".")[0] for module in subject.modules[: self._stops]]
        self._hooks = [self._model.get_submodule(name).register_forward_pre_hook(self._enter) for name in blocks]

    def __enter__(self) -> Layers:
        _put(self._model, self._device)
        return self

    def __exit__(self, *_: object) -> None:
        _put(self._model, "cpu")
        for hook in self._hooks:
            hook.remove()

    def run(self, *, rows: int, row_tokens: int, context_tokens: int) -> Run:
        """A run over ``rows`` sequences that bring ``row_tokens`` each and are ``context_tokens`` long behind it.

        Its quantities are seconds of attention and of the gate, each for one MoE layer, the mean of a period of layers.
        """
        assert 1 <= row_tokens <= context_tokens, "a context ends with the tokens of the pass"
        filled = self._filled_cache(rows, context_tokens - row_tokens, context_tokens)

        def run() -> tuple[float, ...]:
            return self._timed(rows, row_tokens, context_tokens, _own_copy(filled))

        return run

    def cache_bytes(self, tokens: int) -> int:
        """What one sequence of so many tokens takes at most in the layers that are run (less where a window slides)."""
        few, more = (_nbytes(self._filled_cache(1, count, None)) for count in PROBE_TOKENS)
        return few + (more - few) * max(0, tokens - PROBE_TOKENS[0]) // (PROBE_TOKENS[1] - PROBE_TOKENS[0])

    def _filled_cache(self, rows: int, tokens: int, final_tokens: int | None) -> Any:
        """A cache of ``rows`` equal sequences, in one place where a final length is given; one is computed, once."""
        if not tokens:
            return self._empty_cache(final_tokens)
        key = (tokens, final_tokens)
        if key not in self._one_row:
            self._one_row[key] = self._empty_cache(final_tokens)
            self._timed(1, tokens, tokens, self._one_row[key])
        cache = copy.deepcopy(self._one_row[key])
        if rows > 1:
            drop_rows(cache, torch.zeros(rows, dtype=torch.long, device=self._device), 1)
        return cache

    def _empty_cache(self, final_tokens: int | None) -> Any:
        cache = make_cache(self._model)
        if final_tokens is not None:
            keep_in_place(self._model, cache, final_tokens=final_tokens)
        return cache

    def _timed(self, rows: int, row_tokens: int, context_tokens: int, cache: Any) -> tuple[float, float]:
        arguments = {
            "input_ids": torch.zeros((rows, row_tokens), dtype=torch.long, device=self._device),
            "position_ids": torch.arange(context_tokens - row_tokens, context_tokens, device=self._device).expand(
                rows, -1
            ),
            "past_key_values": cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        taken = {name: value for name, value in arguments.items() if name in self._accepted}
        forward = Forward(lambda: self._model(**taken).logits)
        attention_s: list[float] = []
        gate_s: list[float] = []
        with torch.inference_mode(), _ended(forward):
            begin = self._clock()
            parked = forward.start()
            for stop in range(self._stops):
                assert parked is not None, "a forward ended before its last experts"
                end = self._clock()
                attention_s.append(self._entered_s - begin)
                gate_s.append(end - self._entered_s)
                if stop + 1 < self._stops:
                    output_TH = torch.zeros_like(parked.hidden_TH)
                    begin = self._clock()
                    parked = forward.resume(output_TH)
        # The first stretch holds what a pass does once (masks, positions, layers before the first experts).
        return _mean(attention_s[1:] or attention_s), _mean(gate_s[1:] or gate_s)

    def _enter(self, module: Any, arguments: Any) -> None:
        self._entered_s = self._clock()


def _put(model: torch.nn.Module, device: str) -> None:
    """All that is not on the meta device."""
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and not parameter.is_meta:
                parameter.data = parameter.data.to(device)
        for key, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[key] = buffer.to(device)


def _own_copy(cache: Any) -> Any:
    """A cache that grows by itself: its layers share the tensors, of which attention changes none but behind the past."""
    own = copy.copy(cache)
    own.layers = [copy.copy(layer) for layer in cache.layers]
    return own


def _nbytes(cache: Any) -> int:
    return sum(tensor.nbytes for part in (vars(cache), *map(vars, cache.layers)) for tensor in tensors_in(part))


@contextmanager
def _ended(forward: Forward) -> Iterator[None]:
    try:
        yield
    finally:
        forward.abort()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
