"""Files of SGLang's expert distribution recorder (0.5.23), in all its modes.

``stat``: rank 0 writes logical counts, one row for each forward pass, already summed over ranks; a circular buffer, so rows
that were never filled are zero and left out. ``per_pass`` and ``per_token``: every rank writes a file of records with the
counts of physical experts; those of one pass are summed over ranks and brought to logical experts by the map in the file, the
one at the end of the recording: it must not have changed while recording. SGLang counts all layers; those without any
token are dense and left out. torch unpickles nothing but plain data here (``weights_only``).
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from poise.errors import TraceError
from poise.spec.statistics import ExpertStatistics

Counts = npt.NDArray[np.int64]


def read_sglang(files: Sequence[Path]) -> ExpertStatistics:
    """Counts of the recorder's files: ``stat`` dumps one after the other, or the rank files of one detailed dump.

    Raises TraceError, one line, for files that are none, are damaged, or do not belong together.
    """
    assert files, "statistics come from at least one file"
    contents = [_content(path) for path in files]
    is_stat = {"logical_count" in content for content in contents}
    if len(is_stat) > 1:
        raise TraceError(f"{files[0].name} and the others are of different recorder modes; name the files of one dump")
    if is_stat == {True}:
        counts = [_stat(path, content) for path, content in zip(files, contents, strict=True)]
        _require_equal(files, [each.shape[1:] for each in counts], "counts of different shapes")
        return _statistics(np.concatenate(counts), "SGLang stat", files)
    return _statistics(_of_ranks(files, contents), "SGLang per_pass or per_token", files)


def _content(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise TraceError(f"statistics {path} cannot be read ({error.strerror}); name a file that can") from None
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
        raise TraceError(f"{path} is no file that torch can read safely; name what SGLang's recorder dumped") from None
    if not isinstance(content, dict) or not ("logical_count" in content or "records" in content):
        raise TraceError(f"{path} has neither logical_count nor records: no dump of SGLang's recorder (0.5.23)")
    return content


def _stat(path: Path, content: dict[str, Any]) -> Counts:
    counts_NLE = _array(path, "logical_count", content["logical_count"], dims=(2, 3))
    counts_NLE = counts_NLE.reshape(-1, *counts_NLE.shape[-2:])
    return counts_NLE[counts_NLE.any(axis=(1, 2))]


def _of_ranks(files: Sequence[Path], contents: Sequence[dict[str, Any]]) -> Counts:
    """Logical counts of every pass, (N, L, E)."""
    maps = [
        _array(path, "last_physical_to_logical_map", content.get("last_physical_to_logical_map"), dims=(2,))
        for path, content in zip(files, contents, strict=True)
    ]
    _require_equal(files, [each.tobytes() for each in maps], "different maps from physical to logical experts")
    slot_to_expert_LP = maps[0]
    if slot_to_expert_LP.min() < 0:
        raise TraceError(f"{files[0]} maps a physical expert to {slot_to_expert_LP.min()}; record anew")
    passes: dict[int, Counts] = {}
    ranks: set[int] = set()
    for path, content in zip(files, contents, strict=True):
        records = content["records"]
        here = {record.get("rank") for record in records}
        if repeated := ranks & here:
            raise TraceError(f"{path} is a second file of rank {min(repeated)}; name the files of one dump, one a rank")
        ranks |= here
        for record in records:
            counts_LP = _array(path, "global_physical_count", record.get("global_physical_count"), dims=(2,))
            if counts_LP.shape != slot_to_expert_LP.shape:
                raise TraceError(
                    f"{path} has counts {counts_LP.shape} and a map {slot_to_expert_LP.shape}; record anew"
                )
            number = int(record["forward_pass_id"])
            passes[number] = passes[number] + counts_LP if number in passes else counts_LP
    counts_NLP = np.array([passes[number] for number in sorted(passes) if passes[number].any()], dtype=np.int64)
    return _logical(counts_NLP.reshape(-1, *slot_to_expert_LP.shape), slot_to_expert_LP)


def _logical(counts_NLP: Counts, slot_to_expert_LP: Counts) -> Counts:
    num_layers, num_experts = len(slot_to_expert_LP), int(slot_to_expert_LP.max()) + 1
    counts_NLE = np.zeros((len(counts_NLP), num_layers, num_experts), dtype=np.int64)
    for layer, expert_P in enumerate(slot_to_expert_LP):
        np.add.at(counts_NLE[:, layer].T, expert_P, counts_NLP[:, layer].T)
    return counts_NLE


def _statistics(counts_NLE: Counts, source: str, files: Sequence[Path]) -> ExpertStatistics:
    is_moe_L = np.asarray(counts_NLE.any(axis=(0, 2)))
    if not is_moe_L.any():
        raise TraceError(f"{files[0]} has counted no token; record while requests run, then dump")
    return ExpertStatistics(
        load_NLE=counts_NLE[:, is_moe_L],
        layers=tuple(np.flatnonzero(is_moe_L).tolist()),
        source=source,
        num_layers=len(is_moe_L),
    )


def _array(path: Path, name: str, value: object, *, dims: tuple[int, ...]) -> Counts:
    if not isinstance(value, torch.Tensor) or value.dim() not in dims or value.is_floating_point():
        raise TraceError(f"{path} has no {name} of whole numbers as SGLang 0.5.23 writes it; record anew")
    return np.asarray(value.to(torch.int64).numpy())


def _require_equal(files: Sequence[Path], facts: Sequence[object], what: str) -> None:
    for path, fact in zip(files, facts, strict=True):
        if fact != facts[0]:
            raise TraceError(f"{files[0].name} and {path.name} have {what}; name the files of one dump")
