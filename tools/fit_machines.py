"""Fits the bundled machines to NVIDIA AIConfigurator's measured tables, prints how far off the fits are, writes the files.

    python tools/fit_machines.py FOLDER --output src/poise/assets/machines

FOLDER holds the parquet tables ``{h100,h200}_sxm_moe_sglang_*`` and ``*_deepep_normal_*``; ``poise[tools]`` reads them.

Kernel rows used: SGLang's Triton kernel, expert parallel over 8 ranks, balanced routing. The latency is that of a whole rank,
for all tokens of the group (top_k times as many assignments). Both what a rank computes and how many of its experts are
active follow from the routing that the collector generates (``on_rank_0``), so one u(m), the time of an expert with m tokens,
is fitted over T / e against n / e, and T(n, e) = e u(n / e). Rows with one token per expert or none are not fitted, but they
are in the errors: launching kernels takes longer there than working, and the form has no constant for it. Other expert-parallel
sizes are left out: the kernel also touches every token of the group once, size / 8 times as many per assignment, which is not
what a rank behind an all-to-all sees.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet

from poise.cost.curves import ClosedFormCurve, Floats
from poise.cost.experts import ExpertCurve
from poise.cost.fit import fit_closed_form
from poise.spec.curve import ClosedForm, Curve, Shape
from poise.spec.machine import Device, Link, Machine
from poise.spec.whole_file import write_whole

RANKS = 8
KERNEL = "sglang_fused_moe_triton"
DTYPES = {"bfloat16": "bfloat16", "fp8_block": "float8_e4m3fn", "w4a16_mxfp4": "mxfp4"}
GPUS = {"h100": ("H100 SXM", 80 * 10**9), "h200": ("H200 SXM", 141 * 10**9)}
MODELS = {
    (2048, 768): "Qwen3-30B-A3B",
    (2880, 2880): "GPT-OSS",
    (4096, 1536): "Qwen3-235B-A22B",
    (4096, 14336): "Mixtral-8x7B",
    (5120, 8192): "Llama 4",
    (6144, 2560): "Qwen3-Coder-480B-A35B",
    (6144, 16384): "Mixtral-8x22B",
    (7168, 2048): "DeepSeek-V3",
}
EXPERTS = {(2880, 2880): 128, (5120, 8192): 128, (7168, 2048): 256}
"""Where models share a shape and their kernels' settings differ: the number of experts whose rows count (GPT-OSS-120B, Llama 4
Maverick, DeepSeek-V3)."""
TABLES = "NVIDIA AIConfigurator (Apache-2.0), commit 095f58a51, SGLang 0.5.14 and DeepEP tables"
FEWEST_CHOICES = 4
"""Links are fitted to routing that visits several ranks; with fewer choices a token the table's routing is not uniform."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """``errors_P``: of the time of each row, relative; ``each_P``: its tokens per active expert."""

    shape: Shape
    form: ClosedForm
    errors_P: Floats
    each_P: Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkFit:
    """Time of an all-to-all is ``latency_s`` plus a rank's bytes over ``bytes_per_s``."""

    latency_s: float
    bytes_per_s: float
    errors_P: Floats


def on_rank_0(tokens: int, *, num_experts: int, top_k: int) -> tuple[int, int]:
    """(assignments, active experts) of rank 0 of 8 under the collector's balanced routing: choice k of token i is expert
    i + k * stride, the tokens stretched over a stride where they are fewer."""
    stride = math.ceil(num_experts / top_k)
    place_T = np.arange(tokens) if tokens >= stride else np.arange(tokens) * stride / tokens
    chosen_TK = (place_T[:, None] + np.arange(top_k) * stride) % num_experts
    load_E = np.bincount(chosen_TK.astype(int).ravel(), minlength=num_experts)[: num_experts // RANKS]
    return int(load_E.sum()), int(np.count_nonzero(load_E))


def fit_experts(rows: Iterable[Mapping[str, object]]) -> list[Fit]:
    """A closed form for each shape and dtype."""
    by_shape: dict[Shape, list[tuple[int, int, float]]] = {}
    for row in rows:
        wanted = (KERNEL, RANKS, 1, "balanced")
        if (row["kernel_source"], row["moe_ep_size"], row["moe_tp_size"], row["distribution"]) != wanted:
            continue
        dtype, size = DTYPES.get(str(row["moe_dtype"])), (int(row["hidden_size"]), int(row["inter_size"]))
        if dtype is not None and EXPERTS.get(size, row["num_experts"]) == row["num_experts"]:
            shape = Shape(hidden=size[0], intermediate=size[1], dtype=dtype)
            tokens, active = on_rank_0(
                int(row["num_tokens"]), num_experts=int(row["num_experts"]), top_k=int(row["topk"])
            )
            if tokens:
                by_shape.setdefault(shape, []).append((tokens, active, float(row["latency"]) / 1e3))
    order = sorted(by_shape, key=lambda shape: (shape.dtype, shape.hidden, shape.intermediate))
    return [_fit(shape, np.array(by_shape[shape])) for shape in order]


def _fit(shape: Shape, rows_P3: Floats) -> Fit:
    tokens_P, active_P, seconds_P = rows_P3.T
    each_P = tokens_P / active_P
    full = each_P >= 1.0 + 1e-9
    exact = fit_closed_form(each_P[full], seconds_P[full] / active_P[full]).form
    form = ClosedForm(a_s=_rounded(exact.a_s), b_s=_rounded(exact.b_s), p=round(exact.p, 3))
    curve = ExpertCurve({1: ClosedFormCurve(form.a_s, form.b_s, form.p)})
    return Fit(shape=shape, form=form, errors_P=curve.seconds(tokens_P, active_P) / seconds_P - 1, each_P=each_P)


def fit_link(rows: Iterable[Mapping[str, object]]) -> LinkFit:
    """One latency and one rate over DeepEP's dispatch (fp8 with a scale for 128 values) and combine (bf16), best of the SM
    counts; bytes are those of unique (token, rank) pairs on other ranks under uniform routing."""
    best: dict[tuple[float, ...], float] = {}
    for row in rows:
        hidden, tokens, top_k, experts = (int(row[k]) for k in ("hidden_size", "num_token", "num_topk", "num_experts"))
        if top_k < FEWEST_CHOICES:
            continue
        missed = math.comb(experts - experts // RANKS, top_k) / math.comb(experts, top_k)
        for column, item_bytes in (("dispatch_transmit_us", 1 + 4 / 128), ("combine_transmit_us", 2.0)):
            nbytes = tokens * (RANKS - 1) * (1 - missed) * hidden * item_bytes
            key = (nbytes, item_bytes, hidden, top_k, experts)
            best[key] = min(best.get(key, math.inf), float(row[column]) / 1e6)
    bytes_P, seconds_P = np.array([key[0] for key in best]), np.array(list(best.values()))
    sides = np.stack([1 / seconds_P, bytes_P / seconds_P], axis=1)
    (latency_s, s_per_byte), *_ = np.linalg.lstsq(sides, np.ones(len(seconds_P)), rcond=None)
    latency_s, rate = _rounded(float(latency_s)), _rounded(1 / float(s_per_byte))
    errors_P = (latency_s + bytes_P / rate) / seconds_P - 1
    return LinkFit(latency_s=latency_s, bytes_per_s=rate, errors_P=errors_P)


def machine_of(gpu: str, fits: Sequence[Fit], link: LinkFit, *, times: Sequence[float], note: str) -> Machine:
    """8 devices that take ``times`` of what the tables say, joined by NVLink."""
    _, memory_bytes = GPUS[gpu]
    curves = tuple(Curve(kind="expert", shape=fit.shape, closed_form=fit.form) for fit in fits)
    devices = tuple(
        Device(name=f"gpu{rank}", memory_bytes=memory_bytes, speed=round(1 / time, 5), curves=curves)
        for rank, time in enumerate(times)
    )
    names = [device.name for device in devices]
    links = tuple(
        Link(source=source, target=target, bytes_per_s=link.bytes_per_s, latency_s=link.latency_s)
        for source in names
        for target in names
        if source != target
    )
    return Machine(devices=devices, links=links, source=note)


def machines_of(gpu: str, fits: Sequence[Fit], link: LinkFit) -> dict[str, Machine]:
    """Name to machine. Unequal ones are the H200 with times from 1 to 1.07 or 1.22, evenly, or one at 1.5."""
    label = GPUS[gpu][0]
    equal = machine_of(gpu, fits, link, times=[1.0] * RANKS, note=f"HGX {label}, 8 equal devices; fitted to {TABLES}")
    if gpu != "h200":
        return {gpu: equal}
    spreads = {
        "spread-7": (np.linspace(1, 1.07, RANKS).tolist(), "7 % between kernel times on 8 MI325X (arXiv 2606.00735)"),
        "spread-22": (np.linspace(1, 1.22, RANKS).tolist(), "22 %, the most in clusters of one SKU (arXiv 2208.11035)"),
        "one-slow": ([1.0] * 7 + [1.5], "an outlier 1.5 times slower (arXiv 2208.11035)"),
    }
    unequal = {
        name: replace(
            machine_of(gpu, fits, link, times=times, note=""),
            source=f"what-if: {label} curves fitted to {TABLES}; device times apart by {why}",
        )
        for name, (times, why) in spreads.items()
    }
    return {gpu: equal, **unequal}


def report(gpu: str, fits: Sequence[Fit], link: LinkFit) -> None:
    """Markdown: parameters and errors, per cent, by tokens per active expert."""
    print(f"\n### {GPUS[gpu][0]}\n")
    print("| shape | models | a (us) | b (ns) | p | median, worst at >= 4 each | 1 to 4 | 1 each |")
    print("|---|---|---|---|---|---|---|---|")
    for fit in fits:
        size, form = fit.errors_P, fit.form
        ranges = [fit.each_P >= 4, (fit.each_P > 1) & (fit.each_P < 4), fit.each_P == 1]
        name = MODELS.get((fit.shape.hidden, fit.shape.intermediate), "")
        shown = f"| {fit.shape} | {name} | {form.a_s * 1e6:.4g} | {form.b_s * 1e9:.4g} | {form.p:.3g} | "
        print(shown + " | ".join(_errors(size[rows]) for rows in ranges) + " |")
    every = np.concatenate([fit.errors_P[fit.each_P >= 4] for fit in fits])
    print(f"\nAll shapes, 4 tokens per expert or more: {_errors(every)}.")
    print(
        f"Link: {link.latency_s * 1e6:.1f} us + bytes / {link.bytes_per_s / 1e9:.0f} GB/s: {_errors(link.errors_P)} "
        f"of {len(link.errors_P)} cases."
    )


def _errors(errors_P: Floats) -> str:
    if not errors_P.size:
        return "none"
    worst = errors_P[np.argmax(np.abs(errors_P))]
    return f"{np.median(np.abs(errors_P)):.1%}, {worst:+.0%}"


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _rows(folder: Path, pattern: str) -> list[dict[str, object]]:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        sys.exit(f"fit_machines: {len(found)} files match {folder / pattern}; one is needed")
    return parquet.read_table(found[0]).to_pylist()


def text_of(machine: Machine) -> str:
    """JSON with a device and a link a line."""
    content = machine.to_json()
    parts = []
    for key, value in content.items():
        if isinstance(value, list) and value:
            lines = ",\n".join(json.dumps(item, separators=(",", ":")) for item in value)
            parts.append(f"{json.dumps(key)}: [\n{lines}\n]")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the parquet tables are")
    parser.add_argument("--output", type=Path, help="write the machine files to this directory")
    arguments = parser.parse_args()
    for gpu in GPUS:
        fits = fit_experts(_rows(arguments.folder, f"{gpu}_sxm_moe_sglang_*.parquet"))
        link = fit_link(_rows(arguments.folder, f"{gpu}_sxm_comm_*_deepep_normal_*.parquet"))
        report(gpu, fits, link)
        for name, machine in machines_of(gpu, fits, link).items():
            if arguments.output is not None:
                write_whole(arguments.output / f"{name}.json", text_of(machine))


if __name__ == "__main__":
    main()
