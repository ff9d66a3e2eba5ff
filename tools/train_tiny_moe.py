"""Trains the small MoE language model that ships with Poise (``src/poise/assets/tiny-moe``).

A Qwen3-MoE of about 5.8 million parameters with its own byte-level BPE, trained on text that any machine has (see
``poise.bench.corpus``). The loss is cross-entropy plus the architecture's usual load-balancing term at a small weight; nothing
in it helps to predict one layer's routing from another's. Data-parallel over ``--workers`` processes of one thread each.

    python tools/train_tiny_moe.py --output src/poise/assets/tiny-moe --minutes 60 --workers 2

A finished model is described by ``tools/describe_tiny_moe.py``, which writes its model card. The
weights train in bf16, as they ship, with fp32 masters in the optimiser.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AttentionInterface, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from poise.bench.corpus import Domain, load_corpus

VOCABULARY = 4096
CONTEXT_TOKENS = 1024
END_OF_TEXT = "<|endoftext|>"
PADDED_ROWS = 64
TRAINED_TOKENS = 256
"""Length of a training row. Rope extrapolates poorly, so a fifth of the rows are four times as long."""


def config() -> Qwen3MoeConfig:
    """Six MoE layers of 32 experts, top-4."""
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=384,
        moe_intermediate_size=40,
        num_hidden_layers=6,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.002,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def train_tokenizer(domains: list[Domain], output: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE over both domains; writes the tokenizer's files to ``output``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    documents = (text[:20_000] for domain in domains for text in domain.train[::2])
    tokenizer.train_from_iterator(documents, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, model_max_length=CONTEXT_TOKENS
    )
    fast.save_pretrained(output)
    return fast


def tokenize(tokenizer: PreTrainedTokenizerFast, documents: list[str], seed: int) -> np.ndarray:
    """All documents in a shuffled order, each followed by the end-of-text token. uint16, shape (tokens,)."""
    order = np.random.default_rng(seed).permutation(len(documents))
    end = tokenizer.eos_token_id
    pieces: list[np.ndarray] = []
    for begin in range(0, len(order), 256):
        texts = [documents[index] for index in order[begin : begin + 256]]
        for ids in tokenizer(texts, verbose=False)["input_ids"]:
            pieces.append(np.array([*ids, end], dtype=np.uint16))
    return np.concatenate(pieces)


def sample_rows(streams: list[np.ndarray], rows: int, tokens: int, rng: np.random.Generator) -> torch.Tensor:
    """``rows`` random windows, an equal share from each domain. int64, shape (rows, tokens)."""
    windows = []
    for row in range(rows):
        stream = streams[row % len(streams)]
        begin = int(rng.integers(0, len(stream) - tokens))
        windows.append(stream[begin : begin + tokens].astype(np.int64))
    return torch.from_numpy(np.stack(windows))


def sorted_experts(
    module: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Each expert once over its tokens, which lie side by side after a sort.

    Rows of an expert are padded to a multiple of 64: oneDNN compiles a kernel for every shape it has not seen, and with
    free shapes that took longer than the products.
    """
    flat = top_k_index.reshape(-1)
    order = flat.argsort(stable=True)
    token = order // top_k_index.shape[1]
    counts = torch.bincount(flat, minlength=module.num_experts)
    padded = (counts + PADDED_ROWS - 1) // PADDED_ROWS * PADDED_ROWS
    shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
    place = torch.arange(len(flat)) + shift[flat[order]]
    sizes = padded.tolist()
    inputs = hidden_states.new_zeros(sum(sizes), hidden_states.shape[1]).index_copy(0, place, hidden_states[token])
    gate_up, down = module.gate_up_proj.unbind(0), module.down_proj.unbind(0)
    outputs = []
    for expert, rows in enumerate(inputs.split(sizes)):
        if sizes[expert]:
            gate, up = torch.nn.functional.linear(rows, gate_up[expert]).chunk(2, dim=-1)
            outputs.append(torch.nn.functional.linear(module.act_fn(gate) * up, down[expert]))
    weighted = torch.cat(outputs)[place] * top_k_weights.reshape(-1)[order, None]
    return torch.zeros_like(hidden_states).index_add(0, token, weighted.to(hidden_states.dtype))


def materialised_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **unused: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention through bmm and softmax: its backward is about three times faster here than SDPA's."""
    rows, heads, tokens, width = query.shape
    key, value = (
        tensor.repeat_interleave(heads // tensor.shape[1], 1).reshape(rows * heads, tokens, width)
        for tensor in (key, value)
    )
    mask = torch.full((tokens, tokens), -torch.inf, dtype=query.dtype).triu(1)
    scores = torch.baddbmm(mask, query.reshape(rows * heads, tokens, width), key.transpose(1, 2), alpha=scaling)
    mixed = torch.bmm(scores.softmax(-1), value)
    return mixed.view(rows, heads, tokens, width).transpose(1, 2).contiguous(), None


def learning_rate(progress: float, peak: float) -> float:
    """Warm-up over 2 %, flat to 55 %, then linear to a fiftieth of the peak."""
    if progress < 0.02:
        return peak * progress / 0.02
    return peak * max(0.02, min(1.0, (1.0 - progress) / 0.45))


def train_worker(rank: int, arguments: argparse.Namespace, streams: list[np.ndarray]) -> None:
    """One data-parallel process; rank 0 reports and saves."""
    torch.set_num_threads(1)
    ALL_EXPERTS_FUNCTIONS.register("sorted", sorted_experts)
    AttentionInterface.register("materialised", materialised_attention)
    if arguments.workers > 1:
        store = dist.FileStore(str(arguments.output / ".rendezvous"), arguments.workers)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=arguments.workers)
    torch.manual_seed(arguments.seed)
    model = Qwen3MoeForCausalLM(config())
    model.set_experts_implementation("sorted")
    model.set_attn_implementation("materialised")
    masters = [torch.nn.Parameter(parameter.detach().clone()) for parameter in model.parameters()]
    model.to(torch.bfloat16)
    parameters = list(model.parameters())
    groups = [
        {"params": [master for master in masters if master.dim() > 1], "weight_decay": 0.1},
        {"params": [master for master in masters if master.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), foreach=True)
    rng = np.random.default_rng(arguments.seed + 1 + rank)
    began = time.monotonic()
    step, seen_tokens, smooth = 0, 0, 0.0
    while True:
        progress = torch.tensor([(time.monotonic() - began) / (60 * arguments.minutes)])
        if arguments.workers > 1:
            dist.all_reduce(progress, op=dist.ReduceOp.MAX)
        if progress.item() >= 1.0:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress.item(), arguments.learning_rate)
        stretch = 4 if step % 5 == 4 else 1
        rows = sample_rows(streams, arguments.rows // stretch, TRAINED_TOKENS * stretch + 1, rng)
        result = model(input_ids=rows[:, :-1], output_router_logits=True)
        loss = torch.nn.functional.cross_entropy(result.logits.flatten(0, 1), rows[:, 1:].flatten())
        (loss + model.config.router_aux_loss_coef * result.aux_loss).backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in parameters]).float()
        if arguments.workers > 1:
            dist.all_reduce(gradient)
            gradient /= arguments.workers
        for master, piece in zip(masters, gradient.split([p.numel() for p in parameters]), strict=True):
            master.grad = piece.view_as(master)
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(parameters, masters)
        model.zero_grad(set_to_none=False)
        step += 1
        seen_tokens += arguments.workers * rows[:, 1:].numel()
        smooth = loss.item() if step == 1 else 0.98 * smooth + 0.02 * loss.item()
        if rank == 0 and step % 20 == 0:
            rate = seen_tokens / (time.monotonic() - began)
            print(
                f"{progress.item():6.1%} step {step} tokens {seen_tokens} loss {smooth:.3f} {rate:.0f} tok/s",
                flush=True,
            )
        if rank == 0 and step % 500 == 0:
            save(model, arguments, step, seen_tokens, smooth)
    if rank == 0:
        save(model, arguments, step, seen_tokens, smooth)
    if arguments.workers > 1:
        dist.destroy_process_group()


def save(model: Qwen3MoeForCausalLM, arguments: argparse.Namespace, step: int, tokens: int, loss: float) -> None:
    """Writes the bf16 checkpoint and how it was made."""
    model.save_pretrained(arguments.output)
    record = {
        "steps": step,
        "tokens": tokens,
        "training_loss": round(loss, 4) if math.isfinite(loss) else None,
        "minutes": arguments.minutes,
        "workers": arguments.workers,
        "learning_rate": arguments.learning_rate,
        "seed": arguments.seed,
        "torch": torch.__version__,
    }
    (arguments.output / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0, help="wall time of the training loop")
    parser.add_argument("--workers", type=int, default=2, help="data-parallel processes of one thread")
    parser.add_argument("--rows", type=int, default=24, help="rows of 256 tokens per worker and step")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / ".rendezvous").unlink(missing_ok=True)
    domains = load_corpus()
    tokenizer = train_tokenizer(domains, arguments.output)
    streams = [tokenize(tokenizer, domain.train, arguments.seed) for domain in domains]
    for domain, stream in zip(domains, streams, strict=True):
        print(
            f"{domain.name}: {len(domain.train)} files, {len(stream)} tokens, {len(domain.held_out)} held out",
            flush=True,
        )
    if arguments.workers == 1:
        train_worker(0, arguments, streams)
    else:
        mp.spawn(train_worker, (arguments, streams), nprocs=arguments.workers)
    (arguments.output / ".rendezvous").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
