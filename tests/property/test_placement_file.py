"""placement.json: what goes in comes out, and whatever is wrong with a file or a placement is one clear refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from poise.errors import PlacementError
from poise.spec.placement import Placement, contiguous


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    experts, ranks = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    slots = ranks * -(-(experts + draw(st.integers(0, 5))) // ranks)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    layers = draw(st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True))
    more = rng.integers(0, experts, (len(layers), slots - experts))
    rows = np.concatenate([np.tile(np.arange(experts), (len(layers), 1)), more], axis=1)
    return Placement(
        slot_to_expert_LS=rng.permuted(rows, axis=1).astype(np.int32),
        layers=tuple(sorted(layers)),
        num_experts=experts,
        ranks=ranks,
    )


@given(placement=placements())
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_holds_the_placement(placement: Placement, tmp_path: Path) -> None:
    placement.save(tmp_path / "placement.json")
    read = Placement.load(tmp_path / "placement.json")
    assert np.array_equal(read.slot_to_expert_LS, placement.slot_to_expert_LS)
    assert (read.layers, read.num_experts, read.ranks) == (placement.layers, placement.num_experts, placement.ranks)
    assert read.slots_per_rank == placement.slots_per_rank


GOOD = contiguous((3, 5), num_experts=4, ranks=2, slots_per_rank=3).to_json()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"version": 2}, "is of version 2; this Poise reads version 1: place anew"),
        ({"versions": 1}, "has unknown fields: versions; take them out"),
        ({"ranks": None}, "ranks is None; it must be a whole number"),
        ({"ranks": 3}, "layer 3 has 6 slots; 3 ranks of 3 have 9"),
        ({"experts": 5}, "layer 3 has no slot for expert 4; every expert needs one; place anew"),
        ({"experts": 3}, "layer 3 names expert 3 of 3; place anew"),
        ({"layers": []}, "it has 0 layers and"),
        ({"layers": 7}, "layers is 7; it must be a list"),
        ({"layers": [{"layer": 3}]}, "layers[0] has no field 'slot_to_expert'"),
        ({"layers": GOOD["layers"][::-1]}, "layer ids 5, 3 must rise from 0 or more"),
        ({"layers": [{"layer": 3, "slot_to_expert": [0, 1, 2, 3, 0, 2**40]}]}, "an entry that is no expert's number"),
        ({"layers": [{"layer": 3, "slot_to_expert": [0, 1, 2, 3, 0, 1.5]}]}, "it must be a list of whole numbers"),
        ({"layers": [{"layer": 3, "slot_to_expert": [0, 1, 2, 3, 0, -1]}]}, "layer 3 names expert -1 of 4"),
    ],
)
def test_a_wrong_file_is_refused(change: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(PlacementError) as refusal:
        Placement.load(file)
    assert complaint in str(refusal.value)
    assert "p.json" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match="cannot be read"):
        Placement.load(tmp_path / "none.json")
    (tmp_path / "p.json").write_text("{")
    with pytest.raises(PlacementError, match="is not JSON"):
        Placement.load(tmp_path / "p.json")
    with pytest.raises(PlacementError, match="cannot be written"):
        Placement.from_json(GOOD).save(tmp_path / "none" / "p.json")
