"""Expert statistics of TensorRT-LLM, as ``EXPERT_STATISTIC_PATH`` holds them.

A folder with ``meta_info.json`` {num_experts, num_experts_per_token} and ``rank{r}.safetensors`` for each rank, whose keys
"{iteration}_{layer}" hold that rank's counts of logical experts. Ranks are summed; ``*_raw.safetensors`` are not read. Layers
are those of experts only, with absolute ids.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from poise.errors import TraceError
from poise.spec.statistics import ExpertStatistics

META = "meta_info.json"


def read_tensorrt_llm(folder: Path) -> ExpertStatistics:
    """Counts of each iteration and MoE layer. Raises TraceError, one line that names the file."""
    num_experts = _num_experts(folder / META)
    files = sorted(path for path in folder.glob("rank*.safetensors") if re.fullmatch(r"rank\d+", path.stem))
    if not files:
        raise TraceError(f"{folder} has no rank0.safetensors; name the folder that EXPERT_STATISTIC_PATH named")
    counts: dict[tuple[int, int], npt.NDArray[np.int64]] = {}
    for path in files:
        for key, counts_E in _rank_counts(path, num_experts).items():
            counts[key] = counts[key] + counts_E if key in counts else counts_E
    iterations, layers = ({key[place] for key in counts} for place in (0, 1))
    if not counts:
        raise TraceError(f"{folder} counts no iteration; record with EXPERT_STATISTIC_ITER_RANGE while requests run")
    load_NLE = np.zeros((len(iterations), len(layers), num_experts), dtype=np.int64)
    for step, iteration in enumerate(sorted(iterations)):
        for row, layer in enumerate(sorted(layers)):
            if (iteration, layer) not in counts:
                raise TraceError(f"{folder} lacks layer {layer} of iteration {iteration}; record anew")
            load_NLE[step, row] = counts[iteration, layer]
    return ExpertStatistics(
        load_NLE=load_NLE[load_NLE.any(axis=(1, 2))], layers=tuple(sorted(layers)), source="TensorRT-LLM statistics"
    )


def _num_experts(path: Path) -> int:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise TraceError(f"statistics {path} cannot be read ({error.strerror}); TensorRT-LLM writes it") from None
    except (ValueError, RecursionError):
        raise TraceError(f"statistics {path} is not JSON; record anew") from None
    number = content.get("num_experts") if isinstance(content, dict) else None
    if type(number) is not int or number < 1:
        raise TraceError(f"{path} has num_experts {number!r}; it must be a whole number from 1")
    return number


def _rank_counts(path: Path, num_experts: int) -> dict[tuple[int, int], npt.NDArray[np.int64]]:
    """(iteration, layer) to one rank's counts."""
    counts = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                match = re.fullmatch(r"(\d+)_(\d+)", key)
                counts_E = np.asarray(file.get_tensor(key))
                if match is None or counts_E.shape != (num_experts,) or not np.issubdtype(counts_E.dtype, np.integer):
                    raise TraceError(
                        f"{path} has {key!r} with the shape {counts_E.shape} of {counts_E.dtype}; expected are "
                        f'"iteration_layer" with {num_experts} whole numbers'
                    )
                counts[int(match[1]), int(match[2])] = counts_E.astype(np.int64)
    except (OSError, SafetensorError) as error:
        raise TraceError(f"{path} cannot be read as safetensors ({error}); record anew") from None
    return counts
