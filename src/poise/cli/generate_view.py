"""What `poise generate` shows while it runs: progress on standard error, texts on standard output."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from poise.cli.figures import measured, rates
from poise.cli.output import ResultFile, output_line
from poise.cli.progress import Bar, PlainLines
from poise.cli.prompts import PromptRequest
from poise.engine.request import Progress, RequestOutput


class View:
    """What one call of the engine shows: its callbacks, and the results that no file holds.

    One prompt is streamed; the bar leaves for good when its text begins. Several are printed in order of input, each as
    soon as those before it are finished.
    """

    def __init__(
        self, requests: Sequence[PromptRequest], pending: Sequence[int], file: ResultFile | None, *, prints: bool
    ) -> None:
        self.requests, self.pending, self.file, self.prints = requests, pending, file, prints
        self.streams = prints and len(requests) == 1
        self.streams_experts = True
        self.bar = Bar(len(requests)) if sys.stderr.isatty() else PlainLines()
        self.progress: Progress | None = None
        self._line_by_index: dict[int, dict[str, Any]] = {}
        self._began_s = time.monotonic()
        self._printed = 0  # results
        self._streamed = ""  # the last piece of streamed text

    def on_text(self, index: int, piece: str) -> None:
        self.bar.clear()
        self._streamed = piece or self._streamed
        sys.stdout.write(piece)
        sys.stdout.flush()

    def on_progress(self, progress: Progress) -> None:
        self.progress = progress
        if not self._streamed:
            done = len(self.requests) - len(self.pending) + progress.finished
            message = f"{done}/{len(self.requests)} prompts, {rates(measured(progress, streams=self.streams_experts))}"
            self.bar.show(message, done=done, now_s=progress.elapsed_s)

    def on_made(self, done: int, total: int) -> None:
        """The 4-bit store is being made."""
        message = f"rounding experts to 4 bits, {done:,} of {total:,}"
        self.bar.show(message, done=len(self.requests) * done / total, now_s=time.monotonic() - self._began_s)

    def on_loaded(self, done: int, total: int) -> None:
        """This rank's experts are being read."""
        message = f"reading experts, {done:,} of {total:,}"
        self.bar.show(message, done=len(self.requests) * done / total, now_s=time.monotonic() - self._began_s)

    def on_compile(self) -> None:
        """Planners are being compiled, which only takes long once."""
        message = "making planners ready (the first time on a machine they are compiled)"
        self.bar.show(message, done=len(self.requests), now_s=time.monotonic() - self._began_s)

    def on_result(self, output: RequestOutput) -> None:
        index = self.pending[output.index]
        line = output_line(self.requests[index].head(index), output)
        if self.file is not None:
            self.file.append(line)
            return
        self._line_by_index[index] = line
        while self.prints and not self.streams and self._printed in self._line_by_index:
            self.bar.clear()
            ready = self._line_by_index[self._printed]
            self._printed += 1
            text = ready["text"] or f"token ids {ready['token_ids']}"  # without a tokenizer there is no text
            print(f"[{self._printed}/{len(self.requests)}] {_excerpt(ready)}\n{text}\n", flush=True)

    def held(self) -> list[dict[str, Any]]:
        """The results in order of input."""
        return [self._line_by_index[index] for index in sorted(self._line_by_index)]

    def end(self) -> None:
        """Takes the bar off the screen and ends the last line of streamed text. Safe to call twice."""
        self.bar.clear()
        if self._streamed and not self._streamed.endswith("\n"):
            print(flush=True)
        self._streamed = ""


def _excerpt(line: Mapping[str, Any]) -> str:
    """The beginning of a prompt on one line."""
    text = line.get("prompt") or f"token ids {line['prompt_token_ids']}"
    text = " ".join(text.split())
    return text if len(text) <= 70 else f"{text[:67]}..."
