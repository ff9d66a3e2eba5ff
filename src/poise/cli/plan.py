"""`poise plan`: what would run and why, as a table or as JSON. Runs nothing and loads no weights.

Contract: standard output gets the plan and nothing else; notes go to standard error. A budget in which nothing fits is one
line with the smallest that would do, and exit code 2.
Not here: planning (`plan.pipeline`), what a model takes (`engine.blueprint`), the tables (`plan_tables`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from poise.cli.device_memory import check_device_memory
from poise.cli.plan_tables import plan_as_json, print_plan
from poise.cli.prompts import PromptRequest, place_of, read_requests
from poise.engine.request import QUANTIZATIONS, UNKNOWN_PROMPT_TOKENS, UNKNOWN_REQUESTS
from poise.engine.sampling import SamplingParams
from poise.errors import PromptError, UsageError
from poise.units import parse_bytes

if TYPE_CHECKING:
    from poise.engine.blueprint import Blueprint
    from poise.plan.workload import Workload


MOST_REQUESTS = 100_000
"""Each is looked at by itself: twice as many would take twice the seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """The options of the command, as typed. Of ``sampling`` only the number of tokens matters."""

    model: str
    prompt_file: str | None
    num_requests: int | None
    prompt_tokens: int | None
    memory: str
    device: str
    device_memory: str
    dtype: str
    quantize: str
    machine: Path | None
    correlation_table: Path | None
    trace: Path | None
    sampling: SamplingParams
    json_output: bool

    def check(self) -> None:
        """Raises UsageError for what contradicts itself."""
        if self.prompt_file is not None and (self.num_requests is not None or self.prompt_tokens is not None):
            raise UsageError(
                "--prompts says how many requests there are and how long; leave out --num-requests and --prompt-tokens"
            )
        for name, value in (("--num-requests", self.num_requests), ("--prompt-tokens", self.prompt_tokens)):
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 1")
        if self.num_requests is not None and self.num_requests > MOST_REQUESTS:
            raise UsageError(
                f"--num-requests is {self.num_requests}; it may be at most {MOST_REQUESTS:,}: more run in waves like these"
            )
        if self.correlation_table is not None and self.trace is not None:
            raise UsageError("--correlation-table and --trace both say where tokens go; give one of them")
        if self.quantize not in QUANTIZATIONS:
            raise UsageError(f"quantize {self.quantize!r} is not supported; choose one of {', '.join(QUANTIZATIONS)}")
        if self.memory != "auto":
            parse_bytes(self.memory)
        check_device_memory(self.device, self.device_memory)


def run_plan(options: PlanOptions) -> None:
    """Runs the command. Raises UsageError."""
    options.check()
    requests = read_requests((), options.prompt_file, options.sampling) if options.prompt_file is not None else None
    from poise.model.hub import find_checkpoint

    checkpoint = find_checkpoint(options.model)
    from poise.engine.blueprint import Options, draw_up

    drawn = draw_up(
        checkpoint.path,
        Options(
            memory=options.memory,
            device=options.device,
            device_memory=None if options.device_memory == "auto" else options.device_memory,
            dtype=options.dtype,
            quantize=options.quantize,
            machine=options.machine,
            correlation_table=options.correlation_table,
            trace=options.trace,
        ),
        makes_store=False,
    )
    workload = _workload(options, drawn, requests)
    plan = drawn.plan(workload)
    if options.json_output:
        print(json.dumps(plan_as_json(drawn, workload, plan)))
    else:
        print_plan(drawn, workload, plan)


def _workload(options: PlanOptions, drawn: Blueprint, requests: list[PromptRequest] | None) -> Workload:
    from poise.engine.planning import workload_of
    from poise.plan.workload import Workload

    if requests is not None:
        try:
            return workload_of(
                [drawn.row(index, each.for_engine(), each.sampling) for index, each in enumerate(requests)]
            )
        except PromptError as error:
            if error.index is None or options.prompt_file is None:
                raise
            raise PromptError(f"{place_of(options.prompt_file, error.index + 1)}: {error.reason}") from None
    count = options.num_requests or UNKNOWN_REQUESTS
    tokens, new = options.prompt_tokens or UNKNOWN_PROMPT_TOKENS, options.sampling.max_tokens
    if tokens + new > drawn.spec.context_tokens:
        raise UsageError(
            f"{tokens} prompt tokens and {new} more are longer than the model's context of {drawn.spec.context_tokens}; "
            "lower --prompt-tokens or --max-tokens"
        )
    return Workload(prompt_tokens=(tokens,) * count, new_tokens=(new,) * count)
