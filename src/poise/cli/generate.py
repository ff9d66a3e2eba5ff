"""`poise generate`: from the options to results, on a terminal or in a file.

Contract: everything that can be refused without the model is refused before torch is imported. Standard output gets the
texts (or, with --json, one object) and nothing else; the plan, progress and statistics go to standard error. Ctrl-C
becomes Interrupted, whose line says whether results are kept.
Not here: what a user can type (`app`), reading prompts (`prompts`), the output file (`output`), generating (`engine`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poise.cli.expert_parallel import (
    Interrupted,
    call_off,
    closing_lines,
    follow,
    said_once,
    telling_others,
    this_launch,
)
from poise.cli.figures import learnt_lines, plan_line, say_header, summary, taken
from poise.cli.generate_options import GenerateOptions
from poise.cli.generate_view import View
from poise.cli.output import ResultFile, fingerprint, finished_results
from poise.cli.progress import say
from poise.cli.prompts import PromptRequest, place_of, read_requests
from poise.engine.request import Prompt
from poise.engine.sampling import SamplingParams
from poise.errors import PromptError, RankLostError
from poise.report.bubbles import time_shares
from poise.report.chrome_trace import chrome_trace, write_chrome_trace
from poise.spec.timeline import Timeline
from poise.units import format_s

if TYPE_CHECKING:
    from poise.engine.llm import LLM
    from poise.engine.parallel_llm import ParallelLLM
    from poise.parallel.launch import Launch


def run_generate(options: GenerateOptions) -> None:
    """Runs the command. Raises UsageError, ReadError or Interrupted."""
    with said_once(on_ranks=options.expert_parallel):
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
    view = View(requests, pending, file, prints=file is None and not options.json_output)
    view.streams &= launch is None
    view.streams_experts = launch is None
    plan = stats = None
    closing: list[str] = []
    if pending:
        try:
            view.bar.show(f"loading {options.model}", done=len(finished), now_s=0.0)
            if launch is None:
                from poise.model.hub import find_checkpoint

                find_checkpoint(options.model)
            from poise.engine.llm import LLM

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
                    closing = [plan_line(plan, stats), *learnt_lines(llm, stats)]
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


def _open(options: GenerateOptions, asked: Sequence[tuple[Prompt, SamplingParams]], view: View) -> LLM:
    from poise.engine.llm import LLM
    from poise.engine.lookahead_use import LookaheadUse

    use = (
        None
        if options.lookahead is None
        else LookaheadUse(file=options.lookahead, prefetches=True, online=options.online)
    )
    return LLM(
        options.model,
        memory=options.memory,
        device=options.device,
        device_memory=None if options.device_memory == "auto" else options.device_memory,
        dtype=options.dtype,
        quantize=options.quantize,
        machine=options.machine,
        correlation_table=options.correlation_table,
        lookahead=use,
        learns_table=options.save_table is not None,
        on_made=view.on_made,
        expected=asked,
    )


def _open_ranks(options: GenerateOptions, launch: Launch, view: View | None) -> ParallelLLM:
    from poise.engine.parallel_llm import ParallelLLM
    from poise.parallel.step_options import StepOptions

    steps = {"lookahead": options.lookahead, "replica_slots": options.replica_slots}
    given: dict[str, Any] = {name: value for name, value in steps.items() if value is not None}
    if options.online:
        given["online"] = True
    return ParallelLLM(
        options.model,
        launch,
        memory=options.memory,
        device=options.device,
        dtype=options.dtype,
        quantize=options.quantize,
        machine=options.machine,
        balance=options.balance,
        steps=StepOptions(**given) if given else None,
        on_loaded=None if view is None else view.on_loaded,
        on_made=None if view is None else view.on_made,
        on_compile=None if view is None else view.on_compile,
    )


def _run_here(llm: LLM, options: GenerateOptions, asked: Sequence[tuple[Prompt, SamplingParams]], view: View) -> None:
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


def _print_json(results: Sequence[Mapping[str, Any]], stats: object, plan: object) -> None:
    print(json.dumps({"results": results, "stats": stats, "plan": plan}))
