"""The options of `poise generate`, and which of them go together. Nothing here looks at the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from poise.cli.device_memory import check_device_memory
from poise.cli.output import writable_file
from poise.engine.request import QUANTIZATIONS
from poise.engine.sampling import SamplingParams
from poise.errors import UsageError
from poise.units import parse_bytes

AUTO = "auto"
STEPWISE = ("probe", "probe+vibe")
BALANCES = (AUTO, "static", "eplb", "vibe", *STEPWISE)
"""As in ``engine.balances``, which is not imported before it is needed."""
MOST_REPLICA_SLOTS = 16
"""As in ``parallel.step_options``."""


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
    device_memory: str
    dtype: str
    quantize: str
    machine: Path | None
    timeline: Path | None
    correlation_table: Path | None
    save_table: Path | None
    sampling: SamplingParams
    json_output: bool
    expert_parallel: bool = False
    balance: str = AUTO
    lookahead: Path | None = None
    online: bool = False
    replica_slots: int | None = None

    def check(self) -> None:
        """Raises UsageError for what contradicts itself."""
        if self.resume and self.overwrite:
            raise UsageError("--resume and --overwrite contradict each other; give one of them")
        if self.output is None and (self.resume or self.overwrite):
            raise UsageError("--resume and --overwrite are about an output file; name it with --output")
        if self.quantize not in QUANTIZATIONS:
            raise UsageError(f"quantize {self.quantize!r} is not supported; choose one of {', '.join(QUANTIZATIONS)}")
        self._check_ranks()
        if self.memory != "auto":
            parse_bytes(self.memory)
        check_device_memory(self.device, self.device_memory, is_rank=self.expert_parallel)
        written = [("--output", self.output), ("--timeline", self.timeline), ("--save-table", self.save_table)]
        named: dict[Path, str] = {}
        for flag, path in written:
            if path is None:
                continue
            target = path.resolve() if flag == "--output" else writable_file(path)
            if target in named:
                raise UsageError(f"{named[target]} and {flag} name the same file {path}; give two names")
            named[target] = flag

    def _check_ranks(self) -> None:
        """What only ranks heed, and what they do not."""
        if self.balance not in BALANCES:
            raise UsageError(f"balance {self.balance!r} is not supported; choose one of {', '.join(BALANCES)}")
        for_ranks = {"--balance": self.balance != AUTO, "--replica-slots": self.replica_slots is not None}
        given = [flag for flag, is_given in for_ranks.items() if is_given]
        if given and not self.expert_parallel:
            raise UsageError(f"{given[0]} is about ranks that share the experts; give --expert-parallel as well")
        if self.expert_parallel and (self.correlation_table is not None or self.save_table is not None):
            raise UsageError("--correlation-table and --save-table do not go with --expert-parallel; leave them out")
        if self.replica_slots is not None and not 1 <= self.replica_slots <= MOST_REPLICA_SLOTS:
            raise UsageError(f"--replica-slots is {self.replica_slots}; it must be from 1 to {MOST_REPLICA_SLOTS}")
        if self.online and self.lookahead is None and not self.expert_parallel:
            raise UsageError(
                "--online has a lookahead predictor go on learning; give one with --lookahead FILE, or --expert-parallel"
            )
        of_steps = {
            "--lookahead": self.lookahead is not None,
            "--online": self.online,
            "--replica-slots": self.replica_slots is not None,
        }
        unheeded = [flag for flag, is_given in of_steps.items() if is_given]
        if unheeded and self.balance not in (AUTO, *STEPWISE):
            raise UsageError(
                f"{unheeded[0]} is about replicas, and --balance {self.balance} brings none; "
                f"leave it out, or give --balance {' or '.join(STEPWISE)}"
            )
