"""The peer that a user would pick: llama.cpp (llama-cpp-python) over a GGUF file that is mapped into memory.

    python -m poise.bench.llama_baseline --model F.gguf --prompts F.jsonl --max-tokens N [--max-time S]

Runs as a process of its own, all prompts (token ids) as parallel sequences of one context, and prints one JSON line:
``load_s``, ``prefill_s``, ``steps_s``, ``steps_read_bytes`` (what the kernel fetched from storage in each step; None where it
is not counted), ``generated_tokens``, ``token_ids`` per prompt, ``peak_bytes``, ``threads``, ``system`` (what the library was
built for). Tokens are sampled at temperature 1, each sequence with its own seed. Generation ends with the step that passes
``--max-time``. Uses nothing of Poise.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import llama_cpp
import numpy as np
import numpy.typing as npt

BATCH_TOKENS = 512
"""Of one call of ``llama_decode``; the library's own default."""

Floats = npt.NDArray[np.float32]


class Session:
    """A model and a context of ``sequences`` parallel sequences of up to ``context_tokens`` each.

    ``exact``: keys and values in fp32 and no fused attention, to compare logits; else the library's defaults.
    """

    def __init__(self, model: Path, *, sequences: int, context_tokens: int, threads: int, exact: bool = False) -> None:
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(model), options)
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {model}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = sequences * -(-context_tokens // 256) * 256
        settings.n_seq_max = sequences
        settings.n_batch = settings.n_ubatch = BATCH_TOKENS
        settings.n_threads = settings.n_threads_batch = threads
        if exact:
            settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
            settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise SystemExit(f"llama.cpp cannot make a context of {sequences} x {context_tokens} tokens")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)
        self._lengths = [0] * sequences

    def step(self, tokens_S: Sequence[Sequence[int]]) -> Floats:
        """Appends tokens to every sequence; returns the logits behind each one's last, shape (S, V)."""
        entries = [
            (token, sequence, self._lengths[sequence] + place, place + 1 == len(tokens))
            for sequence, tokens in enumerate(tokens_S)
            for place, token in enumerate(tokens)
        ]
        logits_SV = np.empty((len(tokens_S), self._vocabulary), dtype=np.float32)
        for first in range(0, len(entries), BATCH_TOKENS):
            self._decode(entries[first : first + BATCH_TOKENS], logits_SV)
        self._lengths = [length + len(tokens) for length, tokens in zip(self._lengths, tokens_S, strict=True)]
        return logits_SV

    def _decode(self, entries: Sequence[tuple[int, int, int, bool]], logits_SV: Floats) -> None:
        batch = self._batch
        batch.n_tokens = len(entries)
        for place, (token, sequence, position, is_last) in enumerate(entries):
            batch.token[place], batch.pos[place] = token, position
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
            batch.logits[place] = is_last
        status = llama_cpp.llama_decode(self._context, batch)
        if status != 0:
            raise SystemExit(f"llama.cpp cannot decode {len(entries)} tokens: status {status}")
        for place, (_, sequence, _, is_last) in enumerate(entries):
            if is_last:
                row = llama_cpp.llama_get_logits_ith(self._context, place)
                logits_SV[sequence] = np.ctypeslib.as_array(row, shape=(self._vocabulary,))

    def close(self) -> None:
        """Frees everything."""
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def sample(logits_V: Floats, random: np.random.Generator) -> int:
    """A token at temperature 1."""
    chances_V = np.exp(logits_V.astype(np.float64) - logits_V.max())
    return int(random.choice(len(chances_V), p=chances_V / chances_V.sum()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, generate, print the JSON line."""
    options = _parser().parse_args(arguments)
    lines = [json.loads(line) for line in options.prompts.read_text().splitlines() if line.strip()]
    prompts = [line["prompt_token_ids"] for line in lines]
    threads = len(os.sched_getaffinity(0))
    context_tokens = max(map(len, prompts)) + options.max_tokens
    start_s = time.perf_counter()
    with (
        _errors_to_stderr(),
        Session(options.model, sequences=len(prompts), context_tokens=context_tokens, threads=threads) as session,
    ):
        report = {"load_s": time.perf_counter() - start_s} | _generate(session, prompts, options)
    system = llama_cpp.llama_print_system_info().decode().strip()
    print(json.dumps(report | {"threads": threads, "system": system, "peak_bytes": _peak_bytes()}), flush=True)


def _generate(session: Session, prompts: Sequence[Sequence[int]], options: argparse.Namespace) -> dict[str, Any]:
    randoms = [np.random.default_rng(index) for index in range(len(prompts))]
    results: list[list[int]] = [[] for _ in prompts]
    ends_s, read_bytes = [time.perf_counter()], [_storage_bytes_read()]
    tokens_S: Sequence[Sequence[int]] = prompts
    for _ in range(options.max_tokens):
        logits_SV = session.step(tokens_S)
        tokens_S = [[sample(logits_V, random)] for logits_V, random in zip(logits_SV, randoms, strict=True)]
        for result, (token,) in zip(results, tokens_S, strict=True):
            result.append(token)
        ends_s.append(time.perf_counter())
        read_bytes.append(_storage_bytes_read())
        if options.max_time is not None and ends_s[-1] - ends_s[0] > options.max_time:
            break
    seconds = [end - begin for begin, end in itertools.pairwise(ends_s)]
    reads = [
        None if before is None or after is None else after - before for before, after in itertools.pairwise(read_bytes)
    ]
    return {
        "prefill_s": seconds[0],
        "prefill_read_bytes": reads[0],
        "steps_s": seconds[1:],
        "steps_read_bytes": reads[1:],
        "generated_tokens": sum(map(len, results)),
        "token_ids": results,
    }


@contextlib.contextmanager
def _errors_to_stderr() -> Iterator[None]:
    """Standard output is for the report alone, whatever the library prints."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _storage_bytes_read() -> int | None:
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return int(dict(line.split(": ", 1) for line in lines)["read_bytes"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m poise.bench.llama_baseline", description="llama.cpp as a peer.")
    parser.add_argument("--model", type=Path, required=True, metavar="F.gguf")
    parser.add_argument("--prompts", type=Path, required=True, metavar="F.jsonl", help='{"prompt_token_ids": …} a line')
    parser.add_argument("--max-tokens", type=int, required=True, metavar="N")
    parser.add_argument("--max-time", type=float, metavar="S", help="end with the step that passes this")
    return parser


if __name__ == "__main__":
    main()
