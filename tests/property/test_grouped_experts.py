"""Experts computed by grouped products give what one product after the other gives, in whatever slots they lie."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.parallel import grouped_experts
from poise.parallel.grouped_experts import Groups, can_group, run_grouped, stacks_of
from tests.grouped_cases import EXPERTS, HIDDEN, INNER, SLOT_ELEMENTS, Layer, experts_module, in_slot, layer_of


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    absent = draw(st.integers(0, EXPERTS - 1))
    return layer_of(
        draw(st.integers(0, 100_000)),
        slots=EXPERTS + draw(st.integers(0, 30)),
        replicas=draw(st.integers(0, min(3, EXPERTS - absent))),
        tokens=draw(st.integers(1, 20)),
        top_k=draw(st.integers(1, 4)),
        absent=absent,
    )


@settings(deadline=None, max_examples=60)
@given(layers())
def test_outputs_are_those_of_one_product_after_the_other(layer: Layer) -> None:
    assert can_group(layer.module, torch.bfloat16, layer.held)
    made = layer.run()
    wanted_MH, size_MH = layer.one_by_one()
    assert made.partial_MH.dtype == torch.bfloat16
    assert ((made.partial_MH.float() - wanted_MH).abs() <= 0.02 * size_MH).all()
    chosen = layer.experts_MK[layer.experts_MK < EXPERTS]
    assert (made.pairs, made.active) == (len(chosen), len(chosen.unique()))


@settings(deadline=None, max_examples=30)
@given(layers(), st.integers(0, 2**32 - 1))
def test_a_row_does_not_depend_on_the_order_in_which_rows_came(layer: Layer, seed: int) -> None:
    order_M = torch.randperm(len(layer.rows_MH), generator=torch.Generator().manual_seed(seed))
    tensors = {name: getattr(layer, name)[order_M] for name in ("rows_MH", "experts_MK", "weights_MK")}
    torch.testing.assert_close(replace(layer, **tensors).run().partial_MH, layer.run().partial_MH[order_M])


@settings(deadline=None, max_examples=30)
@given(layers())
def test_slots_far_apart_are_stacks_of_their_own(layer: Layer) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped_experts, "MOST_GROUPS", 4)
        stacks, group_of = stacks_of(layer.held, "gate_up_proj")
        made = layer.run()
    assert set(group_of) == set(layer.held)
    for stack in stacks:
        assert len(stack.up_GNH) <= 4
        for expert, group in group_of.items():
            if stack.first <= group < stack.end:
                assert torch.equal(stack.up_GNH[group - stack.first], layer.held[expert]["gate_up_proj"][0])
                assert torch.equal(stack.down_GHI[group - stack.first], layer.held[expert]["down_proj"][0])
    torch.testing.assert_close(made.partial_MH, layer.run().partial_MH)


def test_what_a_grouped_product_cannot_take_is_left_to_others() -> None:
    slots, plain, with_bias = torch.zeros(2, SLOT_ELEMENTS), experts_module(), experts_module()
    with_bias.has_bias = True
    halves = {0: {"gate_up_proj": tuple(torch.zeros(2, INNER, HIDDEN).bfloat16())}}
    assert can_group(plain, torch.bfloat16, {0: in_slot(slots.bfloat16(), 1)})
    assert not can_group(plain, torch.float32, {0: in_slot(slots, 0)})
    assert not can_group(with_bias, torch.bfloat16, {0: in_slot(slots.bfloat16(), 0)})
    assert not can_group(plain, torch.bfloat16, halves)


def test_tokens_for_an_expert_that_is_not_here_are_refused() -> None:
    held = {3: in_slot(torch.zeros(1, SLOT_ELEMENTS).bfloat16(), 0)}
    rows_MH, module = torch.zeros(1, HIDDEN).bfloat16(), experts_module()
    groups = Groups.of(module, held, rows_MH.device)
    with pytest.raises(AssertionError, match=r"not here, which has \[3\]"):
        run_grouped(module, rows_MH, torch.tensor([[3, 5]]), torch.ones(1, 2), groups)


def test_groups_are_of_the_same_experts_in_the_same_places_only() -> None:
    slots = torch.zeros(4, SLOT_ELEMENTS).bfloat16()
    held = {expert: in_slot(slots, expert) for expert in range(3)}
    groups = Groups.of(experts_module(), held, slots.device)
    assert groups.are_of(dict(held))
    for other in ({0: held[0], 1: held[1]}, {**held, 3: in_slot(slots, 3)}, {**held, 2: in_slot(slots, 3)}):
        assert not groups.are_of(other)
    del held[2]
    assert not groups.are_of(held), "an expert has left"
