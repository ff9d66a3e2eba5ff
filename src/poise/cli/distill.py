"""`poise distill`: trains a model's lookahead predictors on text, and examines them on text that they have not seen.

Contract: everything that can be refused without the model is refused before torch is imported; the file appears whole, when
training and examination are done, or not at all, so Ctrl-C leaves none. Standard output gets a table or, with --json, one
object; progress and notes go to standard error. A file of the same name is replaced.
Not here: training (`engine.distillation`), figures (`engine.lookahead_exam`), the format (`model.lookahead`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from poise.cli.output import writable_file
from poise.cli.progress import Bar, PlainLines, say
from poise.cli.prompts import PromptRequest, place_of, read_requests
from poise.engine.request import Progress
from poise.engine.sampling import SamplingParams
from poise.errors import PromptError, UsageError
from poise.units import format_bytes, format_s, parse_bytes

if TYPE_CHECKING:
    from poise.engine.distillation import Windows
    from poise.engine.llm import LLM
    from poise.engine.lookahead_exam import Examiner, LayerMarks

JSON_VERSION = 1
PREDICTORS = ("distilled", "frozen", "correlation", "frequency", "untrained")
ENDLESS_TOKENS = 2**62
"""Documents may be longer than the context: they are cut."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillOptions:
    """The options of the command, as typed. ``control``: None: an untrained model is run too where that is cheap."""

    model: str
    prompt_file: str
    output: Path
    width: int | None
    epochs: int
    control: bool | None
    memory: str
    json_output: bool


def run_distill(options: DistillOptions) -> None:
    """Runs the command. Raises UsageError or ReadError."""
    if options.memory != "auto":
        parse_bytes(options.memory)
    if options.width is not None and options.width < 1:
        raise UsageError(f"--width is {options.width}; it must be at least 1")
    if options.epochs < 1:
        raise UsageError(f"--epochs is {options.epochs}; the text must run at least once")
    requests = read_requests((), options.prompt_file, SamplingParams(max_tokens=1))
    output = writable_file(options.output)
    summary = _distilled(options, requests, output)
    if options.json_output:
        print(json.dumps(summary))
    else:
        _print(summary)
    say(f"wrote {output}")


def _distilled(options: DistillOptions, requests: Sequence[PromptRequest], output: Path) -> dict[str, Any]:
    """Loads the model, trains, examines, and writes the file. Returns what --json prints."""
    progress = _Progress()
    try:
        progress.show(f"loading {options.model}")
        from poise.model.hub import find_checkpoint

        checkpoint = find_checkpoint(options.model)
        from poise.engine.llm import LLM
        from poise.engine.lookahead_control import MOST_BYTES, is_cheap, untrained_recalls
        from poise.engine.lookahead_use import LookaheadUse
        from poise.model.fingerprint import model_fingerprint
        from poise.model.lookahead_training import WIDTH

        use = LookaheadUse(width=options.width or WIDTH, learns=True)
        with LLM(checkpoint.path, memory=options.memory, lookahead=use) as llm:
            windows = _windows(llm, requests, options.prompt_file)
            examiner, learnt_tokens = _taught(llm, windows, options.epochs, progress)
            progress.show("planning on what was predicted")
            marks = examiner.marks()
            assert llm.lookahead is not None, "it was asked for"
            llm.lookahead.save(output, model=model_fingerprint(checkpoint))
            names = llm.spec.moe_layers
        if options.control or (options.control is None and is_cheap(checkpoint)):
            progress.show("running an untrained model")
            untrained = untrained_recalls(checkpoint, windows.held_out, memory=options.memory)
            marks = [_with_control(each, untrained) for each in marks]
        elif options.control is None:
            progress.clear()
            say(
                f"no untrained control: the weights are over {format_bytes(MOST_BYTES)}; --control runs one all the same"
            )
        tokens = {"learnt_tokens": learnt_tokens, "held_out_tokens": examiner.tokens}
        return _summary(options, use.width, tokens, progress.elapsed_s, [(names[each.layer], each) for each in marks])
    finally:
        progress.clear()


def _windows(llm: LLM, requests: Sequence[PromptRequest], source: str) -> Windows:
    """The text in tokens, cut. Raises UsageError."""
    from poise.engine.distillation import cut
    from poise.engine.prompts import token_ids

    assert llm.lookahead is not None, "it was asked for"
    if not llm.lookahead.learning_layers:
        raise UsageError(
            f"no router of model type {llm.spec.model_type!r} can be asked a layer early: there is nothing to distill"
        )
    spec, documents = llm.spec, []
    for index, request in enumerate(requests):
        try:
            ids = token_ids(
                request.for_engine(),
                request.sampling,
                index=index,
                tokenizer=llm.tokenizer,
                vocabulary=spec.vocabulary,
                context_tokens=ENDLESS_TOKENS,
            )
        except PromptError as error:
            raise PromptError(f"{place_of(source, index + 1)}: {error.reason}") from None
        documents.append(ids)
    return cut(documents)


def _taught(llm: LLM, windows: Windows, epochs: int, progress: _Progress) -> tuple[Examiner, int]:
    """Trains, then runs the held-out text. Returns its examiner, and how many tokens were learnt from."""
    from poise.engine.distillation import Teacher
    from poise.engine.lookahead_exam import Examiner
    from poise.model.lookahead_training import Training
    from poise.predict.correlation import CorrelationTable

    lookahead = llm.lookahead
    assert lookahead is not None, "it was asked for"
    shape = {"num_layers": len(llm.spec.moe_layers), "num_experts": max(llm.spec.experts_L)}
    table = CorrelationTable(**shape, top_k=min(llm.spec.top_k, shape["num_experts"]), forgets=False)
    total = epochs * sum(map(len, windows.learnt))
    teacher = Teacher(lookahead, Training(), total_tokens=total, table=table)
    everything = total + sum(map(len, windows.held_out))

    def on_learnt(_: Progress) -> None:
        loss = "" if teacher.loss is None else f", loss {teacher.loss:.3f}"
        progress.show(f"learning: {teacher.tokens} of {total} tokens{loss}", teacher.tokens / everything)

    llm.runner.watch(teacher)
    for _ in range(epochs):
        _run(llm, windows.learnt, on_learnt)
    llm.runner.watch(teacher, on=False)
    examiner = Examiner(lookahead, table=table)

    def on_examined(_: Progress) -> None:
        progress.show(f"examining: {examiner.tokens} tokens", (total + examiner.tokens) / everything)

    llm.runner.watch(examiner)
    _run(llm, windows.held_out, on_examined)
    llm.runner.watch(examiner, on=False)
    return examiner, teacher.tokens


def _run(llm: LLM, windows: Sequence[Sequence[int]], on_progress: Any) -> None:
    prompts = [{"prompt_token_ids": one} for one in windows]
    llm.generate(prompts, SamplingParams(max_tokens=1), on_progress=on_progress)


class _Progress:
    """A bar of the whole command, or lines, and the time it has taken."""

    def __init__(self) -> None:
        import time

        self._now_s = time.monotonic
        self._began_s = self._now_s()
        self._bar = Bar(1) if sys.stderr.isatty() else PlainLines()
        self._done = 0.0

    @property
    def elapsed_s(self) -> float:
        return self._now_s() - self._began_s

    def show(self, message: str, done: float | None = None) -> None:
        self._done = self._done if done is None else done
        self._bar.show(message, done=self._done, now_s=self.elapsed_s)

    def clear(self) -> None:
        self._bar.clear()


def _with_control(marks: LayerMarks, untrained: dict[int, float]) -> LayerMarks:
    return replace(marks, recall={**marks.recall, "untrained": untrained[marks.layer]})


def _summary(
    options: DistillOptions,
    width: int | None,
    tokens: dict[str, int],
    elapsed_s: float,
    marks: Sequence[tuple[int, LayerMarks]],
) -> dict[str, Any]:
    """What --json prints. Layers are the model's own numbers; the first with experts is not among them."""
    return {
        "version": JSON_VERSION,
        "model": options.model,
        "width": width,
        **tokens,
        "elapsed_s": elapsed_s,
        "layers": [{**asdict(each), "layer": name} for name, each in marks],
        "mean": {
            what: {
                name: fmean(getattr(each, what)[name] for _, each in marks if name in getattr(each, what))
                for name in PREDICTORS
                if any(name in getattr(each, what) for _, each in marks)
            }
            for what in ("recall", "misplaced_frac", "left")
        },
    }


def _print(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = (
        f"{summary['learnt_tokens']} tokens learnt, width {summary['width']}, {format_s(summary['elapsed_s'])}; "
        f"on {summary['held_out_tokens']} tokens of other text:"
    )
    mean = summary["mean"]
    for what, heading in (
        ("recall", "of a token's true experts, named"),
        ("misplaced_frac", "of a step's assignments, counted at another expert"),
        ("left", "most tokens of a rank, planned on predicted over true counts"),
    ):
        names = [name for name in PREDICTORS if name in mean[what]]
        table = Table(title=f"{title}\n{heading}" if what == "recall" else heading, title_justify="left")
        for column in ("layer", *names, *(("without", "at best") if what == "left" else ())):
            table.add_column(column, justify="right")
        form = ".2%" if what == "misplaced_frac" else ".1%" if what == "recall" else ".3f"
        for row in summary["layers"]:
            cells = [format(row[what][name], form) if name in row[what] else "" for name in names]
            ends = [f"{row['imbalance']:.2f}", f"{row['balanced']:.3f}"] if what == "left" else []
            table.add_row(str(row["layer"]), *cells, *ends)
        table.add_section()
        table.add_row("mean", *(format(mean[what][name], form) for name in names))
        Console().print(table)
