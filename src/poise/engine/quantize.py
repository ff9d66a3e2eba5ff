"""``quantize="int4"``: the experts of a checkpoint exchanged for those of its 4-bit store, which is made first if need be.

Only here is it decided whether a model can take 4-bit experts, and that making the store stays within the memory budget.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from poise.errors import BudgetError, CheckpointError
from poise.model.checkpoint import Checkpoint
from poise.model.inspect import ExpertsModule, own_dtype
from poise.model.int4_making import OnMade, Original, make_store, making_bytes
from poise.model.int4_store import Int4Store, int4_layout, open_store, plan_store, store_directory
from poise.model.layout import CheckpointLayout
from poise.plan.memory import OVERHEAD_BYTES
from poise.units import format_bytes


def experts_in_4_bits(
    checkpoint: Checkpoint,
    layout: CheckpointLayout,
    model: Any,
    modules: Sequence[ExpertsModule],
    *,
    budget_bytes: int,
    on_made: OnMade | None,
    waits: bool = False,
) -> tuple[CheckpointLayout, Int4Store]:
    """The layout that reads from the 4-bit store, and the store.

    ``on_made`` is told of each expert that had to be made; None draws a bar. ``waits``: while another process makes it.
    Raises CheckpointError for experts that cannot be held in 4 bits, a damaged store or a disk that is too full, BudgetError
    where there is no memory for making a store.
    """
    transposed = _is_transposed(model, modules)
    directory = store_directory(checkpoint)
    shards = plan_store(directory, layout, transposed=transposed)
    store = open_store(directory, shards)
    if store is None:
        dtype = own_dtype(checkpoint)
        needed = OVERHEAD_BYTES + max(making_bytes(source, dtype) for row in layout.experts_LE for source in row)
        if needed > budget_bytes:
            raise BudgetError(
                f"a memory budget of {format_bytes(budget_bytes)} is too small to make the 4-bit store; give at least "
                f"{needed} bytes ({format_bytes(needed)}) once: a store that is there needs less",
                smallest_bytes=needed,
            )
        original = Original(checkpoint=checkpoint, layout=layout, model=model, dtype=dtype, transposed=transposed)
        with _bar() if on_made is None else nullcontext(on_made) as listener:
            store = make_store(original, directory, shards, listener, waits=waits)
        before, after = (
            sum(source.nbytes for row in each.experts_LE for source in row)
            for each in (layout, int4_layout(layout, shards, store))
        )
        print(
            f"poise: int4: experts take {format_bytes(after)} instead of {format_bytes(before)}, relative weight error "
            f"{store.weight_error:.3f} (mean over experts); kept in {directory}",
            file=sys.stderr,
            flush=True,
        )
    return int4_layout(layout, shards, store), store


def layout_in_4_bits(
    checkpoint: Checkpoint, layout: CheckpointLayout, model: Any, modules: Sequence[ExpertsModule]
) -> CheckpointLayout:
    """The same layout whether the store is there or not; nothing is made, so experts have no checksums and cannot be read."""
    shards = plan_store(store_directory(checkpoint), layout, transposed=_is_transposed(model, modules))
    return int4_layout(layout, shards, None)


def _is_transposed(model: Any, modules: Sequence[ExpertsModule]) -> bool:
    """Raises CheckpointError for experts that cannot be held in 4 bits."""
    experts = [model.get_submodule(module.name) for module in modules]
    for module in experts:
        if hasattr(module, "expert_forward"):
            raise CheckpointError(
                f"quantize 'int4' is not supported for {type(module).__name__}, whose experts have an arithmetic of their "
                "own; leave quantize at 'none'"
            )
    return bool(experts[0].is_transposed)


@contextmanager
def _bar() -> Iterator[OnMade]:
    """A bar on standard error, gone at the end."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Rounding experts to 4 bits", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
