"""Lookahead predictors choose and learn on a GPU as they do on a CPU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from poise.model.inspect import find_experts
from poise.model.lookahead import Lookahead
from poise.model.lookahead_training import Trainer, Training
from tests.conftest import MakeCheckpoint, OpenRunner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use"),
]
TOKENS, HIDDEN, WIDTH = 200, 64, 16


def on_both(path: Path, architecture: str, open_runner: OpenRunner, width: int | None) -> tuple[Lookahead, Lookahead]:
    """Of one model with its dense weights on the CPU, and of a copy on the GPU."""
    model = open_runner(path).model
    return tuple(  # type: ignore[return-value]
        Lookahead.of_model(each, find_experts(each, architecture), width=width) for each in (model, on_gpu(model))
    )


def on_gpu(model: Any) -> Any:
    """A copy; the experts' matrices, which no router asks for, stay on the meta device."""
    moved = copy.deepcopy(model)
    for module in moved.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and not tensor.is_meta:
                    moved_tensor = tensor.detach().to("cuda")
                    is_parameter = tensors is module._parameters
                    tensors[name] = torch.nn.Parameter(moved_tensor, False) if is_parameter else moved_tensor
    return moved


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "phimoe"])
def test_choices_and_counts_are_those_of_a_cpu(
    architecture: str, checkpoint: MakeCheckpoint, open_runner: OpenRunner
) -> None:
    here, there = on_both(checkpoint(architecture), architecture, open_runner, WIDTH)
    hidden_TH = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
    real_T = torch.arange(TOKENS) % 5 > 0
    assert here.predicted_layers == there.predicted_layers != ()
    for layer in here.predicted_layers:
        outer_EW = torch.randn(here.residual(layer).outer_EW.shape, generator=torch.Generator().manual_seed(layer))
        for lookahead in (here, there):
            with torch.no_grad():
                lookahead.residual(layer).outer_EW.copy_(outer_EW)
                lookahead.residual(layer).inner_WH.copy_(here.residual(layer).inner_WH)
        wanted_TK, chosen_TK = here.choices_TK(layer, hidden_TH), there.choices_TK(layer, hidden_TH.cuda())
        assert chosen_TK.is_cuda
        assert torch.equal(chosen_TK.cpu().sort(dim=1).values, wanted_TK.sort(dim=1).values)
        counts_E = there.counts_E(layer, hidden_TH.cuda(), real_T.cuda())
        assert (counts_E == here.counts_E(layer, hidden_TH, real_T)).all()


def test_a_residual_learns_the_same(checkpoint: MakeCheckpoint, open_runner: OpenRunner) -> None:
    pair = on_both(checkpoint("qwen3_moe"), "qwen3_moe", open_runner, WIDTH)
    generator = torch.Generator().manual_seed(1)
    before_TH, own_TH = torch.randn(2, TOKENS, HIDDEN, generator=generator)
    losses = []
    for lookahead in pair:
        trainer = Trainer(lookahead, Training(batch_tokens=50, warm_up_steps=1))
        device = lookahead.residual(1).inner_WH.device
        losses.append([trainer.learn(1, before_TH.to(device), own_TH.to(device)) for _ in range(10)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[1][-1] < losses[1][0]
