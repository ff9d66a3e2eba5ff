"""What tests of the tiers share: a model opened with forced slots in each tier, its tokens and logits, plain ones besides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from poise import LLM, SamplingParams
from poise.engine.blueprint import Options, draw_up
from poise.errors import BudgetError
from poise.offload.device_loader import DeviceLoader

LENGTHS = (5, 41, 1, 17, 33, 9, 2)
NEW_TOKENS = (8, 3, 6, 8, 5, 2, 7)
DEVICE_MEMORY = "1GiB"


def memory_for(path: Path, host_slots: int | None, device: str = "cpu") -> int:
    """A budget of DRAM that holds so many experts; None: all of a small model."""
    if host_slots is None:
        return 4 << 30
    tiers: dict[str, Any] = {"device": device, "device_memory": DEVICE_MEMORY}
    with pytest.raises(BudgetError) as refused:
        draw_up(path, Options(memory=1, **tiers))
    smallest = refused.value.smallest_bytes
    tier = draw_up(path, Options(memory=smallest, **tiers)).tier
    assert tier is not None
    assert tier.host_slots == 1
    return smallest + (host_slots - 1) * tier.host_slot_bytes


def open_tiers(path: Path, slots: int | None, host_slots: int | None, device: str = "cpu", **options: Any) -> LLM:
    """Three batches of two rows, with slots as forced."""
    memory = memory_for(path, host_slots, device)
    forced = {"expert_slots": slots, "groups": [(2, 3)], "device_memory": DEVICE_MEMORY, **options}
    return LLM(path, memory=memory, device=device, **forced)


def supplier_of(llm: LLM) -> DeviceLoader:
    """What copies to the device."""
    supplier = llm._open()._supplier
    assert isinstance(supplier, DeviceLoader)
    return supplier


def run(llm: LLM, prompts: Sequence[Sequence[int]], **listeners: Any) -> list[tuple[list[int], torch.Tensor]]:
    """The new tokens of each prompt, and the logits (T, V) that they were chosen from."""
    seen: dict[int, list[torch.Tensor]] = {index: [] for index in range(len(prompts))}
    results = llm.generate(
        [{"prompt_token_ids": list(ids)} for ids in prompts],
        [SamplingParams(max_tokens=tokens, ignore_eos=True) for tokens in NEW_TOKENS[: len(prompts)]],
        on_logits=lambda row, logits_V: seen[row.index].append(logits_V),
        **listeners,
    )
    return [(list(each.outputs[0].token_ids), torch.stack(seen[each.index])) for each in results]


def error(model: Any, ids: Sequence[int], new_ids: Sequence[int], logits_TV: torch.Tensor) -> float:
    """The largest difference from the plain model's logits over the same tokens, as a share of the largest of these."""
    with torch.no_grad():
        ids_BT = torch.tensor([[*ids, *new_ids]], device=model.device)
        want_TV = model(ids_BT).logits[0, len(ids) - 1 : -1].cpu()
    return float((logits_TV - want_TV).abs().max() / want_TV.abs().max())


def smallest_device(path: Path, prompt: Any, params: SamplingParams, device: str = "cpu") -> int:
    """What the refusal of a device that is far too small names."""
    says = r"device memory budget of 1 KiB .* smallest that works is \d+ bytes"
    with pytest.raises(BudgetError, match=says) as refused:
        LLM(path, memory="4GiB", device=device, device_memory=1024, expected=[(prompt, params)])
    return refused.value.smallest_bytes


class Interrupts:
    """Ctrl-C in the middle of a pass, when experts of a layer have been asked for."""

    def __init__(self, after: int = 4) -> None:
        self._left = after

    def on_layer(self, layer: int, chosen_TK: object) -> None:
        """A layer of some pass."""
        self._left -= 1
        if not self._left:
            raise KeyboardInterrupt
