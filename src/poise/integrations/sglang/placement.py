"""``--init-expert-location FILE.json`` of SGLang 0.5.23: ``{"physical_to_logical_map": [L][P]}`` and no other key.

SGLang counts all layers of the model, dense ones too; their rows hold the contiguous map, which nothing reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from poise.errors import PlacementError
from poise.spec.placement import Placement, as_slots
from poise.spec.whole_file import write_whole

KEY = "physical_to_logical_map"


def write_sglang(placement: Placement, path: Path, *, num_layers: int) -> None:
    """Writes the file whole or not at all. Raises PlacementError if it cannot be written or ``num_layers`` is too few."""
    if placement.layers[-1] >= num_layers:
        raise PlacementError(
            f"the model has {num_layers} layers and layer {placement.layers[-1]} is placed; say how many"
        )
    if path.suffix != ".json":
        raise PlacementError(f"SGLang takes {path} for inline JSON; name a file that ends in .json")
    slots = placement.slot_to_expert_LS.shape[1]
    map_LP = np.tile(np.arange(slots, dtype=np.int32) % np.int32(placement.num_experts), (num_layers, 1))
    map_LP[list(placement.layers)] = placement.slot_to_expert_LS
    try:
        write_whole(path, json.dumps({KEY: map_LP.tolist()}) + "\n")
    except OSError as error:
        raise PlacementError(f"{path} cannot be written ({error.strerror}); name another file") from None


def from_sglang(
    content: Mapping[str, object], where: str, *, layers: tuple[int, ...], num_experts: int, ranks: int
) -> Placement:
    """The rows of ``layers`` of such a file's content. Raises PlacementError."""
    rows = content.get(KEY)
    if set(content) != {KEY} or not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise PlacementError(f"{where} is no expert location of SGLang: {KEY} and nothing else, a list for each layer")
    if layers[-1] >= len(rows):
        raise PlacementError(f"{where} has {len(rows)} layers and the statistics have layer {layers[-1]}")
    try:
        return Placement(
            slot_to_expert_LS=as_slots([rows[layer] for layer in layers]),
            layers=layers,
            num_experts=num_experts,
            ranks=ranks,
        )
    except PlacementError as error:
        raise PlacementError(f"{where}: {error}; name the placement that the statistics were recorded under") from None
