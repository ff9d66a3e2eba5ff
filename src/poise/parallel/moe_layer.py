"""One MoE layer over all ranks: tokens to their experts, each expert once, outputs back to their owners.

It takes the place of ``model.moe_layer.run_experts`` over a store of one's own: parked batches in, their outputs out. All
ranks come to every layer, those without tokens with none. Sums do not depend on the order in which anything arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from time import perf_counter, perf_counter_ns

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from poise.model.layout import Weights
from poise.model.moe_layer import joined, real_choices_TK, run_experts
from poise.model.seam import Parked
from poise.model.streams import settle
from poise.parallel.exchange import Received, TokenExchange
from poise.parallel.grouped_experts import Groups, can_group, pays_on, run_grouped
from poise.parallel.learning import Learning
from poise.parallel.rank_experts import RankExperts
from poise.parallel.routes import Copies, Routes, route
from poise.parallel.step_balance import StepBalance
from poise.parallel.step_note import StepNote, Travel
from poise.spec.timeline import COMPUTE, EXCHANGE, Span, Timeline


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRecord:
    """What a rank did in one MoE layer of one pass. Seconds and bytes are this rank's own.

    ``routed_tokens``: (token, expert) pairs it computed; ``active_experts``: how many experts they met. ``compute_s``: that
    took. ``waited_s``: for the last rank to arrive with its tokens. ``dispatch_s``: until the rows had come. ``combine_s``:
    from its own last expert until all outputs were back, with the wait for the slowest rank. ``sent_bytes``: of tokens to
    other ranks, one way.

    ``note``: what balancing the step did, whose ``told_s`` is part of ``waited_s``.
    """

    layer: int
    routed_tokens: int
    active_experts: int
    compute_s: float
    waited_s: float
    dispatch_s: float
    combine_s: float
    total_s: float
    sent_bytes: int
    note: StepNote


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Turn:
    """Tokens on their way through one MoE layer: those of ``tokens`` batches, joined. Shapes as in ``parallel.exchange``.

    ``routes``: None where steps are balanced, which needs an exchange.
    """

    layer: int
    began_s: float
    tokens: tuple[int, ...]
    hidden_TH: torch.Tensor
    choice_TK: torch.Tensor
    weights_TK: torch.Tensor
    routes: Routes | None


@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    """This rank's part of the outputs of the rows that came, how many pairs and experts that took, and how long."""

    partial_MH: torch.Tensor
    routed_tokens: int
    active_experts: int
    compute_s: float


class ExpertParallelLayers:
    """The MoE layers of one rank. ``modules_L``: the experts modules; ``copies_L``: who has which expert, layer by layer."""

    def __init__(
        self,
        modules_L: Sequence[nn.Module],
        experts: RankExperts,
        exchange: TokenExchange,
        copies_L: Sequence[Copies],
        *,
        rank: int,
    ) -> None:
        assert len(modules_L) == len(copies_L), "a layer without a placement"
        self._modules_L = modules_L
        self.experts = experts
        self._exchange = exchange
        self._whole_balance: StepBalance | None = None
        self._balance: StepBalance | None = None
        """Of the pass at hand: None where it rests."""
        self.learning: Learning | None = None
        """Learns in passes that are balanced."""
        self.copies_L = list(copies_L)
        self._rank = rank
        self.is_grouped = pays_on(exchange.device)
        """Whether experts are computed all at once, where their form allows it."""
        self._groups = dict[int, Groups]()
        """Where a layer's experts were last."""
        self.records: list[LayerRecord] | None = None
        """Of all layers since whoever reads them last began a new list; None where nobody does."""
        self.counts_LE: npt.NDArray[np.int64] | None = None
        """Choices of this rank's own tokens, added up where somebody wants to know."""
        self.on_record: Callable[[LayerRecord], None] | None = None
        """Is told of each layer, on the thread that exchanges."""
        self.timeline: Timeline | None = None
        """Gets the experts' spans, and those of exchanges."""

    @property
    def balance(self) -> StepBalance | None:
        """Balances each step, where that is wanted."""
        return self._whole_balance

    @balance.setter
    def balance(self, balance: StepBalance | None) -> None:
        self._whole_balance = balance
        self.begin_pass()

    def begin_pass(self) -> None:
        """On all ranks alike, once ``balance`` has begun it."""
        balance = self._whole_balance
        self._balance = self._exchange.aside = None if balance is None or balance.rests else balance
        self._exchange.learning = self.learning if self._balance else None

    @property
    def is_balanced(self) -> bool:
        """Whether the pass at hand is."""
        return self._balance is not None

    def run(self, parked: Sequence[Parked], real: Sequence[torch.Tensor | None], *, layer: int) -> list[torch.Tensor]:
        """The experts' outputs for every parked batch, shapes as their hidden states; none for no batch.

        Raises RankLostError when a rank is lost.
        """
        turn = self.prepare(parked, real, layer=layer)
        with self._waiting("wait: rows", layer):
            received = self.dispatch(turn)
        computed = self.compute(turn, received)
        with self._waiting("wait: outputs", layer):
            return self.combine(turn, received, computed)

    def prepare(self, parked: Sequence[Parked], real: Sequence[torch.Tensor | None], *, layer: int) -> Turn:
        """The first of the four steps of ``run``: where the tokens go. No exchange."""
        for entry in parked[:1]:
            settle(entry.hidden_TH.device)  # what comes before is not this layer's time
        began_s = perf_counter()
        hidden_TH, choice_TK, weights_TK = self._joined(parked, real)
        if self.learning is not None and self.is_balanced:
            self.learning.on_layer(layer, parked, real)
        if self.counts_LE is not None:
            num_experts = self.counts_LE.shape[1]
            self.counts_LE[layer] += torch.bincount(choice_TK.flatten(), minlength=num_experts + 1)[:num_experts].numpy(
                force=True
            )
        return Turn(
            layer=layer,
            began_s=began_s,
            tokens=tuple(len(entry.hidden_TH) for entry in parked),
            hidden_TH=hidden_TH,
            choice_TK=choice_TK,
            weights_TK=weights_TK,
            routes=None if self._balance else route(choice_TK, self.copies_L[layer], source_rank=self._rank),
        )

    def dispatch(self, turn: Turn) -> Received:
        """The second step, an exchange. All ranks do all exchanges in the same order, on one thread at a time."""
        routes, coming = turn.routes, None
        if self._balance is not None:
            copies = self.copies_L[turn.layer]
            routes, coming = self._balance.routes(turn.layer, turn.hidden_TH, turn.choice_TK, copies)
        assert routes is not None, "who does not balance has routes"
        began_ns = perf_counter_ns()
        received = self._exchange.dispatch(turn.hidden_TH, turn.weights_TK, routes, layer=turn.layer, coming=coming)
        if self.timeline is not None:
            met_ns = began_ns + round(received.waited_s * 1e9)
            self.timeline.spans.append(Span(EXCHANGE, "wait: last rank", began_ns, met_ns, {"layer": turn.layer}))
            self.timeline.add(EXCHANGE, "dispatch", met_ns, layer=turn.layer, bytes=received.nbytes)
        return received

    def compute(self, turn: Turn, received: Received) -> Computed:
        """The third step: this rank's experts. No exchange."""
        computed = self._compute(received, turn.layer)
        if self._balance is not None:
            self._balance.computed(
                pairs=computed.routed_tokens,
                active=computed.active_experts,
                seconds=computed.compute_s,
                travel=travel_of(received, self._rank, computed.routed_tokens),
            )
        return computed

    def combine(self, turn: Turn, received: Received, computed: Computed) -> list[torch.Tensor]:
        """The last step, an exchange."""
        began_ns = perf_counter_ns()
        output_TH = self._exchange.combine(computed.partial_MH, received, tokens=sum(turn.tokens), layer=turn.layer)
        if self.timeline is not None:
            self.timeline.add(EXCHANGE, "combine", began_ns, layer=turn.layer)
        if self.records is not None or self.on_record is not None:
            self._tell(turn, received, computed, combine_s=(perf_counter_ns() - began_ns) / 1e9)
        return list(torch.split(output_TH, list(turn.tokens))) if turn.tokens else []

    def _tell(self, turn: Turn, received: Received, computed: Computed, *, combine_s: float) -> None:
        note = StepNote(home_pairs=computed.routed_tokens, rested=1)
        if self._balance is not None:
            note = self._balance.note
            note.counts_s += 0.0 if note.rested else received.waited_s
        if self.learning is not None:
            learnt = self.learning.taken()
            note.learnt_steps, note.learnt_s, note.learnt_late = learnt.steps, learnt.seconds, learnt.late
        record = LayerRecord(
            layer=turn.layer,
            routed_tokens=computed.routed_tokens,
            active_experts=computed.active_experts,
            compute_s=computed.compute_s,
            waited_s=received.waited_s + note.told_s,
            dispatch_s=received.rows_s,
            combine_s=combine_s,
            total_s=perf_counter() - turn.began_s,
            sent_bytes=received.nbytes,
            note=note,
        )
        if self.records is not None:
            self.records.append(record)
        if self.on_record is not None:
            self.on_record(record)

    def _waiting(self, name: str, layer: int) -> AbstractContextManager[None]:
        """The computing thread can do nothing else meanwhile."""
        return nullcontext() if self.timeline is None else self.timeline.span(COMPUTE, name, layer=layer)

    def _joined(
        self, parked: Sequence[Parked], real: Sequence[torch.Tensor | None]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All batches' hidden states, choices (as many as there are experts where there is none) and weights."""
        if not parked:
            return self._exchange.nothing()
        num_experts: int = parked[0].module.num_experts  # type: ignore[assignment]
        index_TK = joined([entry.top_k_index_TK for entry in parked])
        choice_TK = real_choices_TK(index_TK, real, [len(entry.hidden_TH) for entry in parked], num_experts)
        return (
            joined([entry.hidden_TH for entry in parked]),
            choice_TK,
            joined([entry.top_k_weights_TK for entry in parked]),
        )

    def _compute(self, received: Received, layer: int) -> Computed:
        began_s = perf_counter()
        module = self._modules_L[layer]
        held = self.experts.layer(layer)
        if self._balance is not None and self._balance.replicas:
            held = {**held, **self._balance.replicas}
        if not len(received.hidden_MH):
            return Computed(received.hidden_MH, 0, 0, perf_counter() - began_s)
        if self.is_grouped and can_group(module, received.hidden_MH.dtype, held):
            groups = self._groups.get(layer)
            if groups is None or not groups.are_of(held):
                groups = self._groups[layer] = Groups.of(module, held, received.hidden_MH.device)
            made = run_grouped(module, received.hidden_MH, received.experts_MK, received.weights_MK, groups)
            settle(made.partial_MH.device)  # times are of what is computed, not of what is queued
            compute_s = perf_counter() - began_s
            if self.timeline is not None:
                begin_ns = round(began_s * 1e9)
                detail = {"layer": layer, "experts": made.active, "rows": made.pairs}
                self.timeline.spans.append(
                    Span(COMPUTE, "experts", begin_ns, begin_ns + round(compute_s * 1e9), detail)
                )
            return Computed(made.partial_MH, made.pairs, made.active, compute_s)
        return self._compute_in_turn(module, received, held, layer, began_s)

    def _compute_in_turn(
        self, module: nn.Module, received: Received, held: Mapping[int, Weights], layer: int, began_s: float
    ) -> Computed:
        num_experts: int = module.num_experts  # type: ignore[assignment]
        experts_MK, place_MK = received.experts_MK.sort(dim=1)
        counts_E = torch.bincount(experts_MK.flatten(), minlength=num_experts + 1)[:num_experts]
        active = counts_E.nonzero().flatten().tolist()
        most = int((experts_MK < num_experts).sum(dim=1).max())
        entry = Parked(
            module=module,
            hidden_TH=received.hidden_MH,
            top_k_index_TK=experts_MK[:, :most],
            top_k_weights_TK=received.weights_MK.gather(1, place_MK)[:, :most],
        )
        (partial_MH,) = run_experts(_InTurn(held, active), [entry], [None], layer=layer, timeline=self.timeline)
        settle(partial_MH.device)
        return Computed(partial_MH, int(counts_E.sum()), len(active), perf_counter() - began_s)


def travel_of(received: Received, rank: int, pairs: int) -> Travel:
    """Rows and pairs that go from ``rank`` and come to it, of which it computed ``pairs`` in all."""
    routes = received.routes
    return Travel(
        rows_out=len(routes.token_N) - routes.sent_R[rank],
        pairs_out=sum(routes.pairs_R) - routes.pairs_R[rank],
        rows_in=sum(received.received_R) - received.received_R[rank],
        pairs_in=pairs - routes.pairs_R[rank],
    )


class _InTurn:
    """Experts that are all in memory, handed out by number."""

    def __init__(self, held: Mapping[int, Weights], active: Sequence[int]) -> None:
        missing = [expert for expert in active if expert not in held]
        assert not missing, f"tokens came for experts {missing}, which are not here"
        self._experts = iter([(expert, held[expert]) for expert in active])

    def take(self) -> tuple[int, Weights]:
        return next(self._experts)

    def release(self, expert: int) -> None:
        """It stays where it is."""
