"""Where an expert's bytes are read from and put: whatever lies where on disk, nothing is lost and little is read in vain."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from poise.model.checkpoint import TensorRef
from poise.model.read_plan import ALIGNMENT, MAX_GAP_BYTES, Extent, ReadPlan, plan_reads

FILES = [Path("a.safetensors"), Path("b.safetensors")]
GAPS = st.one_of(
    st.integers(0, 3), st.integers(0, 4 * ALIGNMENT), st.integers(MAX_GAP_BYTES - 2, MAX_GAP_BYTES + 2), st.just(10**7)
)


@st.composite
def parts_on_disk(draw: st.DrawFn) -> list[TensorRef]:
    """Tensors that do not overlap, in one or two files, in any order."""
    parts = []
    for file in FILES[: draw(st.integers(1, 2))]:
        offset = draw(st.integers(8, 3 * ALIGNMENT))
        for number in range(draw(st.integers(1, 5))):
            nbytes = draw(st.integers(1, 3 * ALIGNMENT))
            parts.append(
                TensorRef(name=f"{file}:{number}", file=file, dtype="U8", shape=(nbytes,), offset=offset, nbytes=nbytes)
            )
            offset += nbytes + draw(GAPS)
    return draw(st.permutations(parts))


def extents_with(plan: ReadPlan, part: TensorRef) -> list[Extent]:
    """The extents whose needed bytes include all of a part."""
    return [
        extent
        for extent in plan.extents
        if extent.file == part.file
        and extent.file_offset <= part.offset
        and part.offset + part.nbytes <= extent.file_offset + extent.needed_bytes
    ]


@settings(max_examples=200, deadline=None)
@given(parts_on_disk())
def test_every_part_arrives_once_at_the_offset_the_plan_states(parts: list[TensorRef]) -> None:
    plan = plan_reads(parts)
    for part in parts:
        (extent,) = extents_with(plan, part)
        assert plan.slot_offsets[part] == extent.slot_offset + part.offset - extent.file_offset
    assert set(plan.slot_offsets) == set(parts)


@settings(max_examples=200, deadline=None)
@given(parts_on_disk())
def test_extents_are_aligned_and_do_not_overlap_in_the_slot(parts: list[TensorRef]) -> None:
    plan = plan_reads(parts)
    end = 0
    for extent in sorted(plan.extents, key=lambda extent: extent.slot_offset):
        assert extent.file_offset % ALIGNMENT == extent.nbytes % ALIGNMENT == extent.slot_offset % ALIGNMENT == 0
        assert 0 < extent.needed_bytes <= extent.nbytes < extent.needed_bytes + ALIGNMENT
        assert extent.slot_offset >= end
        end = extent.slot_offset + extent.nbytes
    assert end <= plan.nbytes


@settings(max_examples=200, deadline=None)
@given(parts_on_disk())
def test_no_part_costs_more_than_a_gap_and_the_alignment(parts: list[TensorRef]) -> None:
    plan = plan_reads(parts)
    needed = sum(part.nbytes for part in parts)
    assert needed <= plan.nbytes == sum(extent.nbytes for extent in plan.extents)
    assert plan.nbytes <= needed + len(parts) * MAX_GAP_BYTES + 2 * ALIGNMENT * len(plan.extents)


@settings(max_examples=100, deadline=None)
@given(parts_on_disk())
def test_the_order_in_which_parts_are_named_does_not_matter(parts: list[TensorRef]) -> None:
    assert plan_reads(parts) == plan_reads(sorted(parts, key=lambda part: part.name))


def test_the_three_matrices_of_an_expert_that_lie_side_by_side_are_one_read() -> None:
    sizes, begin = (3_145_728, 3_145_728, 3_145_728), 1_000_000
    parts = [
        TensorRef(name=name, file=FILES[0], dtype="BF16", shape=(768, 2048), offset=begin + place * size, nbytes=size)
        for place, (name, size) in enumerate(zip(("down", "gate", "up"), sizes, strict=True))
    ]
    (extent,) = plan_reads(parts).extents
    assert extent.nbytes <= sum(sizes) + 2 * ALIGNMENT
