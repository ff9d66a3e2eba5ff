"""Whatever holds expert statistics or a placement, told apart by what it is: the one door for the command line.

Statistics: a routing trace or an expert log (safetensors), dumps of SGLang's recorder (.pt, or a folder of them), a folder of
TensorRT-LLM. Placements: our placement.json, SGLang's JSON, TensorRT-LLM's YAML.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from poise.errors import PlacementError, TraceError
from poise.integrations.sglang.placement import KEY as SGLANG_KEY
from poise.integrations.sglang.placement import from_sglang, write_sglang
from poise.integrations.tensorrt_llm.placement import from_tensorrt_llm, parse_yaml, write_tensorrt_llm
from poise.integrations.tensorrt_llm.statistics import META, read_tensorrt_llm
from poise.spec.placement import Placement, read_json
from poise.spec.statistics import EXPERT_LOG, ExpertStatistics, from_trace, read_expert_log
from poise.spec.trace import RoutingTrace

FORMATS = ("poise", "sglang", "trtllm")
SGLANG_DUMPS = "expert_distribution_recorder_*.pt"


def read_statistics(paths: Sequence[Path]) -> ExpertStatistics:
    """Several paths are the rank files (or several ``stat`` dumps) of SGLang. Raises TraceError, one line."""
    assert paths, "statistics come from somewhere"
    first = paths[0]
    for path in paths:
        if not path.exists():
            raise TraceError(f"statistics {path} do not exist; name a trace, a dump of SGLang, or a folder")
    files = _dumps_in(first) if len(paths) == 1 and first.is_dir() and not (first / META).exists() else list(paths)
    if all(path.suffix == ".pt" for path in files):
        from poise.integrations.sglang.statistics import read_sglang  # torch takes seconds to load

        return read_sglang(files)
    if len(files) > 1:
        raise TraceError(f"{len(files)} statistics are given; several are read only where all are SGLang's .pt files")
    if first.is_dir():
        return read_tensorrt_llm(first)
    return read_expert_log(first) if _kind(first) == EXPERT_LOG.kind else from_trace(RoutingTrace.load(first))


def read_placement(path: Path, statistics: ExpertStatistics, *, ranks: int) -> Placement:
    """The placement of the layers that ``statistics`` count. Raises PlacementError where it does not fit them."""
    content = parse_yaml(path) if path.suffix in (".yaml", ".yml") else read_json(path)
    if not isinstance(content, dict):
        raise PlacementError(f"{path} is no placement; name a placement.json, SGLang's JSON or TensorRT-LLM's YAML")
    where, layers, num_experts = str(path), statistics.layers, statistics.num_experts
    if SGLANG_KEY in content:
        return from_sglang(content, where, layers=layers, num_experts=num_experts, ranks=ranks)
    if path.suffix in (".yaml", ".yml"):
        return from_tensorrt_llm(content, where, layers=layers, num_experts=num_experts, ranks=ranks)
    placement = Placement.from_json(content, where)
    for name, has, wanted in (
        ("layers", placement.layers, layers),
        ("experts", placement.num_experts, num_experts),
        ("ranks", placement.ranks, ranks),
    ):
        if has != wanted:
            raise PlacementError(f"{path} is for {name} {_short(has)}; asked for are {_short(wanted)}")
    return placement


def write_placement(placement: Placement, path: Path, *, file_format: str, num_layers: int | None) -> None:
    """``num_layers``: all layers of the model, for SGLang; None: up to the last that is placed. Raises PlacementError."""
    if file_format == "sglang":
        write_sglang(placement, path, num_layers=placement.layers[-1] + 1 if num_layers is None else num_layers)
    elif file_format == "trtllm":
        write_tensorrt_llm(placement, path)
    elif file_format == "poise":
        placement.save(path)
    else:
        raise PlacementError(f"format {file_format!r} is not known; choose one of {', '.join(FORMATS)}")


def _dumps_in(folder: Path) -> list[Path]:
    dumps = sorted(folder.glob(SGLANG_DUMPS))
    if not dumps:
        raise TraceError(f"{folder} has neither {META} (TensorRT-LLM) nor {SGLANG_DUMPS} (SGLang); name another")
    return dumps


def _kind(path: Path) -> str | None:
    """What a safetensors file says it is; None where it says nothing, so that the trace's reader refuses it."""
    try:
        with safe_open(path, framework="numpy") as file:
            kind = (file.metadata() or {}).get("kind")
    except (OSError, SafetensorError):
        return None
    return kind if isinstance(kind, str) else None


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
