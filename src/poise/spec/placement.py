"""What a placement is: which expert lies in each slot of each MoE layer; slots in the order of their ranks.

Rank r of R owns the slots ``r*S/R ... (r+1)*S/R - 1``, as in every engine. Layers are absolute ids of the model. The file
``placement.json`` (version 1) is this and nothing else; engines' own formats are in ``poise.integrations``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from poise.errors import PlacementError
from poise.spec.fields import Fields
from poise.spec.whole_file import write_whole

VERSION = 1

Slots = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Placement:
    """``slot_to_expert_LS``: int32, row i for the layer ``layers[i]``. Raises PlacementError for one that no engine can load:
    slots that do not divide by ``ranks``, an expert without a slot, an expert that the model does not have."""

    slot_to_expert_LS: Slots
    layers: tuple[int, ...]
    num_experts: int
    ranks: int

    def __post_init__(self) -> None:
        slots = self.slot_to_expert_LS
        assert slots.dtype == np.int32, f"slot_to_expert is int32, not {slots.dtype}"
        assert slots.ndim == 2, f"slot_to_expert has the shape {slots.shape}, not (layers, slots)"
        _require(slots.size > 0, f"it has {slots.shape[0]} layers and {slots.shape[1]} slots; it needs both")
        _require(len(self.layers) == len(slots), f"{len(slots)} rows are given for {len(self.layers)} layer ids")
        _require(
            list(self.layers) == sorted(set(self.layers)) and self.layers[0] >= 0,
            f"layer ids {_some(self.layers)} must rise from 0 or more",
        )
        _require(self.num_experts >= 1, f"{self.num_experts} experts are given; a layer has at least 1")
        _require(self.ranks >= 1, f"{self.ranks} ranks are given; there is at least 1")
        _require(slots.shape[1] % self.ranks == 0, f"{slots.shape[1]} slots do not divide by {self.ranks} ranks")
        for layer, row_S in zip(self.layers, slots, strict=True):
            _require_layer(layer, row_S, self.num_experts)

    @property
    def slots_per_rank(self) -> int:
        """Experts, replicas included, that each rank holds of a layer."""
        return int(self.slot_to_expert_LS.shape[1]) // self.ranks

    def to_json(self) -> dict[str, Any]:
        """What the file holds."""
        rows = zip(self.layers, self.slot_to_expert_LS.tolist(), strict=True)
        return {
            "version": VERSION,
            "experts": self.num_experts,
            "ranks": self.ranks,
            "slots_per_rank": self.slots_per_rank,
            "layers": [{"layer": layer, "slot_to_expert": row_S} for layer, row_S in rows],
        }

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all. Raises PlacementError if it cannot be written."""
        try:
            write_whole(path, json.dumps(self.to_json()) + "\n")
        except OSError as error:
            raise PlacementError(f"{path} cannot be written ({error.strerror}); name another file") from None

    @classmethod
    def load(cls, path: Path) -> Placement:
        """Raises PlacementError, one line that names the place and the rule, for anything but a placement of version 1."""
        return cls.from_json(read_json(path), str(path))

    @classmethod
    def from_json(cls, content: object, where: str = "placement") -> Placement:
        """The placement that ``to_json`` gives. ``where`` begins the message of an error."""
        fields = Fields(content, where, PlacementError)
        version = fields.whole("version")
        if version != VERSION:
            raise PlacementError(f"{where} is of version {version}; this Poise reads version {VERSION}: place anew")
        num_experts, ranks = fields.whole("experts"), fields.whole("ranks")
        slots_per_rank = fields.whole("slots_per_rank")
        rows = fields.many("layers", lambda row: (row.whole("layer"), row.wholes("slot_to_expert")))
        fields.end()
        for layer, row_S in rows:
            if len(row_S) != ranks * slots_per_rank:
                raise PlacementError(
                    f"{where}: layer {layer} has {len(row_S)} slots; {ranks} ranks of {slots_per_rank} have "
                    f"{ranks * slots_per_rank}"
                )
        try:
            return cls(
                slot_to_expert_LS=as_slots([row_S for _, row_S in rows]),
                layers=tuple(layer for layer, _ in rows),
                num_experts=num_experts,
                ranks=ranks,
            )
        except PlacementError as error:
            raise PlacementError(f"{where}: {error}; place anew") from None


def contiguous(layers: tuple[int, ...], *, num_experts: int, ranks: int, slots_per_rank: int) -> Placement:
    """What every engine starts with: slot s holds expert ``s mod num_experts``."""
    row_S = np.arange(ranks * slots_per_rank, dtype=np.int32) % np.int32(num_experts)
    return Placement(
        slot_to_expert_LS=np.tile(row_S, (len(layers), 1)), layers=layers, num_experts=num_experts, ranks=ranks
    )


def as_slots(rows: Any) -> Slots:
    """Rows of expert ids as (L, S). Raises PlacementError where they are of different lengths or beyond int32."""
    if len({len(row) for row in rows}) > 1:
        raise PlacementError("its layers have different numbers of slots; every layer has the same")
    try:
        slots = np.array(rows, dtype=np.int32)
    except (OverflowError, ValueError, TypeError):
        raise PlacementError("it has an entry that is no expert's number; write whole numbers from 0") from None
    return slots.reshape(len(rows), len(rows[0]) if rows else 0)


def read_json(path: Path) -> object:
    """The content of a JSON file. Raises PlacementError."""
    try:
        content: object = json.loads(path.read_bytes())
    except OSError as error:
        raise PlacementError(f"placement {path} cannot be read ({error.strerror}); name one that can") from None
    except (ValueError, RecursionError):
        raise PlacementError(f"placement {path} is not JSON; `poise place --output` writes one") from None
    return content


def _require_layer(layer: int, row_S: Slots, num_experts: int) -> None:
    least, most = int(row_S.min()), int(row_S.max())
    wrong = least if least < 0 else most
    _require(least >= 0 and most < num_experts, f"layer {layer} names expert {wrong} of {num_experts}")
    missing = np.flatnonzero(np.bincount(row_S, minlength=num_experts) == 0)
    _require(
        not missing.size, f"layer {layer} has no slot for expert {_some(missing.tolist())}; every expert needs one"
    )


def _some(items: Any) -> str:
    """At most eight of them."""
    shown = ", ".join(str(item) for item in items[:8])
    return f"{shown}, ..." if len(items) > 8 else shown


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise PlacementError(problem)
