"""What foreseeing experts is worth to the engine: policies of reading ahead, on the bundled model widened, in a third of it.

The same sampled texts (fixed seeds) for every policy, so routing is the same; each policy has an engine of its own that has
run once before, with the pipeline's plan. Rounds of the policies alternate. Counts hardly depend on the machine's load; tokens
a second do.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress as Bar
from rich.table import Table
from transformers import AutoTokenizer

from poise.bench.corpus import load_corpus
from poise.bench.machine import stamp
from poise.bench.results import document, write_result
from poise.bench.routed_text import EXPERTS, LAYERS, MODEL, windows_of
from poise.engine.llm import LLM
from poise.engine.request import Progress
from poise.engine.sampling import SamplingParams
from poise.model.widen import widen_checkpoint
from poise.plan.schedule import Policy
from poise.predict.hits import Hits

NAME = "prefetch-engine"
FACTOR = 64
SEQUENCES = (1, 4, 16)
SLOTS = LAYERS * EXPERTS // 3
POLICIES = (
    Policy(read_ahead="none"),
    Policy(read_ahead="likely"),
    Policy(read_ahead="foreseen"),
    Policy(read_ahead="likely", ahead=SLOTS // 8),
    Policy(read_ahead="foreseen", ahead=SLOTS // 8),
    Policy(read_ahead="hot", ahead=SLOTS // 8),
)
"""``ahead`` as the pipeline's plan has it (None), and an eighth of the slots."""
PROMPT_TOKENS = 32
NEW_TOKENS = 48
ROUNDS = 3
TEMPERATURE = 0.9
COUNTED = ("misses", "reads", "prefetched")
"""Of the store's counters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One policy in one condition; medians over the rounds. A miss was not in memory when it was asked for.

    ``ahead_used_frac``, ``ahead_hottest_frac``: of all rounds' decode passes, see ``predict.guesses``; None: none was read.
    """

    sequences: int
    policy: str
    ahead: int
    misses_per_pass: float
    reads_per_pass: float
    prefetched_per_pass: float
    ahead_used_frac: float | None
    ahead_hottest_frac: float | None
    cpu_s_per_pass: float
    tokens_per_s: tuple[float, ...]


def run(output: Path | None, json_output: bool) -> None:
    """`poise bench prefetch-engine`."""
    torch.set_num_threads(1)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="poise-prefetch-") as scratch, _bar() as bar:
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        texts = [windows_of(tokenizer, one, "held_out", max(SEQUENCES)).tolist() for one in load_corpus()]
        prompts = [window[:PROMPT_TOKENS] for pair in zip(*texts, strict=False) for window in pair]
        task = bar.add_task("Generating", total=len(SEQUENCES) * len(POLICIES) * (ROUNDS + 1))
        model = Path(scratch) / "wide"
        widen_checkpoint(MODEL, model, FACTOR)
        for sequences in SEQUENCES:
            outcomes += measure(model, prompts[:sequences], on_round=lambda: bar.advance(task))
    facts = stamp()
    results: dict[str, object] = {
        "model": "tiny-moe",
        "factor": FACTOR,
        "expert_slots": SLOTS,
        "experts": LAYERS * EXPERTS,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "outcomes": [asdict(one) for one in outcomes],
    }
    if json_output:
        print(json.dumps(document(NAME, facts, results)))
    else:
        _print_table(outcomes)
    if output is not None:
        print(f"Wrote {write_result(output, NAME, facts, results, today=date.today())}", file=sys.stderr)


def measure(
    model: Path, prompts: Sequence[Sequence[int]], *, on_round: Callable[[], None], rounds: int = ROUNDS
) -> list[Outcome]:
    """Every policy over the same prompts, each with an engine of its own."""
    runs: dict[Policy, list[Run]] = {policy: [] for policy in POLICIES}
    texts = set()
    with ExitStack() as stack:
        llms = {
            policy: stack.enter_context(LLM(model, memory="3GiB", expert_slots=SLOTS, policy=policy))
            for policy in POLICIES
        }
        for number in range(rounds + 1):
            for policy in POLICIES if number % 2 else POLICIES[::-1]:
                measured, text = generate_once(llms[policy], prompts)
                texts.add(text)
                on_round()
                if number:
                    runs[policy].append(measured)
        assert len(texts) == 1, "policies of reading ahead changed the text"
        planned = int(str(llms[POLICIES[0]].describe()["prefetch_experts"]))
    return [outcome_of(policy.read_ahead, policy.ahead or planned, len(prompts), each) for policy, each in runs.items()]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One call of ``generate``."""

    passes: int
    counters: Mapping[str, int]
    ahead: Hits
    cpu_s: float
    tokens_per_s: float


def generate_once(llm: LLM, prompts: Sequence[Sequence[int]]) -> tuple[Run, tuple[tuple[int, ...], ...]]:
    """(what it took, the tokens)."""
    passes: list[Progress] = []
    before = copy(llm.runner.store.counters)
    began_s = time.process_time()
    results = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [
            SamplingParams(max_tokens=NEW_TOKENS, temperature=TEMPERATURE, seed=seed, ignore_eos=True)
            for seed in range(len(prompts))
        ],
        on_progress=passes.append,
    )
    after = llm.runner.store.counters
    counters = {name: getattr(after, name) - getattr(before, name) for name in COUNTED}
    made = Run(
        passes=len(passes),
        counters=counters,
        ahead=passes[-1].decode_ahead,
        cpu_s=time.process_time() - began_s,
        tokens_per_s=passes[-1].generated_tokens_per_s,
    )
    return made, tuple(result.outputs[0].token_ids for result in results)


def outcome_of(policy: str, ahead_at_most: int, sequences: int, runs: Sequence[Run]) -> Outcome:
    """Medians over one policy's rounds."""

    def per_pass(name: str) -> float:
        return statistics.median(one.counters[name] / one.passes for one in runs)

    ahead = sum((one.ahead for one in runs), Hits())
    return Outcome(
        sequences=sequences,
        policy=policy,
        ahead=ahead_at_most,
        misses_per_pass=per_pass("misses"),
        reads_per_pass=per_pass("reads"),
        prefetched_per_pass=per_pass("prefetched"),
        ahead_used_frac=ahead.used_frac,
        ahead_hottest_frac=ahead.hottest_frac,
        cpu_s_per_pass=statistics.median(one.cpu_s / one.passes for one in runs),
        tokens_per_s=tuple(one.tokens_per_s for one in runs),
    )


def _bar() -> Bar:
    return Bar(console=Console(stderr=True), transient=True)


def _print_table(outcomes: Sequence[Outcome]) -> None:
    title = f"Reading ahead, {SLOTS} of {LAYERS * EXPERTS} experts in memory; per pass"
    table = Table(title=title, title_justify="left")
    for column in ("rows", "policy", "at most", "misses", "reads", "ahead", "used", "hottest", "CPU ms", "tokens/s"):
        table.add_column(column, justify="left" if column == "policy" else "right", no_wrap=True)
    for place, one in enumerate(outcomes, start=1):
        table.add_row(
            str(one.sequences),
            one.policy,
            "" if one.policy == "none" else str(one.ahead),
            f"{one.misses_per_pass:.1f}",
            f"{one.reads_per_pass:.1f}",
            f"{one.prefetched_per_pass:.1f}",
            "" if one.ahead_used_frac is None else f"{one.ahead_used_frac:.0%}",
            "" if one.ahead_hottest_frac is None else f"{one.ahead_hottest_frac:.0%}",
            f"{one.cpu_s_per_pass * 1e3:.0f}",
            f"{statistics.median(one.tokens_per_s):.1f}",
            end_section=place % len(POLICIES) == 0,
        )
    Console().print(table)
