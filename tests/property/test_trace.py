"""The routing trace's file: what goes in comes out, and whatever is wrong with a file is one clear refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from poise.errors import TraceError
from poise.spec.trace import RoutingTrace


@st.composite
def traces(draw: st.DrawFn) -> RoutingTrace:
    steps, layers, experts = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    top_k = draw(st.integers(1, experts))
    tokens = draw(st.lists(st.integers(1, 50), min_size=steps, max_size=steps))
    ranks = draw(st.none() | st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    counts_NLE = np.zeros((steps, layers, experts), dtype=np.int32)
    by_rank = None if ranks is None else np.zeros((steps, layers, ranks, experts), dtype=np.int32)
    for step, layer in np.ndindex(steps, layers):
        for _ in range(tokens[step]):
            chosen = rng.permutation(experts)[: rng.integers(0, top_k + 1)]
            counts_NLE[step, layer, chosen] += 1
            if by_rank is not None:
                by_rank[step, layer, rng.integers(by_rank.shape[2]), chosen] += 1
    ids = draw(st.lists(st.integers(0, 99), min_size=layers, max_size=layers, unique=True))
    return RoutingTrace(
        counts_NLE=counts_NLE,
        model=draw(st.text(max_size=20)),
        top_k=top_k,
        layers=tuple(sorted(ids)),
        tokens_per_step=tuple(tokens),
        counts_by_rank_NLRE=by_rank,
    )


@given(trace=traces())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_saved_trace_is_read_as_it_was(trace: RoutingTrace, tmp_path: Path) -> None:
    path = tmp_path / "trace.safetensors"
    trace.save(path)
    read = RoutingTrace.load(path)
    assert (read.model, read.top_k, read.layers) == (trace.model, trace.top_k, trace.layers)
    assert read.tokens_per_step == trace.tokens_per_step
    assert np.array_equal(read.counts_NLE, trace.counts_NLE)
    assert read.counts_NLE.dtype == np.int32
    assert np.array_equal(read.load_LE, trace.counts_NLE.sum(axis=0))
    if trace.counts_by_rank_NLRE is None:
        assert read.counts_by_rank_NLRE is None
    else:
        assert np.array_equal(read.counts_by_rank_NLRE, trace.counts_by_rank_NLRE)
    assert [entry.name for entry in tmp_path.iterdir()] == ["trace.safetensors"]


COUNTS = np.array([[[2, 1, 1], [0, 2, 2]]], dtype=np.int32)
METADATA = {
    "kind": "routing trace",
    "version": "1",
    "model": "m",
    "top_k": "2",
    "layers": "[1, 3]",
    "tokens_per_step": "[2]",
}


def test_a_file_of_another_writer_is_read(tmp_path: Path) -> None:
    save_file({"counts": COUNTS}, tmp_path / "t", METADATA)
    assert RoutingTrace.load(tmp_path / "t").layers == (1, 3)


@pytest.mark.parametrize(
    ("tensors", "metadata", "said"),
    [
        ({}, {"kind": "correlation table"}, "does not say kind 'routing trace'"),
        ({}, {"version": "2"}, "is of version 2, and this Poise reads version 1"),
        ({}, {"top_k": None}, "lacks the metadata field 'top_k'"),
        ({}, {"colour": "red"}, "has unknown metadata: colour"),
        ({}, {"top_k": "two"}, "has top_k 'two', not a whole number"),
        ({}, {"top_k": "true"}, "has top_k 'true', not a whole number"),
        ({}, {"layers": "{}"}, "has layers '{}', not a list"),
        ({}, {"layers": "[3, 1]"}, "do not rise"),
        ({}, {"layers": "[1]"}, "2 layers and 1 have ids"),
        ({}, {"tokens_per_step": "[2, 2]"}, "2 of 1 steps say their tokens"),
        ({}, {"tokens_per_step": "[1]"}, "more choices than its tokens make"),
        ({}, {"tokens_per_step": "[0]"}, "a step has no token"),
        ({}, {"top_k": "4"}, "top_k is 4 of 3 experts"),
        ({"counts": COUNTS.astype(np.int64)}, {}, "has counts as I64"),
        ({"counts": COUNTS[0]}, {}, "not I32 of 3 dimensions"),
        ({"counts": -COUNTS}, {}, "a count below 0"),
        ({"counts": None}, {}, "lacks counts"),
        ({"extra": COUNTS}, {}, "has unknown extra"),
        ({"counts_by_rank": np.zeros((1, 2, 2, 3), np.int32)}, {}, "counts_by_rank does not sum to counts"),
    ],
)
def test_what_a_reader_does_not_know_is_refused(
    tmp_path: Path, tensors: dict[str, Any], metadata: dict[str, Any], said: str
) -> None:
    path = tmp_path / "trace.safetensors"
    held = {name: array for name, array in {"counts": COUNTS, **tensors}.items() if array is not None}
    save_file(held, path, {name: text for name, text in {**METADATA, **metadata}.items() if text is not None})
    with pytest.raises(TraceError) as refusal:
        RoutingTrace.load(path)
    message = str(refusal.value)
    assert said in message
    assert str(path) in message
    assert "\n" not in message


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").write_bytes(b"")
    for name in ("text", "empty", "missing", "."):
        with pytest.raises(TraceError, match="poise record"):
            RoutingTrace.load(tmp_path / name)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.safetensors"
    save_file({"counts": COUNTS}, path, METADATA)
    trace = RoutingTrace.load(path)
    with pytest.raises(TraceError, match="cannot be written"):
        trace.save(tmp_path / "none" / "trace.safetensors")
    trace.save(path)
    assert np.array_equal(load_file(path)["counts"], COUNTS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["trace.safetensors"]
