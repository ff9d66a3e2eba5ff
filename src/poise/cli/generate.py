"""`poise generate`: from the options to results, on a terminal or in a file.

Contract: everything that can be refused without the model is refused before torch is imported. Standard output gets the
texts (or, with --json, one object) and nothing else; the plan, progress and statistics go to standard error. Ctrl-C becomes
Interrupted, whose line says whether results are kept.
Not here: what a user can type (`app`), reading prompts (`prompts`), the output file (`output`), generating (the engine).
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poise.cli.output import ResultFile, finished_lines, fingerprint
from poise.cli.prompts import PromptRequest, read_requests
from poise.engine.request import Progress, RequestOutput
from poise.engine.sampling import SamplingParams
from poise.errors import UsageError
from poise.units import format_bytes, format_s, parse_bytes

if TYPE_CHECKING:
    from poise.engine.llm import LLM

SECONDS_BETWEEN_LINES = 10.0
"""How often progress is reported where there is no terminal to draw a bar on."""


class Interrupted(Exception):  # noqa: N818 - it is no error
    """Ctrl-C during a run. The message is the line to print."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateOptions:
    """The options of the command, as typed. ``sampling`` holds for prompts that say nothing else."""

    model: str
    prompts: tuple[str, ...]
    prompt_file: str | None
    output: Path | None
    resume: bool
    overwrite: bool
    memory: str
    device: str
    dtype: str
    sampling: SamplingParams
    json_output: bool

    def check(self) -> None:
        """Raises UsageError for what contradicts itself."""
        if self.resume and self.overwrite:
            raise UsageError("--resume and --overwrite contradict each other; give one of them")
        if self.output is None and (self.resume or self.overwrite):
            raise UsageError("--resume and --overwrite are about an output file; name it with --output")
        if self.memory != "auto":
            parse_bytes(self.memory)


def run_generate(options: GenerateOptions) -> None:
    """Runs the command. Raises UsageError, ReadError or Interrupted."""
    options.check()
    requests = read_requests(options.prompts, options.prompt_file, options.sampling)
    if options.output is None:
        _generate(options, requests, None)
        return
    heads = [request.head(index) for index, request in enumerate(requests)]
    done = finished_lines(options.output, heads) if options.resume else None
    if done is not None:
        _say(f"all done: the {len(done)} results are in {options.output}")
        if options.json_output:
            _print_json(done, None, None)
        return
    identity = _identity(options, requests, heads)
    with ResultFile(
        options.output, total=len(requests), identity=identity, resume=options.resume, overwrite=options.overwrite
    ) as results:
        try:
            _generate(options, requests, results)
            results.finish()
        except KeyboardInterrupt:
            raise Interrupted(_kept(results)) from None


def _kept(results: ResultFile) -> str:
    if not results.finished:
        return "interrupted; no result was finished, nothing is left behind"
    count = f"{len(results.finished)} of {results.total} results"
    return f"interrupted; {count} are kept in {results.journal}; add --resume to the same command to continue"


def _identity(
    options: GenerateOptions, requests: Sequence[PromptRequest], heads: Sequence[Mapping[str, object]]
) -> dict[str, str]:
    """What results depend on. Memory and device are left out: an interrupted run may continue with more of them."""
    return {
        "model": os.path.realpath(options.model),
        "dtype": options.dtype,
        "prompts": fingerprint(heads),
        "sampling": fingerprint([asdict(request.sampling) for request in requests]),
    }


def _generate(options: GenerateOptions, requests: Sequence[PromptRequest], file: ResultFile | None) -> None:
    """Generates what `file` does not hold yet, shows it, and leaves the terminal tidy whatever happens."""
    finished = file.finished if file is not None else frozenset()
    pending = [index for index in range(len(requests)) if index not in finished]
    view = _View(requests, pending, file, prints=file is None and not options.json_output)
    plan = stats = None
    if pending:
        try:
            view.bar.show(f"loading {options.model}", done=len(finished), now_s=0.0)
            from poise.engine.llm import LLM

            with LLM(options.model, memory=options.memory, device=options.device, dtype=options.dtype) as llm:
                view.bar.clear()
                plan = llm.describe()
                _say(_header(plan, llm))
                llm.generate(
                    [requests[index].for_engine() for index in pending],
                    [requests[index].sampling for index in pending],
                    on_text=view.on_text if view.streams else None,
                    on_result=view.on_result,
                    on_progress=view.on_progress,
                )
                stats = _stats(view.progress, llm)
        finally:
            view.end()
        _say(_summary(stats))
    if options.json_output:
        _print_json(list(file.lines()) if file is not None else view.held(), stats, plan)


class _View:
    """What one call of the engine shows: its callbacks, and the results that no file holds.

    One prompt is streamed; the bar leaves for good when its text begins. Several are printed in order of input, each as
    soon as those before it are finished.
    """

    def __init__(
        self, requests: Sequence[PromptRequest], pending: Sequence[int], file: ResultFile | None, *, prints: bool
    ) -> None:
        self.requests, self.pending, self.file, self.prints = requests, pending, file, prints
        self.streams = prints and len(requests) == 1
        self.bar = _Bar(len(requests)) if sys.stderr.isatty() else _PlainLines()
        self.progress: Progress | None = None
        self._line_by_index: dict[int, dict[str, Any]] = {}
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
            message = f"{done}/{len(self.requests)} prompts, {_rates(progress)}"
            self.bar.show(message, done=done, now_s=progress.elapsed_s)

    def on_result(self, output: RequestOutput) -> None:
        index = self.pending[output.index]
        line = _output_line(self.requests[index].head(index), output)
        if self.file is not None:
            self.file.append(line)
            return
        earlier = self._in_order()
        self._line_by_index[index] = line
        if self.prints and not self.streams:
            self.bar.clear()
            for ready in range(earlier, self._in_order()):
                print(f"[{ready + 1}/{len(self.requests)}] {_excerpt(self._line_by_index[ready])}")
                print(self._line_by_index[ready]["text"], end="\n\n", flush=True)

    def held(self) -> list[dict[str, Any]]:
        """The results in order of input."""
        return [self._line_by_index[index] for index in sorted(self._line_by_index)]

    def end(self) -> None:
        """Takes the bar off the screen and ends the last line of streamed text."""
        self.bar.clear()
        if self._streamed and not self._streamed.endswith("\n"):
            print(flush=True)

