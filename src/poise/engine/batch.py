"""Sequences that run together: left-padded rows, one cache, prefill in chunks, then one token per pass.

A batch is created with its rows and only shrinks: finished rows leave between passes. New prompts become new batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch

from poise.engine.choose import choose_token, make_generator
from poise.engine.request import Completion, FinishReason
from poise.engine.runner import ForwardInputs
from poise.engine.sampling import SamplingParams
from poise.engine.text import TextStream
from poise.model.cache import drop_rows


class Row:
    """One request while it runs."""

    def __init__(self, index: int, prompt_ids: Sequence[int], params: SamplingParams, tokenizer: Any) -> None:
        self.index = index
        self.prompt_ids = tuple(prompt_ids)
        self.params = params
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._text = TextStream(tokenizer, params.stop_strings)
        self._generator = make_generator(params)

    @property
    def total_tokens(self) -> int:
        """Prompt and the most that may be generated."""
        return len(self.prompt_ids) + self.params.max_tokens

    def advance(self, logits_V: torch.Tensor, eos: frozenset[int]) -> str:
        """Chooses and appends the next token; returns the text that can be shown now."""
        token = choose_token(logits_V, self.params, self._generator)
        self.token_ids.append(token)
        if token in eos and not self.params.ignore_eos:
            self.finish_reason = "stop"
            return self._text.finish(self.token_ids)
        piece = self._text.push(token)
        if self._text.stopped:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.params.max_tokens:
            self.finish_reason = "length"
        return piece + self._text.finish(self.token_ids) if self.finish_reason else piece

    def completion(self) -> Completion:
        """The result of a finished row."""
        assert self.finish_reason is not None, "the row has not finished"
        return Completion(text=self._text.text, token_ids=tuple(self.token_ids), finish_reason=self.finish_reason)


def in_batches(rows: Sequence[Row], batch_size: int, *, equal_rows: bool) -> list[list[Row]]:
    """Who shares a batch: longest prompts first, rows of like length together; ``equal_rows``: of one length only."""
    ordered = sorted(rows, key=lambda row: len(row.prompt_ids))[::-1]
    runs = [list(run) for _, run in groupby(ordered, key=lambda row: len(row.prompt_ids))] if equal_rows else [ordered]
    return [run[begin : begin + batch_size] for run in runs for begin in range(0, len(run), batch_size)]


def final_tokens(rows: Sequence[Row]) -> int:
    """The most that a row of a batch may hold, padding included."""
    width = max(len(row.prompt_ids) for row in rows)
    return width + max(row.params.max_tokens for row in rows)


class Batch:
    """Rows, their cache and their place. ``cache`` is transformers' own and empty, attention and recurrent states alike."""

    def __init__(
        self, rows: Sequence[Row], *, cache: Any, chunk_tokens: int, pad_id: int, device: torch.device
    ) -> None:
        self.rows = list(rows)
        self._chunk_tokens = chunk_tokens
        self._cache = cache
        self._device = device
        self._seen = 0
        width = max(len(row.prompt_ids) for row in rows)
        self._ids_BT = torch.full((len(rows), width), pad_id, dtype=torch.long, device=device)
        self._mask_BT = torch.zeros((len(rows), width), dtype=torch.long, device=device)
        for place, row in enumerate(rows):
            self._ids_BT[place, width - len(row.prompt_ids) :] = torch.tensor(row.prompt_ids, device=device)
            self._mask_BT[place, width - len(row.prompt_ids) :] = 1
        self._prompt_tokens = width
        self._end = min(self._chunk_tokens, width)

    @property
    def cache(self) -> Any:
        """The cache, which the batch fills."""
        return self._cache

    @property
    def yields_tokens(self) -> bool:
        """Whether the pass at hand ends the prompt, so that its logits choose tokens."""
        return self._end == self._ids_BT.shape[1]

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens of the next pass, padding included; 0 once the prompt has been read."""
        width = self._prompt_tokens
        return len(self.rows) * (min(self._end, width) - self._seen) if self._seen < width else 0

    def inputs(self) -> ForwardInputs:
        """The batch's part of the next pass: a chunk of the prompts, or one token per row."""
        begin, end = self._seen, self._end
        mask_BT = self._mask_BT[:, :end]
        padded = not bool(mask_BT.all())
        chunk_mask = mask_BT[:, begin:]
        arguments = {
            "input_ids": self._ids_BT[:, begin:end],
            "attention_mask": mask_BT if padded else None,
            "position_ids": (mask_BT.cumsum(1) - 1).clamp(min=0)[:, begin:],
            "past_key_values": self._cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        real_T = None if bool(chunk_mask.all()) else chunk_mask.reshape(-1).bool()
        return ForwardInputs(arguments=arguments, real_T=real_T)

    def advance(self, logits_BV: torch.Tensor | None, eos: frozenset[int]) -> list[tuple[Row, str]]:
        """Takes a pass's outcome: moves on in the prompt, or adds a token to every row. Returns what each row may show."""
        self._seen = self._end
        if not self.yields_tokens:
            self._end = min(self._end + self._chunk_tokens, self._ids_BT.shape[1])
            return []
        assert logits_BV is not None, "the prompt has ended and there are no logits"
        shown = [(row, row.advance(logits, eos)) for row, logits in zip(self.rows, logits_BV, strict=True)]
        newest = torch.tensor([[row.token_ids[-1]] for row in self.rows], device=self._device)
        self._ids_BT = torch.cat([self._ids_BT, newest], dim=1)
        self._mask_BT = torch.cat([self._mask_BT, torch.ones_like(newest)], dim=1)
        self._end = self._ids_BT.shape[1]
        self._drop_finished()
        return shown

    def _drop_finished(self) -> None:
        keep = [place for place, row in enumerate(self.rows) if row.finish_reason is None]
        if len(keep) == len(self.rows):
            return
        self.rows = [self.rows[place] for place in keep]
        if keep:
            chosen = torch.tensor(keep, device=self._device)
            drop_rows(self._cache, chosen, len(self._ids_BT))
            self._ids_BT, self._mask_BT = self._ids_BT[chosen], self._mask_BT[chosen]
