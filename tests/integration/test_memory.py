"""The promise of ``memory=``: a process never grows by more than its budget, as the kernel counts it.

Every case runs in a process of its own: this file, as a script, which forks one child per case when the imports are done.
Growth is the peak of the resident set (VmHWM) less what was resident when the model began to load.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from poise import LLM, SamplingParams
from poise.errors import BudgetError

VOCABULARY = 2048
MB = 1_000_000
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "num_hidden_layers": 4,
            "head_dim": 64,
            "moe_intermediate_size": 1024,
            "num_experts": 24,
            "num_experts_per_tok": 2,
        },
    ),
    "mixtral": (
        "MixtralConfig",
        {"num_hidden_layers": 3, "intermediate_size": 4096, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            "num_hidden_layers": 2,
            "head_dim": 64,
            "intermediate_size": 512,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "grouped": (
        "Qwen3MoeConfig",
        {
            "hidden_size": 256,
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "num_hidden_layers": 2,
            "moe_intermediate_size": 64,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
}
"""302 MB in 96 experts of 3 MB; 302 MB in 24 experts of 12.6 MB; 25 MB in 16 experts of 1.6 MB; 16 small experts under
attention in which 16 query heads share keys."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """``jobs``: calls of ``generate`` on one LLM, each (prompts, tokens of each, new tokens of each). ``budget_bytes`` None:
    the smallest that a refusal names for the first of them."""

    model: str
    budget_bytes: int | None
    jobs: Sequence[tuple[int, int, int]]
    options: dict[str, Any] = field(default_factory=dict)
    streams: bool = True
    """Whether the budget is well below the weights, so that experts come and go."""


CASES = {
    "one short prompt": Case(model="qwen3_moe", budget_bytes=110 * MB, jobs=[(1, 8, 16)]),
    "one long prompt": Case(model="qwen3_moe", budget_bytes=110 * MB, jobs=[(1, 2000, 3)]),
    "many short prompts": Case(model="qwen3_moe", budget_bytes=110 * MB, jobs=[(40, 24, 4)]),
    "some long prompts": Case(model="qwen3_moe", budget_bytes=120 * MB, jobs=[(6, 400, 3)]),
    "large experts": Case(model="mixtral", budget_bytes=180 * MB, jobs=[(12, 60, 3)]),
    "a long prompt after a short one": Case(model="qwen3_moe", budget_bytes=200 * MB, jobs=[(1, 8, 6), (4, 1600, 2)]),
    "bf16 experts run in fp32": Case(
        model="qwen3_moe", budget_bytes=170 * MB, jobs=[(1, 8, 3)], options={"dtype": "float32"}
    ),
    "experts in 4 bits, made first": Case(
        model="mixtral",
        budget_bytes=130 * MB,
        jobs=[(1, 8, 3), (4, 600, 2)],
        options={"quantize": "int4"},
        streams=False,
    ),
    "every token to the same experts": Case(model="skewed", budget_bytes=200 * MB, jobs=[(40, 100, 2)]),
    "a long answer with eager attention": Case(
        model="gpt_oss", budget_bytes=106 * MB, jobs=[(1, 100, 120)], streams=False
    ),
    "the smallest budget, many heads over few keys": Case(
        model="grouped",
        budget_bytes=None,
        jobs=[(16, 600, 2)],
        options={"groups": [(16, 1)], "kv_on_disk": False},
        streams=False,
    ),
}


def write_model(path: Path, name: str) -> Path:
    """A random bf16 checkpoint. "skewed" is a Mixtral whose routers send nearly all tokens to experts 0 and 1."""
    class_name, own = CONFIGS["mixtral" if name == "skewed" else name]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        config = getattr(transformers, class_name)(**{**_SHAPE, **own})
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        if name == "skewed":
            direction_H = 0.3 * torch.randn(config.hidden_size)
            model.get_input_embeddings().weight += direction_H.bfloat16()
            for layer in model.model.layers:
                layer.mlp.gate.weight.zero_()
                layer.mlp.gate.weight[:2] = direction_H.bfloat16()
        model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """What every case came to, by its name; {} where its process failed."""
    root = tmp_path_factory.mktemp("memory")
    paths = {name: write_model(root / name, name) for name in sorted({case.model for case in CASES.values()})}
    work = {name: [str(paths[case.model]), asdict(case)] for name, case in CASES.items()}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(root / "cache")}
    script = subprocess.run(
        [sys.executable, __file__, json.dumps(work)], capture_output=True, text=True, env=environment
    )
    made = {name: report for line in script.stdout.splitlines() for name, report in json.loads(line).items()}
    assert set(made) == set(CASES), script.stderr[-3000:]
    shutil.rmtree(root)
    return made


def check(case: Case, report: dict[str, int]) -> None:
    left = report["budget"] - report["grown"]
    print(f"budget {report['budget'] / MB:.0f} MB, left {left / MB:.1f} MB: {report}")
    assert left >= 0


@pytest.mark.parametrize("name", CASES)
def test_a_process_never_grows_by_more_than_its_budget(name: str, reports: dict[str, dict[str, int]]) -> None:
    case, report = CASES[name], reports[name]
    assert not case.streams or report["budget"] < report["total_bytes"] * 0.7, "nearly all fits into this budget"
    check(case, report)


def run(path: str, case: dict[str, Any]) -> dict[str, int]:
    """In a process of its own: what it grew by, and under which plan."""
    budget = case["budget_bytes"] or smallest_budget(path, case)
    with LLM(path, memory=budget, **case["options"]) as llm:
        generator = torch.Generator().manual_seed(0)
        for prompts, tokens, new_tokens in case["jobs"]:
            ids_BT = torch.randint(3, VOCABULARY, (prompts, tokens), generator=generator)
            params = SamplingParams(max_tokens=new_tokens, ignore_eos=True, temperature=1.0, seed=0)
            results = llm.generate([{"prompt_token_ids": ids_T.tolist()} for ids_T in ids_BT], params)
            assert all(len(result.outputs[0].token_ids) == new_tokens for result in results)
        status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
        grown = int(status["VmHWM"].split()[0]) * 1024 - llm.base_bytes
        shown = ("batch_size", "num_batches", "chunk_tokens", "expert_slots", "experts", "total_bytes")
        facts = llm.describe()
        return {"grown": grown, "budget": budget} | {key: int(str(facts[key])) for key in shown}


def smallest_budget(path: str, case: dict[str, Any]) -> int:
    """What the refusal of a budget that is far too small names."""
    prompts, tokens, new_tokens = case["jobs"][0]
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    with pytest.raises(BudgetError) as refused:
        LLM(path, memory="1MiB", expected=[({"prompt_token_ids": [3] * tokens}, params)] * prompts, **case["options"])
    assert refused.value.smallest_bytes is not None
    return refused.value.smallest_bytes


def main() -> None:
    """Runs the cases of the command line, each in a child of this process, as many at once as there are cores."""
    transformers.logging.set_verbosity_error()
    running = 0
    for name, (path, case) in json.loads(sys.argv[1]).items():
        if running == os.cpu_count():
            os.wait()
            running -= 1
        if not os.fork():
            os.write(1, (json.dumps({name: run(path, case)}) + "\n").encode())  # whole, beside others
            os._exit(0)
        running += 1
    while running:
        os.wait()
        running -= 1


if __name__ == "__main__":
    main()
