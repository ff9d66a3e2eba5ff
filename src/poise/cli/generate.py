"""`poise generate`: from the options to results, on a terminal or in a file.

Contract: everything that can be refused without the model is refused before torch is imported. Standard output gets the
texts (or, with --json, one object) and nothing else; the plan, progress and statistics go to standard error. Ctrl-C
becomes Interrupted, whose line says whether results are kept.
Not here: what a user can type (`app`), reading prompts (`prompts`), the output file (`output`), generating (`engine`).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poise.cli.expert_parallel import (
    BALANCES,
    Interrupted,
    call_off,
    closing_lines,
    follow,
    telling_others,
    this_launch,
)
from poise.cli.figures import measured, plan_line, rates, say_header, summary, taken
from poise.cli.output import ResultFile, fingerprint, finished_results, output_line, writable_file
from poise.cli.progress import Bar, PlainLines, say
from poise.cli.prompts import PromptRequest, place_of, read_requests
from poise.engine.request import QUANTIZATIONS, Progress, Prompt, RequestOutput
from poise.engine.sampling import SamplingParams
from poise.errors import PromptError, RankLostError, UsageError
from poise.report.bubbles import time_shares
from poise.report.chrome_trace import chrome_trace, write_chrome_trace
from poise.spec.timeline import Timeline
from poise.units import format_s, parse_bytes

if TYPE_CHECKING:
    from poise.engine.llm import LLM
    from poise.engine.parallel_llm import ParallelLLM
    from poise.parallel.launch import Launch


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
    quantize: str
    machine: Path | None
    timeline: Path | None
    correlation_table: Path | None
    save_table: Path | None
    sampling: SamplingParams
    json_output: bool
    expert_parallel: bool = False
    balance: str = "static"

    def check(self) -> None:
        """Raises UsageError for what contradicts itself."""
        if self.resume and self.overwrite:
            raise UsageError("--resume and --overwrite contradict each other; give one of them")
        if self.output is None and (self.resume or self.overwrite):
            raise UsageError("--resume and --overwrite are about an output file; name it with --output")
        if self.quantize not in QUANTIZATIONS:
            raise UsageError(f"quantize {self.quantize!r} is not supported; choose one of {', '.join(QUANTIZATIONS)}")
        if self.balance not in BALANCES:
            raise UsageError(f"balance {self.balance!r} is not supported; choose one of {', '.join(BALANCES)}")
        if self.balance != "static" and not self.expert_parallel:
            raise UsageError("--balance is about ranks that share the experts; give --expert-parallel as well")
        if self.expert_parallel and (self.correlation_table is not None or self.save_table is not None):
            raise UsageError("--correlation-table and --save-table do not go with --expert-parallel; leave them out")
        if self.memory != "auto":
            parse_bytes(self.memory)
        written = [("--output", self.output), ("--timeline", self.timeline), ("--save-table", self.save_table)]
        named: dict[Path, str] = {}
        for flag, path in written:
            if path is None:
                continue
            target = path.resolve() if flag == "--output" else writable_file(path)
            if target in named:
                raise UsageError(f"{named[target]} and {flag} name the same file {path}; give two names")
            named[target] = flag


def run_generate(options: GenerateOptions) -> None:
    """Runs the command. Raises UsageError, ReadError or Interrupted."""
    options.check()
    launch = this_launch() if options.expert_parallel else None
    if launch is not None and launch.rank > 0:
        follow(launch, lambda at: _open_ranks(options, at, None))
        return
    with telling_others(launch):
        requests = read_requests(options.prompts, options.prompt_file, options.sampling)
        heads = [request.head(index) for index, request in enumerate(requests)]
        identity = _identity(options, requests, heads)
        done = finished_results(options.output, heads, identity) if options.output and options.resume else None
        file = None if done is not None else _result_file(options, len(requests), identity)
    if done is not None:
        if launch is not None:
            call_off(launch)
        unknown = (
            "" if done.is_same_run else "; the file does not say of which model and sampling: compared were the prompts"
        )
        say(f"all done: the {len(done.lines)} results are in {options.output}{unknown}")
        _say_that_nothing_ran(options)
        if options.json_output:
            _print_json(done.lines, None, None)
        return
    if file is None:
        _generate(options, requests, None, launch)
        return
    with file as results:
        try:
            _generate(options, requests, results, launch)
            results.finish()
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted; {_what_is_kept(results, options)}") from None
        except RankLostError:
            if results.finished:
                say(_what_is_kept(results, options))
            raise


def _result_file(options: GenerateOptions, total: int, identity: Mapping[str, str]) -> ResultFile | None:
    if options.output is None:
        return None
    return ResultFile(
        options.output, total=total, identity=identity, resume=options.resume, overwrite=options.overwrite
    )


def _what_is_kept(results: ResultFile, options: GenerateOptions) -> str:
    if not results.finished:
        return "no result was finished, and nothing is left behind"
    kept = f"{len(results.finished)} of {results.total} results are kept in {results.journal}"
    if options.resume:
        return f"{kept}; the same command continues"
    return f"{kept}; to continue, give the same command with --resume{' instead of --overwrite' * options.overwrite}"


def _identity(
    options: GenerateOptions, requests: Sequence[PromptRequest], heads: Sequence[Mapping[str, object]]
) -> dict[str, str]:
    """What results depend on. Memory and device are left out: an interrupted run may continue with more of them."""
    return {
        "model": os.path.realpath(options.model) if os.path.exists(options.model) else options.model,
        "dtype": options.dtype,
        "quantize": options.quantize,
        "prompts": fingerprint(heads),
        "sampling options": fingerprint([asdict(request.sampling) for request in requests]),
    }


def _generate(
    options: GenerateOptions, requests: Sequence[PromptRequest], file: ResultFile | None, launch: Launch | None
) -> None:
    """Generates what `file` does not hold yet, shows it, and leaves the terminal tidy whatever happens."""
    finished = file.finished if file is not None else frozenset()
    pending = [index for index in range(len(requests)) if index not in finished]
    view = _View(requests, pending, file, prints=file is None and not options.json_output)
    view.streams &= launch is None
    view.streams_experts = launch is None
    plan = stats = None
    closing: list[str] = []
    if pending:
        try:
            from poise.engine.llm import LLM

            view.bar.show(f"loading {options.model}", done=len(finished), now_s=0.0)
            asked = [(requests[index].for_engine(), requests[index].sampling) for index in pending]
            with _open(options, asked, view) if launch is None else _open_ranks(options, launch, view) as llm:
                view.bar.clear()
                say_header(llm.describe())
                if isinstance(llm, LLM):
                    _run_here(llm, options, asked, view)
                else:
                    llm.generate(
                        [prompt for prompt, _ in asked],
                        [sampling for _, sampling in asked],
                        on_result=view.on_result,
                        on_progress=view.on_progress,
                        with_timelines=options.timeline is not None,
                    )
                    closing = closing_lines(llm, options.timeline)
                stats, plan = taken(llm), llm.describe()
                if isinstance(llm, LLM):
                    closing = [plan_line(plan, stats)]
        except PromptError as error:
            raise _placed(error, pending, options.prompt_file) from None
        finally:
            view.end()
        for line in (*summary(stats), *closing):
            say(line)
    else:
        _say_that_nothing_ran(options)
    if options.json_output:
        _print_json(list(file.lines()) if file is not None else view.held(), stats, plan)


def _open(options: GenerateOptions, asked: Sequence[tuple[Prompt, SamplingParams]], view: _View) -> LLM:
    from poise.engine.llm import LLM

    return LLM(
        options.model,
        memory=options.memory,
        device=options.device,
        dtype=options.dtype,
        quantize=options.quantize,
        machine=options.machine,
        correlation_table=options.correlation_table,
        learns_table=options.save_table is not None,
        on_made=view.on_made,
        expected=asked,
    )


def _open_ranks(options: GenerateOptions, launch: Launch, view: _View | None) -> ParallelLLM:
    from poise.engine.parallel_llm import ParallelLLM

    return ParallelLLM(
        options.model,
        launch,
        memory=options.memory,
        device=options.device,
        dtype=options.dtype,
        quantize=options.quantize,
        machine=options.machine,
        balance=options.balance,
        on_loaded=None if view is None else view.on_loaded,
        on_made=None if view is None else view.on_made,
    )


def _run_here(llm: LLM, options: GenerateOptions, asked: Sequence[tuple[Prompt, SamplingParams]], view: _View) -> None:
    """Generates in this process. Correlation table and timeline are written however that ends."""
    timeline = Timeline() if options.timeline is not None else None
    try:
        llm.generate(
            [prompt for prompt, _ in asked],
            [sampling for _, sampling in asked],
            on_text=view.on_text if view.streams else None,
            on_result=view.on_result,
            on_progress=view.on_progress,
            timeline=timeline,
        )
    finally:
        view.end()
        _save_table(options, llm)
        if options.timeline is not None and timeline is not None and timeline.spans:
            stats = {} if view.progress is None else taken(llm, view.progress)
            _write_timeline(options.timeline, timeline, stats)


def _say_that_nothing_ran(options: GenerateOptions) -> None:
    for flag, path in (("--timeline", options.timeline), ("--save-table", options.save_table)):
        if path is not None:
            say(f"{flag}: nothing was left to run, so {path} is not written")


def _save_table(options: GenerateOptions, llm: LLM) -> None:
    """As far as it has learnt, also when the run was interrupted."""
    if options.save_table is not None and llm.save_table(options.save_table):
        say(f"correlation table in {options.save_table}")


def _write_timeline(path: Path, timeline: Timeline, stats: Mapping[str, Any]) -> None:
    """Writes the file, with what the run took, and says where the time went, bubbles by name."""
    write_chrome_trace(path, chrome_trace(timeline.spans, stats))
    shares = time_shares(timeline.spans)
    parts = {**shares.compute_s, "disk busy": shares.disk_busy_s, **shares.bubbles_s}
    say(", ".join(f"{name} {format_s(seconds)}" for name, seconds in parts.items()))
    say(f"timeline in {path}; open it at https://ui.perfetto.dev")


def _placed(error: PromptError, pending: Sequence[int], source: str | None) -> PromptError:
    """The engine counts the prompts of its call from 0; people count lines of their file, or arguments, from 1."""
    if error.index is None:
        return error
    number = pending[error.index] + 1
    place = f"prompt {number}" if source is None else place_of(source, number)
    return PromptError(f"{place}: {error.reason}")


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


def _print_json(results: Sequence[Mapping[str, Any]], stats: object, plan: object) -> None:
    print(json.dumps({"results": results, "stats": stats, "plan": plan}))
