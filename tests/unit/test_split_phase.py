"""The picture of one fetch in its parts: which stretch of a timeline it shows, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from poise.report.chrome_trace import chrome_trace_of_ranks
from poise.report.split_phase import main, stretch_of
from poise.spec.timeline import COMPUTE, EXCHANGE, PREFETCH, Span

MS = 1_000_000


def layer(begin_ms: int, part_bytes: tuple[int, int]) -> list[Span]:
    """10 ms: dispatch, experts beside part 1, combine, attention beside part 2."""
    spans = [
        (EXCHANGE, "dispatch", 0, 2, {"layer": 0}),
        (COMPUTE, "expert", 2, 5, {}),
        (PREFETCH, "fetch, part 1", 2, 5, {"layer": 1, "bytes": part_bytes[0]}),
        (EXCHANGE, "combine", 5, 7, {"layer": 0}),
        (PREFETCH, "suspended", 5, 7, {"layer": 1}),
        (COMPUTE, "attention", 7, 10, {}),
        (PREFETCH, "fetch, part 2", 7, 9, {"layer": 1, "bytes": part_bytes[1]}),
    ]
    return [Span(track, name, (begin_ms + a) * MS, (begin_ms + b) * MS, detail) for track, name, a, b, detail in spans]


def test_it_shows_the_fetch_with_most_in_both_parts_between_two_dispatches() -> None:
    rank = layer(0, (50, 1)) + layer(10, (20, 30)) + layer(20, (9, 9))
    stretch = stretch_of(chrome_trace_of_ranks([[], rank]), 1)
    assert (stretch.rank, stretch.layer) == (1, 1)
    assert stretch.seconds == pytest.approx(12e-3), "to the end of the next dispatch"
    shown = {
        name: (at_s, took_s) for _, name, at_s, took_s in stretch.events if name.startswith(("fetch", "suspended"))
    }
    assert shown == {
        "fetch, part 1": pytest.approx((2e-3, 3e-3)),
        "suspended": pytest.approx((5e-3, 2e-3)),
        "fetch, part 2": pytest.approx((7e-3, 2e-3)),
    }


def test_the_command_draws_and_says_what_it_cannot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timeline, picture = tmp_path / "timeline.json", tmp_path / "picture.png"
    timeline.write_text(json.dumps(chrome_trace_of_ranks([[], layer(0, (5, 5))])))
    main([str(timeline), str(picture), "--rank", "1"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    for rank, complaint in (("0", "no replica came to rank 0 in two parts"), ("7", "the timeline has no rank 7")):
        with pytest.raises(SystemExit):
            main([str(timeline), str(picture), "--rank", rank])
        assert complaint in capsys.readouterr().err
