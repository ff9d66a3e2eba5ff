"""`poise demo`: a model with real routing under a tight memory budget, beside transformers with Accelerate's offload.

The bundled checkpoint is widened into a temporary directory on the disk. Poise and the baseline then run one after the
other as child processes, with the same prompts, under the same memory limit, page cache included, which the kernel
enforces where it lets us. Everything temporary goes when the demo ends, on Ctrl-C too. It shows; it is no benchmark: one
run each, on a small model.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from poise.bench.demo_report import Contender, DemoReport, print_report
from poise.bench.direct_read import ReadPattern, measure_patterns
from poise.bench.disk import best_of, require_disk, scratch_file
from poise.bench.limits import ChildResult, Limits, forget_cached
from poise.bench.machine import stamp
from poise.bench.results import document
from poise.errors import CheckpointError, PoiseError
from poise.profile.mounts import in_memory
from poise.units import MIB

PROMPTS = (
    'def read_config(path, encoding="utf-8"):\n    """Read a configuration file and return a dictionary.\n',
    "class TestQueue(unittest.TestCase):\n    def test_empty(self):\n        q = queue.Queue()\n",
    "The command reads lines from the standard input and writes",
)
FACTOR = 64
MAX_TOKENS = 32
BUDGET_SHARE = 3
"""The budget is the weights divided by this."""
BASELINE_MAX_S = 60.0
"""The baseline stops generating after the step that passes this, so that the demo ends on any machine."""
_TIMEOUT_S = 300.0
_DISK_BYTES = 256 * MIB
_DISK_PATTERNS = tuple(
    ReadPattern(order="random", block_bytes=block_bytes, threads=threads)
    for block_bytes in (MIB, 4 * MIB)
    for threads in (1, 2)
)
_BASE_SCRIPT = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
from transformers import AutoModelForCausalLM, AutoTokenizer
print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmRSS:")))
"""

Steps = Callable[[str], Callable[[float], None]]
"""Shows a step by name; what it returns is told the share done (0-1), or never called where that is not known."""


def run_demo(json_output: bool, checkpoint: Path | None = None) -> None:
    """Run the demo on ``checkpoint``, the bundled one if None, and print the report, or one JSON document.

    Raises UsageError where the disk is too small or the checkpoint is missing, PoiseError where a child fails.
    """
    source = checkpoint or Path(__file__).parents[1] / "assets" / "tiny-moe"
    with _steps() as step, tempfile.TemporaryDirectory(prefix="poise-demo-", dir=_directory(source)) as scratch:
        report = _measure(source, Path(scratch), step)
    if json_output:
        facts = stamp(
            limits_enforced=report.limits_enforced, limits_missing=report.limits_missing, environment=_environment()
        )
        derived = {"speedup": report.speedup, "disk_frac": report.disk_frac, "same_texts": report.same_texts}
        print(json.dumps(document("demo", facts, asdict(report) | derived)))
    else:
        print_report(report, Console())


def _measure(source: Path, scratch: Path, step: Steps) -> DemoReport:
    from poise.model.widen import widen_checkpoint  # loads torch, which `poise --help` must not wait for

    on_share = step("Measuring the disk")
    with scratch_file(scratch, _DISK_BYTES) as path:
        disk = best_of(measure_patterns(path, _DISK_PATTERNS, rounds=5, round_s=0.1, seed=0, on_progress=on_share))
    on_share = step("Widening the model")
    model = scratch / "model"
    widen_checkpoint(source, model, FACTOR, on_progress=lambda done, total: on_share(done / total))
    prompts = scratch / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    step("Measuring what the imports take")
    base_bytes = _base_bytes()
    weights_bytes = _weights_bytes(model)
    budget_bytes = weights_bytes // BUDGET_SHARE
    with Limits(memory_bytes=base_bytes + budget_bytes) as limits:
        step("Poise generates")
        forget_cached(model)
        poise, plan = _run_poise(limits, model, prompts, budget_bytes)
        accelerate, remark = None, "Accelerate is not installed; for the comparison: pip install 'poise[bench]'"
        if importlib.util.find_spec("accelerate"):
            step("Accelerate generates")
            forget_cached(model)
            accelerate, remark = _run_accelerate(limits, model, prompts, budget_bytes, scratch / "offload")
        return DemoReport(
            prompts=PROMPTS,
            max_tokens=MAX_TOKENS,
            factor=FACTOR,
            weights_bytes=weights_bytes,
            base_bytes=base_bytes,
            budget_bytes=budget_bytes,
            disk_bytes_per_s=disk.median_bytes_per_s,
            poise=poise,
            accelerate=accelerate,
            remark=remark or None,
            plan=plan,
            limits_enforced=limits.enforced,
            limits_missing=limits.missing,
        )


def _run_poise(limits: Limits, model: Path, prompts: Path, budget_bytes: int) -> tuple[Contender, dict[str, object]]:
    child = limits.run(
        [
            *(sys.executable, "-m", "poise", "generate", str(model), "--prompts", str(prompts), "--json"),
            *("--max-tokens", str(MAX_TOKENS), "--memory", str(budget_bytes)),
        ],
        env=_environment(),
        timeout_s=_TIMEOUT_S,
    )
    answer = _answer(child, "Poise")
    stats = answer["stats"]
    contender = Contender(
        start_s=child.elapsed_s - stats["elapsed_s"],
        generate_s=stats["elapsed_s"],
        generated_tokens=stats["generated_tokens"],
        read_bytes=stats["bytes_read"],
        peak_bytes=child.peak_bytes or stats["peak_bytes"],
        texts=tuple(result["text"] for result in answer["results"]),
    )
    return contender, answer["plan"]


def _run_accelerate(
    limits: Limits, model: Path, prompts: Path, budget_bytes: int, offload: Path
) -> tuple[Contender | None, str]:
    """The baseline's figures and a remark on them. It may hold weights up to the budget: with more it is killed."""
    child = limits.run(
        [
            *(
                sys.executable,
                "-m",
                "poise.bench.accelerate_baseline",
                "--model",
                str(model),
                "--prompts",
                str(prompts),
            ),
            *("--max-tokens", str(MAX_TOKENS), "--memory", str(budget_bytes), "--batch-size", str(len(PROMPTS))),
            *("--offload-folder", str(offload), "--max-time", str(BASELINE_MAX_S)),
        ],
        env=_environment(),
        timeout_s=_TIMEOUT_S,
    )
    if child.out_of_memory:
        return None, "Accelerate was killed by the kernel: it needs more memory than the limit."
    if child.timed_out:
        return None, f"Accelerate was stopped: it did not finish within {_TIMEOUT_S:.0f} s."
    report = _answer(child, "Accelerate")
    generate_s = report["prefill_s"] + report["decode_s"]
    contender = Contender(
        start_s=child.elapsed_s - generate_s,
        generate_s=generate_s,
        generated_tokens=report["generated_tokens"],
        read_bytes=report["read_bytes"],
        peak_bytes=child.peak_bytes or report["peak_bytes"],
        texts=tuple(result["text"] for result in report["results"]),
    )
    stopped = f"Accelerate was stopped after {BASELINE_MAX_S:.0f} s of generating; its rate is over that time."
    return contender, stopped if generate_s > BASELINE_MAX_S else ""


def _base_bytes() -> int:
    """Resident set of a process after the imports of both contenders, in bytes.

    Shared libraries count, although this child's reading them leaves them in the page cache at neither contender's
    cost. So the limit is looser by their size, which helps the contender that reads through the page cache.
    """
    wanted = ["poise.engine.llm", "accelerate", "transformers.models.qwen3_moe.modeling_qwen3_moe"]
    found = [name for name in wanted if name != "accelerate" or importlib.util.find_spec(name)]
    with Limits() as limits:
        child = limits.run([sys.executable, "-c", _BASE_SCRIPT, *found], env=_environment(), timeout_s=_TIMEOUT_S)
    return int(_answer(child, "importing Poise"))


def _answer(child: ChildResult, name: str) -> Any:
    """The JSON that a child printed. Raises PoiseError, with the end of what it said, if it failed."""
    if child.out_of_memory:
        raise PoiseError(f"{name} was killed by the kernel: it needed more memory than the limit of this demo")
    if child.timed_out:
        raise PoiseError(f"{name} did not finish within {_TIMEOUT_S:.0f} s")
    if child.returncode != 0:
        said = child.stderr.strip().splitlines() or ["it said nothing"]
        raise PoiseError(f"{name} failed with exit code {child.returncode}: {said[-1]}")
    return json.loads(child.stdout)


def _weights_bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def _directory(source: Path) -> Path:
    """Where the demo's files go: the widened model, its copy in Accelerate's folder and a scratch file."""
    if not source.is_dir():
        raise CheckpointError(f"the demo's model is missing: {source} is not a directory; install Poise again")
    directory = Path(tempfile.gettempdir())
    if in_memory(directory) and "TMPDIR" not in os.environ and Path("/var/tmp").is_dir():
        directory = Path("/var/tmp")  # by custom on the disk, where /tmp is often in memory
    require_disk(directory, 2 * FACTOR * _weights_bytes(source) + _DISK_BYTES)
    return directory


def _environment() -> dict[str, str]:
    """The same for both contenders. OpenMP threads that spin for long lose most of a machine that is not idle."""
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    return {"GOMP_SPINCOUNT": "10000"} | os.environ | quiet


@contextmanager
def _steps() -> Iterator[Steps]:
    """A line of progress per step on standard error, gone at the end."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:

        def finish(tasks: Sequence[Any]) -> None:
            for task in tasks:
                progress.update(task.id, total=1.0, completed=1.0)

        def step(name: str) -> Callable[[float], None]:
            finish(progress.tasks)
            task = progress.add_task(name, total=None)
            return lambda share: progress.update(task, total=1.0, completed=share)

        yield step
