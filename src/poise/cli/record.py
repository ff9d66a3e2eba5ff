"""`poise record`: runs prompts through a model and keeps where their tokens went.

Contract: everything that can be refused without the model is refused before torch is imported; files appear whole, when all
prompts are done, or not at all, so Ctrl-C leaves none. Standard output gets a table or, with --json, one object; progress and
notes go to standard error. Files of the same name are replaced.
Not here: recording (`engine.recorder`), the formats (`spec.trace`, `predict.correlation`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poise.cli.output import writable_file
from poise.cli.progress import Bar, PlainLines, say
from poise.cli.prompts import PromptRequest, place_of, read_requests
from poise.engine.request import Progress
from poise.engine.sampling import SamplingParams
from poise.errors import PromptError, UsageError
from poise.units import format_s, parse_bytes

if TYPE_CHECKING:
    from poise.predict.correlation import CorrelationTable
    from poise.spec.trace import RoutingTrace

JSON_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordOptions:
    """The options of the command, as typed. ``sampling`` holds for prompts that say nothing else."""

    model: str
    prompt_file: str
    output: Path
    table: Path | None
    memory: str
    sampling: SamplingParams
    json_output: bool


def run_record(options: RecordOptions) -> None:
    """Runs the command. Raises UsageError or ReadError."""
    if options.memory != "auto":
        parse_bytes(options.memory)
    if options.table is not None and options.table.resolve() == options.output.resolve():
        raise UsageError(f"--output and --table name the same file {options.output}; give two names")
    requests = read_requests((), options.prompt_file, options.sampling)
    output = writable_file(options.output)
    table_file = None if options.table is None else writable_file(options.table)
    fingerprint, trace, table, elapsed_s = _recorded(options, requests)
    trace.save(output)
    if table is not None and table_file is not None:
        table.save(table_file, model=fingerprint)
    _print(trace, elapsed_s, json_output=options.json_output)
    for path in (output, table_file):
        if path is not None:
            say(f"wrote {path}")


def _recorded(
    options: RecordOptions, requests: Sequence[PromptRequest]
) -> tuple[str, RoutingTrace, CorrelationTable | None, float]:
    """Loads the model and runs the prompts. Returns the model's fingerprint, the trace, the table, and the seconds it took."""
    bar = Bar(len(requests)) if sys.stderr.isatty() else PlainLines()

    def on_progress(progress: Progress) -> None:
        tokens = progress.prompt_tokens + progress.generated_tokens
        message = f"{progress.finished}/{len(requests)} prompts, {tokens} tokens, {recorder.steps} passes"
        bar.show(message, done=progress.finished, now_s=progress.elapsed_s)

    try:
        bar.show(f"loading {options.model}", done=0, now_s=0.0)
        from poise.model.hub import find_checkpoint

        checkpoint = find_checkpoint(options.model)
        from poise.engine.llm import LLM
        from poise.engine.recorder import Recorder
        from poise.model.fingerprint import model_fingerprint
        from poise.predict.correlation import CorrelationTable

        fingerprint = model_fingerprint(checkpoint)
        with LLM(checkpoint.path, memory=options.memory) as llm:
            shape = {"num_layers": len(llm.spec.moe_layers), "num_experts": max(llm.spec.experts_L)}
            top_k = min(llm.spec.top_k, shape["num_experts"])
            table = CorrelationTable(**shape, top_k=top_k, forgets=False) if options.table else None
            recorder = Recorder(llm.spec, table=table)
            llm.runner.listen(recorder)
            try:
                llm.generate(
                    [request.for_engine() for request in requests],
                    [request.sampling for request in requests],
                    on_progress=on_progress,
                )
            except PromptError as error:
                if error.index is None:
                    raise
                place = place_of(options.prompt_file, error.index + 1)
                raise PromptError(f"{place}: {error.reason}") from None
            assert llm.last_progress is not None, "the engine has generated"
            name = Path(options.model).name
            return fingerprint, recorder.trace(f"{name}@{fingerprint}"), table, llm.last_progress.elapsed_s
    finally:
        bar.clear()


def _print(trace: RoutingTrace, elapsed_s: float, *, json_output: bool) -> None:
    summary = summary_of(trace)
    if json_output:
        print(json.dumps({**summary, "elapsed_s": elapsed_s}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{summary['tokens']} tokens in {summary['steps']} passes, {format_s(elapsed_s)}")
    for column in ("layer", "tokens per expert", "most", "max/mean", "experts used"):
        table.add_column(column, justify="right")
    for row in summary["layers"]:
        table.add_row(
            str(row["layer"]),
            f"{row['mean']:.1f}",
            str(row["max"]),
            f"{row['max_over_mean']:.2f}",
            f"{row['used_experts']} of {summary['experts']}",
        )
    Console().print(table)


def summary_of(trace: RoutingTrace) -> dict[str, Any]:
    """What --json prints: the trace's size, and per layer how unevenly its experts were loaded."""
    layers = []
    for layer, load_E in zip(trace.layers, trace.load_LE.tolist(), strict=True):
        mean = sum(load_E) / len(load_E)
        layers.append(
            {
                "layer": layer,
                "max": max(load_E),
                "mean": mean,
                "max_over_mean": max(load_E) / mean if mean else 0.0,
                "used_experts": sum(load > 0 for load in load_E),
            }
        )
    return {
        "version": JSON_VERSION,
        "model": trace.model,
        "steps": len(trace.tokens_per_step),
        "tokens": sum(trace.tokens_per_step),
        "top_k": trace.top_k,
        "experts": trace.counts_NLE.shape[2],
        "layers": layers,
    }
