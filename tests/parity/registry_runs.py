"""One class of transformers' registry, run by plain transformers and by Poise from the same tiny checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from poise import LLM, SamplingParams
from poise.errors import CheckpointError
from poise.model.cache import make_cache
from poise.model.inspect import find_experts
from poise.model.lookahead import Lookahead
from poise.model.seam import Forward
from tests.parity.registry_configs import VOCABULARY, tiny_config

LENGTHS = (5, 29, 17, 2, 17)
"""With two batches of two rows and chunks of eight: padding, rows that are padding for whole chunks, rows of one length."""
NEW_TOKENS = (6, 3, 6, 4, 5)
"""Rows of a batch end at different times, so that every kind of cache drops rows."""
SLOTS = 3
"""Experts in memory, of 8 to 32."""
MARGIN = 1e-4
"""Two logits so close that rounding may decide between them."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One prompt's way: the generated ids and the logits that chose them."""

    new_ids: list[int]
    logits_TV: torch.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """``line``: what transformers or Poise said, where one of them does not run the class; the runs are empty then."""

    model_type: str
    kind: Literal["runs", "refused", "not run by transformers"]
    line: str = ""
    plain: tuple[Run, ...] = ()
    ours: tuple[Run, ...] = ()
    num_experts: int = 0
    misses: int = 0
    not_asked_early: int = 0
    """MoE layers whose routers cannot be asked outside the model."""
    routers_agree: bool = False
    """Whether all others, asked outside the model about what they saw in it, chose the same."""


def try_class(model_type: str, path: Path) -> Outcome:
    """Writes a checkpoint to ``path`` and runs it both ways."""
    try:
        write_checkpoint(path, model_type)
        plain = plain_runs(plain_model(path))
    except Exception as error:  # noqa: BLE001  # what transformers cannot do is the finding, whatever it raises
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        return Outcome(model_type=model_type, kind="not run by transformers", line=line)
    try:
        llm = LLM(path, memory="1GiB", expert_slots=SLOTS)
    except CheckpointError as error:
        return Outcome(model_type=model_type, kind="refused", line=str(error))
    with llm:
        ours = poise_runs(llm)
        progress, num_experts = llm.last_progress, sum(llm.spec.experts_L)
        not_asked_early, routers_agree = _ask_routers(llm)
        assert llm.describe()["expert_slots"] == SLOTS
    assert progress is not None
    return Outcome(
        model_type=model_type,
        kind="runs",
        plain=tuple(plain),
        ours=tuple(ours),
        num_experts=num_experts,
        misses=progress.expert_misses,
        not_asked_early=not_asked_early,
        routers_agree=routers_agree,
    )


def _ask_routers(llm: LLM) -> tuple[int, bool]:
    """(layers whose routers cannot be asked, whether the others agree with the model)."""
    model = llm.runner.model
    modules = find_experts(model, llm.spec.model_type)
    lookahead = Lookahead.of_model(model, modules)
    agree = []
    with torch.inference_mode():
        forward = Forward(lambda: model(input_ids=torch.tensor([prompts()[1]]), use_cache=False).logits)
        parked = forward.start()
        while parked is not None:
            layer = next(at for at, each in enumerate(modules) if model.get_submodule(each.name) is parked.module)
            if str(layer) in lookahead.routers:
                chosen_TK = lookahead.own_choices_TK(layer, parked.hidden_TH)
                agree.append(torch.equal(chosen_TK, parked.top_k_index_TK))
            parked = forward.resume(torch.randn_like(parked.hidden_TH))
    return len(modules) - len(agree), all(agree)


def write_checkpoint(path: Path, model_type: str) -> None:
    """Random weights as transformers saves them. A composite model is saved whole, as it is published, towers included.

    Every weight is noise: norms, biases, corrections, routing tables, and the padding token's embedding, which else is zero
    and makes the scores of an indexer tie.
    """
    config = tiny_config(model_type)
    composite = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        if composite is not None:
            model = getattr(transformers, composite)._from_config(config)
        else:
            model = transformers.AutoModelForCausalLM.from_config(config)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            _add_noise(name, tensor, model.config.get_text_config())
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].normal_(std=0.1)
        model.save_pretrained(path)


def _add_noise(name: str, tensor: torch.Tensor, config: Any) -> None:
    if name.endswith("tid2eid"):
        tensor.copy_(torch.rand(len(tensor), config.num_local_experts).topk(tensor.shape[1]).indices)
    elif not tensor.is_floating_point() or "inv_freq" in name or "A_log" in name:
        return
    elif tensor.dim() == 1:
        tensor += 0.1 * torch.randn_like(tensor)
    elif not tensor.any():
        tensor.normal_(std=0.1)


def prompts() -> list[list[int]]:
    """Token ids, no special tokens among them."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


def plain_model(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Plain transformers' text model of a checkpoint, all in memory. It does not end a sequence by itself."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    return model


def plain_runs(model: Any) -> list[Run]:
    """Greedy generation of each prompt alone."""
    runs = []
    for ids, new_tokens in zip(prompts(), NEW_TOKENS, strict=True):
        prompt = torch.tensor([ids])
        result = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits_TV = torch.cat(result.logits).float()
        runs.append(Run(new_ids=result.sequences[0, len(ids) :].tolist(), logits_TV=logits_TV))
    return runs


def poise_runs(llm: LLM) -> list[Run]:
    """The same prompts through Poise, in two batches of two rows and in chunks of eight tokens."""
    params = [SamplingParams(max_tokens=new_tokens, ignore_eos=True) for new_tokens in NEW_TOKENS]
    seen: dict[int, list[torch.Tensor]] = {index: [] for index in range(len(LENGTHS))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("poise.plan.candidates.CHUNK_TOKENS", (8,))
        patch.setattr("poise.plan.candidates.BATCH_SIZES", (2,))
        patch.setattr("poise.plan.candidates.NUM_BATCHES", (2,))
        results = llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts()],
            params,
            on_logits=lambda row, logits_V: seen[row.index].append(logits_V.float()),
        )
    return [Run(new_ids=list(each.outputs[0].token_ids), logits_TV=torch.stack(seen[each.index])) for each in results]


def sure_tokens(run: Run) -> list[int]:
    """The tokens before the first that was nearly another."""
    best_T2 = run.logits_TV.topk(2).values
    close = (best_T2[:, 0] - best_T2[:, 1] <= MARGIN).tolist()
    return run.new_ids[: close.index(True)] if True in close else run.new_ids


def errors(ours: Sequence[Run], plain: Sequence[Run]) -> list[float]:
    """Per position the largest difference of a logit, as a share of the largest logit of its prompt.

    Each prompt's positions count up to and with the first token that differs: so far their inputs are the same.
    """
    found: list[float] = []
    for run, want in zip(ours, plain, strict=True):
        equal = [a == b for a, b in zip(run.new_ids, want.new_ids, strict=True)]
        compared = [*equal, False].index(False) + 1
        difference_T = (run.logits_TV[:compared] - want.logits_TV[:compared]).abs().amax(dim=1)
        found += (difference_T / want.logits_TV.abs().max()).tolist()
    return found


def plain_last_logits(model: Any, rows: Sequence[Sequence[int]], widths: Sequence[int]) -> torch.Tensor:
    """Plain transformers over left-padded rows, in passes of these widths. Shape (rows, vocabulary), of the last token."""
    width = max(map(len, rows))
    ids_BT = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in rows])
    mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows])
    position_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    cache, begin = make_cache(model), 0
    for each in widths:
        end = begin + each
        with torch.no_grad():
            logits_BTV = model(
                input_ids=ids_BT[:, begin:end],
                attention_mask=None if mask_BT.all() else mask_BT[:, :end],
                position_ids=position_BT[:, begin:end],
                past_key_values=cache,
                use_cache=True,
            ).logits
        begin = end
    assert begin == width, "the passes do not make up the rows"
    last: torch.Tensor = logits_BTV[:, -1]
    return last
