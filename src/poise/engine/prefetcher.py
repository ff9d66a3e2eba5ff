"""Klotski's prefetcher at work: learns which experts follow which, and tells the store what the next layer will need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from poise.engine.routing import Ints
from poise.model.checkpoint import Checkpoint
from poise.model.fingerprint import model_fingerprint
from poise.offload.expert_store import ExpertStore
from poise.plan.outlook import Foreseen
from poise.plan.schedule import Policy
from poise.predict.correlation import CorrelationTable, sampled
from poise.spec.model_spec import ModelSpec

MAX_LEARNT = 256
"""Of a pass with more tokens an even sample is learnt from: what a pass adds to the table must stay cheap."""


class Prefetcher:
    """A routing listener that foresees, for ``store``, each layer from the one before (the first from its marginals).

    Without a store it only learns. ``passes``: those that it has learnt from to their end.
    """

    def __init__(self, table: CorrelationTable, store: ExpertStore | None) -> None:
        self.passes = 0
        self._table = table
        self._store = store
        self._previous_TK: Ints | None = None

    def on_layer(self, layer: int, chosen_TK: Ints) -> None:
        """See ``engine.routing``. Predicts first: what is learnt from this layer concerns the next pass."""
        after = (layer + 1) % self._table.num_layers
        if self._store is not None:
            chance_E, tokens_E = self._table.foresee(after, chosen_TK)
            self._store.foresee(after, Foreseen(chance_E=chance_E, tokens_E=tokens_E))
        learnt_TK = sampled(chosen_TK, MAX_LEARNT)
        self._table.observe(layer, learnt_TK, self._previous_TK if layer else None)
        self._previous_TK = learnt_TK
        self.passes += after == 0


def prefetcher_bytes(sources_LE: Sequence[Sequence[object]]) -> int:
    """What a prefetcher's table takes in memory."""
    num_experts = max(len(row) for row in sources_LE)
    return CorrelationTable.nbytes_for(num_layers=len(sources_LE), num_experts=num_experts)


def read_table(path: str | Path | None, checkpoint: Checkpoint) -> CorrelationTable | None:
    """What `poise record --table` wrote for this model, as a start. Raises TraceError if it is damaged or of another model."""
    if path is None:
        return None
    table = CorrelationTable.load(Path(path), model=model_fingerprint(checkpoint))
    table.lighten()
    return table


def empty_table(spec: ModelSpec) -> CorrelationTable:
    """A table for the model that knows nothing yet."""
    num_experts = max(spec.experts_L)
    top_k = min(max(1, spec.top_k), num_experts)
    return CorrelationTable(num_layers=len(spec.moe_layers), num_experts=num_experts, top_k=top_k)


def make_prefetcher(policy: Policy, store: ExpertStore, table: CorrelationTable) -> Prefetcher | None:
    """None where the policy has no use for one."""
    return Prefetcher(table, store) if policy.read_ahead in ("foreseen", "hot") else None
