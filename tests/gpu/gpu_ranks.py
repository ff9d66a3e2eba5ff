"""A model over several ranks on GPUs, which share one where there are too few: what each rank and rank 0 has to tell."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from poise.engine.parallel_llm import ParallelLLM
from poise.engine.sampling import SamplingParams
from poise.model.inspect import find_experts
from poise.parallel.launch import Launch
from poise.parallel.moe_layer import LayerRecord
from poise.parallel.watch import Patience

PATIENT = Patience(start_s=120, behind_s=60, silent_s=60)
"""Whoever uses a GPU for the first time, beside others that do, may keep Python's lock for seconds."""
Logits = dict[tuple[int, ...], torch.Tensor]
"""By token ids, of the last one."""


def generate(
    launch: Launch,
    path: Path,
    prompts: list[list[int]],
    options: dict[str, Any],
    slow_ranks: Sequence[int] = (),
    slow_rows: int = 8,
) -> dict[str, Any]:
    """``options``: of ``ParallelLLM``, and ``tokens``. On ``slow_ranks`` each product takes as long as 3 ms a row, for at most
    ``slow_rows``."""
    tokens, records, logits = options.pop("tokens"), list[LayerRecord](), Logits()
    with ParallelLLM(path, launch, memory="2GiB", patience=PATIENT, device="cuda", groups=[(1, 2)], **options) as llm:
        runner = llm.runner
        assert next(runner.model.parameters()).is_cuda
        assert not computes_in_tf32(), "sums would be of other numbers"
        _keep_logits(runner.model, logits, {tuple(prompt) for prompt in prompts})
        if launch.rank in slow_ranks:
            _slow_down(runner.model, slow_rows)
        take = runner.layers.on_record
        assert take is not None
        runner.layers.on_record = lambda record: (records.append(record), take(record))[1]
        made = []
        if launch.rank > 0:
            llm.follow()
        else:
            params = SamplingParams(max_tokens=tokens, ignore_eos=True)
            made = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, with_timelines=True)
        history = [] if llm.balancing is None else llm.balancing.history
        return {
            "tokens": [list(each.outputs[0].token_ids) for each in made],
            "logits": logits,
            "records": records,
            "moved": sum(change.moved_experts for change in history),
            "exchanges": llm.describe()["exchanges"],
            "peak": llm.peak_bytes - llm.base_bytes,
            "spans": {span.name for timeline in llm.timelines for span in timeline.spans},
        }


def plain(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers alone, on the GPU, experts as its classes are written."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, experts_implementation="eager")
    return model.eval().to("cuda")


def greedy(model: Any, prompt: Sequence[int], tokens: int) -> list[int]:
    """By whole forwards."""
    ids = torch.tensor([prompt], device="cuda")
    with torch.inference_mode():
        for _ in range(tokens):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return [int(token) for token in ids[0, len(prompt) :]]


def largest_error(model: Any, logits: Logits) -> float:
    """Relative to the largest logit."""
    return max(errors(model, logits))


def errors(model: Any, logits: Logits) -> list[float]:
    """Of each prompt, relative to its largest logit."""
    found = []
    for prompt, own_V in logits.items():
        with torch.inference_mode():
            wanted_V = model(torch.tensor([prompt], device="cuda"), use_cache=False).logits[0, -1].float().cpu()
        found.append(float((own_V - wanted_V).abs().max() / wanted_V.abs().max()))
    return found


def computes_in_tf32() -> bool:
    """Whether products of fp32 keep ten bits of it only."""
    fine = torch.full((32, 32), 1.0 + 2.0**-14, device="cuda")
    return not torch.equal(fine @ torch.eye(32, device="cuda"), fine)


def _keep_logits(model: Any, logits: Logits, prompts: set[tuple[int, ...]]) -> None:
    """Of prompts, a row each, which some models take in chunks."""
    read: dict[int, list[int]] = {}

    def keep(_: Any, __: Any, arguments: dict[str, Any], output: Any) -> None:
        ids_BT, cache = arguments["input_ids"], id(arguments["past_key_values"])
        begins = int(arguments["position_ids"][0, 0]) == 0
        read[cache] = ([] if begins else read[cache]) + ids_BT[0].tolist()
        if tuple(read[cache]) in prompts:
            logits[tuple(read[cache])] = output.logits[0, -1].float().cpu()

    model.register_forward_hook(keep, with_kwargs=True)


def _slow_down(model: Any, most_rows: int) -> None:
    def dawdle(_: Any, rows: tuple[torch.Tensor, ...]) -> None:
        time.sleep(3e-3 * min(most_rows, len(rows[0])))

    for module in find_experts(model, model.config.model_type):
        model.get_submodule(module.name).act_fn.register_forward_pre_hook(dawdle)
