"""The batching loop: admits queued prompts as new batches, runs passes over all live batches, hands out what finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from poise.engine.batch import Batch, Row, final_tokens, in_batches
from poise.engine.request import Progress
from poise.engine.runner import ForwardInputs
from poise.model.cache import keep_in_place, make_cache, needs_equal_rows
from poise.offload.kv_stream import KvStream
from poise.plan.group import GroupShape
from poise.predict.hits import Hits

OnText = Callable[[int, str], None]
OnRow = Callable[[Row], None]
OnProgress = Callable[[Progress], None]
OnLogits = Callable[[Row, torch.Tensor], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Listeners:
    """Who is told what, between passes, on the calling thread."""

    on_row: OnRow
    on_text: OnText | None = None
    on_progress: OnProgress | None = None
    on_logits: OnLogits | None = None


class Counters(Protocol):
    """Experts that were in memory when asked for, those that were not, bytes read from disk, experts read ahead, so far."""

    hits: int
    misses: int
    bytes_read: int
    ahead: Hits


class Counted(Protocol):
    """Where experts are, and what was read and found there."""

    @property
    def counters(self) -> Counters: ...


class PassRunner(Protocol):
    """What runs the passes: ``engine.runner`` with experts streamed, ``engine.parallel_runner`` with experts on many ranks.

    ``store``: where the experts of this process are. ``kv``: whose caches lie on disk; None: they are in memory.
    """

    model: Any
    kv: KvStream | None

    @property
    def store(self) -> Counted: ...

    def run(self, group: Sequence[ForwardInputs]) -> list[torch.Tensor]: ...


class Loop:
    """Runs rows to their end, grouped as planned. Longest prompts go first; rows of like length share a batch."""

    def __init__(
        self,
        runner: PassRunner,
        group: GroupShape,
        rows: Sequence[Row],
        *,
        eos: frozenset[int],
        pad_id: int,
        device: torch.device,
    ) -> None:
        self._runner = runner
        self._group = group
        self._queue = in_batches(rows, group.batch_size, equal_rows=needs_equal_rows(runner.model))[::-1]
        self._live: list[Batch] = []
        self._eos = eos
        self._pad_id = pad_id
        self._device = device
        self._total = len(rows)
        self._finished = self._prompt_tokens = self._generated_tokens = 0
        self._prefill_ahead = self._decode_ahead = Hits()

    def run(self, listeners: Listeners) -> Progress:
        """Until every row has finished. Returns the final progress."""
        began = time.monotonic()
        counters = self._runner.store.counters
        hits, misses, bytes_read = counters.hits, counters.misses, counters.bytes_read
        progress = self._progress(began, hits, misses, bytes_read)
        while self._queue or self._live:
            self._admit()
            logits = self._run_pass(counters)
            for batch, logits_BTV in zip(list(self._live), logits, strict=True):
                self._advance(batch, logits_BTV[:, -1].cpu() if batch.yields_tokens else None, listeners)
            self._forget_finished()
            progress = self._progress(began, hits, misses, bytes_read)
            if listeners.on_progress is not None:
                listeners.on_progress(progress)
        return progress

    def _run_pass(self, counters: Counters) -> list[torch.Tensor]:
        is_prefill, ahead = any(batch.prefill_tokens for batch in self._live), counters.ahead
        logits = self._runner.run([batch.inputs() for batch in self._live])
        if is_prefill:
            self._prefill_ahead += counters.ahead - ahead
        else:
            self._decode_ahead += counters.ahead - ahead
        return logits

    def _admit(self) -> None:
        """Queued prompts become new batches, whole batches at a time unless the queue ends or nothing runs."""
        while self._queue:
            free = self._group.max_rows - sum(len(batch.rows) for batch in self._live)
            rows = self._queue[-1]
            size = len(rows)
            if free < size or len(self._live) >= 2 * self._group.num_batches:
                return
            prefill_tokens = sum(batch.prefill_tokens for batch in self._live)
            chunk = min(self._group.chunk_tokens, len(rows[0].prompt_ids))
            if prefill_tokens and prefill_tokens + size * chunk > self._group.pass_tokens:
                return
            self._queue.pop()
            self._prompt_tokens += sum(len(row.prompt_ids) for row in rows)
            batch = Batch(
                rows,
                cache=self._make_cache(rows),
                chunk_tokens=self._group.chunk_tokens,
                pad_id=self._pad_id,
                device=self._device,
            )
            self._live.append(batch)

    def _make_cache(self, rows: Sequence[Row]) -> Any:
        cache, kv = make_cache(self._runner.model), self._runner.kv
        longest = final_tokens(rows)
        if kv is None:
            keep_in_place(self._runner.model, cache, final_tokens=longest)
        else:
            kv.adopt(self._runner.model, cache, rows=len(rows), final_tokens=longest)
        return cache

    def _forget_finished(self) -> None:
        if self._runner.kv is not None:
            for batch in self._live:
                if not batch.rows:
                    self._runner.kv.forget(batch.cache)
        self._live = [batch for batch in self._live if batch.rows]

    def _advance(self, batch: Batch, logits_BV: torch.Tensor | None, listeners: Listeners) -> None:
        if logits_BV is not None and listeners.on_logits is not None:
            for row, logits_V in zip(batch.rows, logits_BV, strict=True):
                listeners.on_logits(row, logits_V)
        for row, piece in batch.advance(logits_BV, self._eos):
            self._generated_tokens += 1
            if piece and listeners.on_text is not None:
                listeners.on_text(row.index, piece)
            if row.finish_reason is not None:
                self._finished += 1
                listeners.on_row(row)

    def _progress(self, began: float, hits: int, misses: int, bytes_read: int) -> Progress:
        counters = self._runner.store.counters
        return Progress(
            finished=self._finished,
            total=self._total,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            bytes_read=counters.bytes_read - bytes_read,
            expert_hits=counters.hits - hits,
            expert_misses=counters.misses - misses,
            elapsed_s=time.monotonic() - began,
            prefill_ahead=self._prefill_ahead,
            decode_ahead=self._decode_ahead,
        )
