"""One call of ``ParallelLLM.generate``: what a rank has to tell the others, and on rank 0 what all of them have told."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from poise.engine.batch import Row
from poise.engine.loop import OnProgress
from poise.engine.request import Progress, Prompt, RequestOutput
from poise.engine.result_post import ResultPost
from poise.engine.sampling import SamplingParams
from poise.parallel.group import RankGroup


class Call:
    """``number``: of the call, the same on all ranks. ``results`` and ``progress``: of all ranks, on rank 0 only."""

    def __init__(
        self,
        group: RankGroup,
        prompts: Sequence[Prompt],
        *,
        number: int,
        on_result: Callable[[RequestOutput], None] | None,
        on_progress: OnProgress | None,
    ) -> None:
        self._post = ResultPost(group, call=number)
        self._is_first = group.is_first
        self._prompts = prompts
        self._on_result, self._on_progress = on_result, on_progress
        self._began_s = time.monotonic()
        self._own: Progress | None = None
        self.results: dict[int, RequestOutput] = {}
        self.progress: Progress | None = None

    def finished(self, row: Row) -> None:
        """A request of this rank has ended."""
        self._post.post(
            RequestOutput(index=row.index, prompt=None, prompt_token_ids=row.prompt_ids, outputs=(row.completion(),))
        )

    def advanced(self, progress: Progress) -> None:
        """This rank has run a pass."""
        self._own = progress

    def told(self) -> tuple[int, int, int]:
        """Results posted, prompt tokens and generated tokens so far."""
        own = self._own
        return (self._post.posted, own.prompt_tokens, own.generated_tokens) if own is not None else (0, 0, 0)

    def heard(self, told_R: Sequence[Sequence[int]]) -> None:
        """On rank 0: takes in what finished anywhere since the last time, given what each rank ``told``."""
        if not self._is_first:
            return
        posted_R, prompt_R, generated_R = zip(*told_R, strict=True)
        for result in self._post.fetch(posted_R):
            prompt = self._prompts[result.index]
            self.results[result.index] = named = replace(result, prompt=prompt if isinstance(prompt, str) else None)
            if self._on_result is not None:
                self._on_result(named)
        self.progress = Progress(
            finished=len(self.results),
            total=len(self._prompts),
            prompt_tokens=sum(prompt_R),
            generated_tokens=sum(generated_R),
            bytes_read=0,
            expert_hits=0,
            expert_misses=0,
            elapsed_s=time.monotonic() - self._began_s,
        )
        if self._on_progress is not None:
            self._on_progress(self.progress)


def as_text(rows: Sequence[Row], *, with_timeline: bool) -> str:
    """Requests as rank 0 sends them to the others: token ids, so that one tokenizer has spoken for all."""
    return json.dumps([with_timeline, [[row.prompt_ids, asdict(row.params)] for row in rows]])


def from_text(text: str) -> tuple[list[Prompt], list[SamplingParams], bool]:
    """The requests that ``as_text`` was given, and whether timelines are wanted."""
    with_timeline, asked = json.loads(text)
    prompts: list[Prompt] = [{"prompt_token_ids": ids} for ids, _ in asked]
    return prompts, [SamplingParams(**params) for _, params in asked], with_timeline
