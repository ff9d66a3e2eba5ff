"""What 4-bit experts cost in accuracy, and bring in bytes and speed: the same model with and without ``quantize="int4"``.

Accuracy: perplexity of the bundled model on text it was not trained on, per domain, teacher-forced in windows. Speed: the
bundled model widened to the size of the demo's, in a third of the memory its bf16 weights need, as child processes that take
turns. Everything it makes, stores included, lies in a temporary directory.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from poise import LLM
from poise.bench.corpus import Domain, load_corpus
from poise.bench.demo import FACTOR, MAX_TOKENS, PROMPTS
from poise.bench.disk import require_disk
from poise.bench.machine import stamp
from poise.bench.results import document, write_result
from poise.engine.request import QUANTIZATIONS
from poise.engine.runner import ForwardInputs, Runner
from poise.errors import PoiseError
from poise.model.widen import widen_checkpoint
from poise.units import MIB, format_bytes

NAME = "int4"
BUNDLED = Path(__file__).parents[1] / "assets" / "tiny-moe"
WINDOW_TOKENS = 512
WINDOWS = 64
"""Per domain: some 32,000 tokens."""
ROUNDS = 3
BUDGET_SHARE = 3
_MEMORY = 1024 * MIB
_TIMEOUT_S = 300.0
Advance = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """Nats per token on one domain's held-out text, with the experts as they are and in 4 bits."""

    domain: str
    tokens: int
    nats_none: float
    nats_int4: float

    @property
    def perplexity_none(self) -> float:
        return math.exp(self.nats_none)

    @property
    def perplexity_int4(self) -> float:
        return math.exp(self.nats_int4)


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """One way of running the widened model: rates round by round; bytes of its experts on disk, and read in a round."""

    quantize: str
    tokens_per_s: tuple[float, ...]
    experts_bytes: int
    read_bytes: int
    hit_frac: float

    @property
    def median_tokens_per_s(self) -> float:
        return statistics.median(self.tokens_per_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything measured. ``weight_error``: relative, mean over experts, of the bundled model."""

    losses: tuple[Loss, ...]
    weight_error: float
    budget_bytes: int
    making_s: float
    speeds: tuple[Speed, ...]


def run(output: Path | None, json_output: bool) -> None:
    """`poise bench int4`."""
    require_disk(Path(tempfile.gettempdir()), 2 * FACTOR * _weights_bytes(BUNDLED))
    steps = 2 + len(QUANTIZATIONS) * (1 + ROUNDS)
    with _steps(steps) as advance, _temporary_cache() as scratch:
        report = _measure(scratch, advance)
    results = asdict(report)
    for entry, loss in zip(results["losses"], report.losses, strict=True):
        entry |= {"perplexity_none": loss.perplexity_none, "perplexity_int4": loss.perplexity_int4}
    for entry, speed in zip(results["speeds"], report.speeds, strict=True):
        entry["median_tokens_per_s"] = speed.median_tokens_per_s
    facts = stamp()
    if json_output:
        print(json.dumps(document(NAME, facts, results)))
    else:
        print_report(report, Console())
    if output is not None:
        print(f"Wrote {write_result(output, NAME, facts, results, today=date.today())}", file=sys.stderr)


def _measure(scratch: Path, advance: Advance) -> Report:
    advance("Reading held-out text")
    domains = load_corpus()
    losses: dict[str, list[tuple[int, float]]] = {}
    weight_error = 0.0
    for quantize in QUANTIZATIONS:
        advance(f"Perplexity, experts: {quantize}")
        with LLM(BUNDLED, memory=_MEMORY, quantize=quantize, on_made=_silent) as llm:
            losses[quantize] = [_nats_per_token(llm, domain) for domain in domains]
            weight_error = float(str(llm.describe().get("int4_weight_error", 0.0)))
    advance("Widening the model")
    model = scratch / "model"
    widen_checkpoint(BUNDLED, model, FACTOR)
    budget_bytes = _weights_bytes(model) // BUDGET_SHARE
    making_s, speeds = _speeds(model, budget_bytes, advance)
    return Report(
        losses=tuple(
            Loss(domain=domain.name, tokens=none[0], nats_none=none[1], nats_int4=int4[1])
            for domain, none, int4 in zip(domains, losses["none"], losses["int4"], strict=True)
        ),
        weight_error=weight_error,
        budget_bytes=budget_bytes,
        making_s=making_s,
        speeds=speeds,
    )


def _weights_bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def _nats_per_token(llm: LLM, domain: Domain) -> tuple[int, float]:
    """Tokens predicted, and their mean loss, over the first windows of a domain's held-out documents, one after the other."""
    ids: list[int] = []
    for text in domain.held_out:
        ids += [*llm.tokenizer(text, verbose=False)["input_ids"], llm.tokenizer.eos_token_id]
        if len(ids) > WINDOWS * WINDOW_TOKENS:
            break
    windows = min(WINDOWS, (len(ids) - 1) // WINDOW_TOKENS)
    if windows < 1:
        raise PoiseError(f"there is too little held-out {domain.name} on this machine: {len(ids)} tokens")
    llm.runner.store.resize(sum(llm.spec.experts_L))
    nats = 0.0
    for begin in range(0, windows * WINDOW_TOKENS, WINDOW_TOKENS):
        nats += window_nats(llm.runner, ids[begin : begin + WINDOW_TOKENS + 1])
    return windows * WINDOW_TOKENS, nats / (windows * WINDOW_TOKENS)


def window_nats(runner: Runner, ids: Sequence[int]) -> float:
    """What the model needs for all tokens of a window but the first, in one forward."""
    ids_T = torch.tensor(ids)
    arguments = {"input_ids": ids_T[None, :-1], "use_cache": False, "past_key_values": None, "logits_to_keep": 0}
    (logits_1TV,) = runner.run([ForwardInputs(arguments=arguments, real_T=None)])
    return float(torch.nn.functional.cross_entropy(logits_1TV[0].float(), ids_T[1:], reduction="sum"))


def _speeds(model: Path, budget_bytes: int, advance: Advance) -> tuple[float, tuple[Speed, ...]]:
    """Seconds that making the store took, and both ways of running, which take turns."""
    rounds: dict[str, list[dict[str, Any]]] = {quantize: [] for quantize in QUANTIZATIONS}
    began_s = time.monotonic()
    _generate(model, budget_bytes, "int4", max_tokens=1)
    with_making_s = time.monotonic() - began_s
    began_s = time.monotonic()
    _generate(model, budget_bytes, "int4", max_tokens=1)
    making_s = with_making_s - (time.monotonic() - began_s)
    for number in range(ROUNDS):
        for quantize in QUANTIZATIONS:
            advance(f"Speed, experts: {quantize}, round {number + 1}")
            rounds[quantize].append(_generate(model, budget_bytes, quantize, max_tokens=MAX_TOKENS))
    return making_s, tuple(
        Speed(
            quantize=quantize,
            tokens_per_s=tuple(each["stats"]["generated_tokens_per_s"] for each in answers),
            experts_bytes=answers[0]["plan"]["expert_bytes"] * answers[0]["plan"]["experts"],
            read_bytes=answers[0]["stats"]["bytes_read"],
            hit_frac=answers[0]["stats"]["hit_frac"],
        )
        for quantize, answers in rounds.items()
    )


def _generate(model: Path, budget_bytes: int, quantize: str, *, max_tokens: int) -> Any:
    """What `poise generate --json` prints for the demo's prompts. Raises PoiseError where it fails."""
    options = ("--memory", str(budget_bytes), "--quantize", quantize, "--max-tokens", str(max_tokens))
    argv = [sys.executable, "-m", "poise", "generate", str(model), *PROMPTS, *options, "--ignore-eos", "--json"]
    environment = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"} | os.environ
    child = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=_TIMEOUT_S)
    if child.returncode != 0:
        said = child.stderr.strip().splitlines() or ["it said nothing"]
        raise PoiseError(f"poise generate failed with exit code {child.returncode}: {said[-1]}")
    return json.loads(child.stdout)


def print_report(report: Report, console: Console) -> None:
    accuracy = Table(title="Perplexity on held-out text")
    for column in ("domain", "tokens", "experts as they are", "int4", "change"):
        accuracy.add_column(column, justify="left" if column == "domain" else "right")
    for loss in report.losses:
        change = f"{loss.perplexity_int4 / loss.perplexity_none - 1:+.2%}"
        figures = (f"{loss.tokens:,}", f"{loss.perplexity_none:.3f}", f"{loss.perplexity_int4:.3f}", change)
        accuracy.add_row(loss.domain, *figures)
    console.print(accuracy)
    speed = Table(title=f"The widened model in {format_bytes(report.budget_bytes)}")
    for column in ("experts", "on disk", "read", "hits", "tokens/s", "slowest", "fastest"):
        speed.add_column(column, justify="left" if column == "experts" else "right")
    for each in report.speeds:
        rates = (each.median_tokens_per_s, min(each.tokens_per_s), max(each.tokens_per_s))
        sizes = (format_bytes(each.experts_bytes), format_bytes(each.read_bytes), f"{each.hit_frac:.0%}")
        speed.add_row(each.quantize, *sizes, *(f"{rate:.3g}" for rate in rates))
    console.print(speed)
    console.print(
        f"Relative weight error {report.weight_error:.3f} (mean over experts); the widened model's store was made in "
        f"{report.making_s:.1f} s."
    )


def _silent(done: int, total: int) -> None:
    """The benchmark has a bar of its own."""


@contextmanager
def _temporary_cache() -> Iterator[Path]:
    """A directory, gone at the end, below which 4-bit stores go meanwhile, those of child processes too."""
    before = os.environ.get("XDG_CACHE_HOME")
    with tempfile.TemporaryDirectory(prefix="poise-int4-") as scratch:
        os.environ["XDG_CACHE_HOME"] = scratch
        try:
            yield Path(scratch)
        finally:
            if before is None:
                del os.environ["XDG_CACHE_HOME"]
            else:
                os.environ["XDG_CACHE_HOME"] = before


@contextmanager
def _steps(total: int) -> Iterator[Advance]:
    """A bar on standard error, gone at the end."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total, completed=-1)
        yield lambda name: progress.update(task, description=name, advance=1)
