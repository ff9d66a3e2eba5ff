"""The load balancer's configuration of TensorRT-LLM: the YAML file that ``moe_config.load_balancer`` names.

``num_slots``, ``initial_global_assignments`` (absolute layer id to the expert of every slot), and 0 ``layer_updates_per_iter``:
the engine keeps to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from poise.errors import PlacementError
from poise.spec.placement import Placement, as_slots
from poise.spec.whole_file import write_whole

KEY = "initial_global_assignments"


def write_tensorrt_llm(placement: Placement, path: Path) -> None:
    """Writes the file whole or not at all. Raises PlacementError if it cannot be written."""
    rows = zip(placement.layers, placement.slot_to_expert_LS.tolist(), strict=True)
    lines = [f"  {layer}: [{', '.join(map(str, row_S))}]" for layer, row_S in rows]
    head = [f"num_slots: {placement.slot_to_expert_LS.shape[1]}", "layer_updates_per_iter: 0", f"{KEY}:"]
    try:
        write_whole(path, "\n".join([*head, *lines]) + "\n")
    except OSError as error:
        raise PlacementError(f"{path} cannot be written ({error.strerror}); name another file") from None


def parse_yaml(path: Path) -> object:
    """The content of a YAML file. Raises PlacementError."""
    try:
        content: object = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise PlacementError(f"placement {path} cannot be read ({error.strerror}); name one that can") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise PlacementError(f"placement {path} is not YAML; `poise place --format trtllm` writes one") from None
    return content


def from_tensorrt_llm(
    content: Mapping[str, object], where: str, *, layers: tuple[int, ...], num_experts: int, ranks: int
) -> Placement:
    """The rows of ``layers`` of such a file's content. Raises PlacementError."""
    rows = content.get(KEY)
    if not isinstance(rows, dict) or not all(isinstance(row, list) for row in rows.values()):
        raise PlacementError(f"{where} has no {KEY} (layer: [expert of every slot]); name one that has")
    if missing := [layer for layer in layers if layer not in rows]:
        raise PlacementError(f"{where} does not place layer {missing[0]}, which the statistics have")
    try:
        placement = Placement(
            slot_to_expert_LS=as_slots([rows[layer] for layer in layers]),
            layers=layers,
            num_experts=num_experts,
            ranks=ranks,
        )
    except PlacementError as error:
        raise PlacementError(f"{where}: {error}; name the placement that the statistics were recorded under") from None
    slots = placement.slot_to_expert_LS.shape[1]
    if content.get("num_slots", slots) != slots:
        raise PlacementError(f"{where} says num_slots {content['num_slots']} and places {slots}; correct one of them")
    return placement
