"""Measures a checkpoint of ``train_tiny_moe.py`` on held-out text and writes its model card, ``README.md``.

    python tools/describe_tiny_moe.py src/poise/assets/tiny-moe

Plain transformers throughout: held-out loss per domain, how unevenly each layer uses its experts, how much code and prose
differ in that, and samples of generated text. ``poise.bench.corpus`` splits by content, so on the machine that trained the
model the held-out text is text the model has not seen; on another machine some of it may have been trained on.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from train_tiny_moe import tokenize
from transformers import AutoModelForCausalLM, AutoTokenizer

from poise.bench.corpus import Domain, load_corpus
from poise.errors import CheckpointError, PoiseError

WINDOW_TOKENS = 512
PROMPTS = {
    "code": ('def read_lines(path):\n    """', "class Queue:\n    def __init__(self"),
    "prose": ("DESCRIPTION\n\nThis function returns the number of", "If the file does not exist, "),
}
TEMPERATURE = 0.7
SAMPLE_TOKENS = 96


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One domain's held-out text. ``load_HLE``: how often each expert was chosen in each half of the text, by layer."""

    domain: Domain
    tokens: int
    nats_per_token: float
    bits_per_byte: float
    load_HLE: torch.Tensor

    @property
    def share_LE(self) -> torch.Tensor:
        """Each expert's share of its layer's choices."""
        return shares(self.load_HLE.sum(0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Generated text. ``temperature`` is None for greedy decoding."""

    domain: str
    prompt: str
    temperature: float | None
    text: str


def shares(load_LE: torch.Tensor) -> torch.Tensor:
    return load_LE / load_LE.sum(-1, keepdim=True)


def distance_L(left_LE: torch.Tensor, right_LE: torch.Tensor) -> torch.Tensor:
    """Total-variation distance of two distributions over experts: half the sum of the absolute differences."""
    return (left_LE - right_LE).abs().sum(-1) / 2


def measure(model: Any, tokenizer: Any, domain: Domain, max_windows: int) -> Measured:
    """Teacher-forced loss and expert load over consecutive windows of the held-out text."""
    stream = torch.from_numpy(tokenize(tokenizer, domain.held_out, seed=0).astype("int64"))
    windows = min(max_windows, (len(stream) - 1) // WINDOW_TOKENS)
    if windows < 2:
        raise CheckpointError(f"held-out {domain.name} has {len(stream)} tokens; {2 * WINDOW_TOKENS + 1} are needed")
    chosen: list[torch.Tensor] = []
    experts = [module for name, module in model.named_modules() if name.endswith("mlp.experts")]
    hooks = [module.register_forward_pre_hook(lambda _, args: chosen.append(args[1])) for module in experts]
    load_HLE = torch.zeros(2, len(experts), model.config.num_experts)
    nats = 0.0
    for window in track(range(windows), description=domain.name):
        rows = stream[window * WINDOW_TOKENS : (window + 1) * WINDOW_TOKENS + 1]
        chosen.clear()
        logits = model(input_ids=rows[None, :-1], use_cache=False).logits[0].float()
        nats += torch.nn.functional.cross_entropy(logits, rows[1:], reduction="sum").item()
        for layer, index_TK in enumerate(chosen):
            load_HLE[2 * window // windows, layer] += torch.bincount(index_TK.flatten(), minlength=load_HLE.shape[-1])
    for hook in hooks:
        hook.remove()
    predicted = stream[1 : windows * WINDOW_TOKENS + 1]
    return Measured(
        domain=domain,
        tokens=len(predicted),
        nats_per_token=nats / len(predicted),
        bits_per_byte=nats / math.log(2) / count_bytes(tokenizer, predicted),
        load_HLE=load_HLE,
    )


def count_bytes(tokenizer: Any, tokens: torch.Tensor) -> int:
    """Bytes of text. A byte-level token has one character for each byte; the end of a text has none."""
    lengths = [len(token) for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    lengths[tokenizer.eos_token_id] = 0
    return int(torch.tensor(lengths)[tokens].sum())


def generate(model: Any, tokenizer: Any) -> list[Sample]:
    """For each domain, one sample greedily and one at ``TEMPERATURE``."""
    samples = []
    for domain, prompts in PROMPTS.items():
        for prompt, temperature in zip(prompts, (None, TEMPERATURE), strict=True):
            torch.manual_seed(0)
            inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
            options = {} if temperature is None else {"temperature": temperature, "top_k": 0, "top_p": 1.0}
            output = model.generate(
                **inputs, max_new_tokens=SAMPLE_TOKENS, do_sample=temperature is not None, **options
            )
            text = tokenizer.decode(output[0], skip_special_tokens=True)
            samples.append(Sample(domain=domain, prompt=prompt, temperature=temperature, text=text[len(prompt) :]))
    return samples


def model_card(directory: Path, model: Any, measured: list[Measured], samples: list[Sample]) -> str:
    training = json.loads((directory / "training.json").read_text())
    parts = [architecture_part(directory, model), training_part(training, model.config, measured)]
    parts += [loss_part(measured), routing_part(measured, model.config)]
    parts += ["## Samples", *(sample_part(sample) for sample in samples)]
    return "\n".join(parts) + "\n"


def architecture_part(directory: Path, model: Any) -> str:
    config = model.config
    heads = f"{config.num_attention_heads} ({config.num_key_value_heads})"
    experts = f"{config.num_experts}, {config.num_experts_per_tok}, {config.moe_intermediate_size}"
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    weights_bytes = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    return f"""---
library_name: transformers
pipeline_tag: text-generation
language: en
---
# tiny-moe

A Qwen3-MoE of {millions:.1f} million parameters that ships with Poise, so that its demo, tests and benchmarks have routing that
was learnt. It writes text that looks like its training data and means nothing: it is no assistant and answers no
questions. Its routing is realistic in kind, not in size.

| | |
|---|---|
| layers, hidden size, attention heads (key/value) | {config.num_hidden_layers}, {config.hidden_size}, {heads} |
| experts per layer, chosen per token, width of an expert | {experts} |
| vocabulary (byte-level BPE), context | {config.vocab_size}, {config.max_position_embeddings} |
| weights | {str(model.dtype).removeprefix("torch.")}, {weights_bytes:,} bytes |
"""


def training_part(training: dict[str, Any], config: Any, measured: list[Measured]) -> str:
    length = f"{training['steps']:,} steps, {training['tokens']:,} tokens"
    files = "; ".join(
        f"{len(one.domain.train):,} files of {one.domain.name} to train, {len(one.domain.held_out):,} held out"
        for one in measured
    )
    recipe = f"peak learning rate {training['learning_rate']:g}, seed {training['seed']}, torch {training['torch']}"
    return f"""## Training
Made by `tools/train_tiny_moe.py`: {length} on {training["workers"]} CPU cores, in a run of
{training["minutes"]:g} minutes; AdamW, {recipe}.
The loss is cross-entropy plus the architecture's usual load-balancing term at weight {config.router_aux_loss_coef:g}.
There is no loss term that helps prediction, neither of one layer's routing from another's nor of a token's from earlier
tokens.

Data: text of one Debian machine; nothing was downloaded. Code is the Python standard library (Python Software Foundation
licence). Prose is manual pages, package documentation, Perl's pods and licences as Debian installs them, each under the
licence of its package, and Python's own help topics. {files}.
"""


def loss_part(measured: list[Measured]) -> str:
    rows = [
        f"| {one.domain.name} | {one.tokens:,} | {one.nats_per_token:.3f} | {one.bits_per_byte:.3f} |"
        for one in measured
    ]
    return f"""## Held-out text
Teacher-forced, windows of {WINDOW_TOKENS} tokens, weights in the dtype in which they ship.

| domain | tokens | nats/token | bits/byte |
|---|---|---|---|
{chr(10).join(rows)}
"""


def routing_part(measured: list[Measured], config: Any) -> str:
    code, prose = measured
    rows = {f"load max/mean, {one.domain.name}": one.share_LE.max(-1).values * config.num_experts for one in measured}
    rows["distance, code to prose"] = distance_L(code.share_LE, prose.share_LE)
    for one in measured:
        rows[f"distance, two halves of the {one.domain.name}"] = distance_L(*shares(one.load_HLE))
    layers = range(config.num_hidden_layers)
    most = config.num_experts / config.num_experts_per_tok
    lines = [f"| layer | {' | '.join(map(str, layers))} |", "|---" * (1 + len(layers)) + "|"]
    lines += [f"| {name} | {' | '.join(f'{value:.2f}' for value in row.tolist())} |" for name, row in rows.items()]
    return f"""## Routing on that text
Load is how often an expert is chosen: max/mean is 1 when it is even and {most:g} when all tokens choose one expert. Distance
is the total-variation distance of two distributions of choices over the experts: 0 when they are equal, 1 when
they share no expert.

{chr(10).join(lines)}
"""


def sample_part(sample: Sample) -> str:
    how = "greedy" if sample.temperature is None else f"temperature {sample.temperature:g}"
    text = (sample.prompt + "⟦" + sample.text + "⟧").replace("```", "'''")
    return f"{sample.domain.capitalize()}, {how}; the model's part is in ⟦ ⟧:\n```text\n{text}\n```"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a directory that train_tiny_moe.py wrote")
    parser.add_argument("--windows", type=int, default=400, help=f"at most so many windows of {WINDOW_TOKENS} tokens")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        if not (arguments.checkpoint / "training.json").is_file():
            raise CheckpointError(
                f"{arguments.checkpoint} has no training.json; give a directory train_tiny_moe.py wrote"
            )
        tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
        model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype="auto").eval()
        with torch.inference_mode():
            measured = [measure(model, tokenizer, domain, arguments.windows) for domain in load_corpus()]
            card = model_card(arguments.checkpoint, model, measured, generate(model, tokenizer))
    except PoiseError as error:
        print(f"describe_tiny_moe: {error}", file=sys.stderr)
        sys.exit(2)
    (arguments.checkpoint / "README.md").write_text(card)
    print(card, end="")


if __name__ == "__main__":
    main()
