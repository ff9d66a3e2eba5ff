"""The output file: complete and in order of input or not there, whatever interrupts the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poise.cli.output import FinishedResults, ResultFile, fingerprint, finished_results, journal_path
from poise.errors import PoiseError, UsageError

IDENTITY = {"model": "/m", "prompts": fingerprint(["a", "b"])}


def open_file(path: Path, total: int, *, resume: bool = False, overwrite: bool = False) -> ResultFile:
    return ResultFile(path, total=total, identity=IDENTITY, resume=resume, overwrite=overwrite)


def line(index: int, text: str = "ü\n\r\x0b\x1c\u0085\u2028\u2029") -> dict[str, object]:
    return {"index": index, "prompt": f"p{index}", "text": text}


def interrupted_run(path: Path, indices: Sequence[int], total: int) -> None:
    with open_file(path, total) as file:
        for index in indices:
            file.append(line(index))


def complete_run(path: Path, total: int, *, overwrite: bool = False) -> None:
    with open_file(path, total, overwrite=overwrite) as file:
        for index in range(total):
            file.append(line(index))
        file.finish()


@st.composite
def interrupted_histories(draw: st.DrawFn) -> tuple[list[str], list[int], list[tuple[int, float]]]:
    """Texts of the results, the order in which they finish, and crashes: (results until then, share of bytes kept)."""
    texts = draw(st.lists(st.text(max_size=8), min_size=1, max_size=6))
    order = draw(st.permutations(range(len(texts))))
    crashes = draw(st.lists(st.tuples(st.integers(0, len(texts)), st.floats(0, 1)), max_size=3))
    return texts, order, crashes


@given(history=interrupted_histories())
def test_any_finishing_order_crashes_and_resumes_give_the_file_of_an_uninterrupted_run(
    history: tuple[list[str], list[int], list[tuple[int, float]]],
) -> None:
    texts, order, crashes = history
    total = len(texts)
    with tempfile.TemporaryDirectory() as folder:
        plain, crashed = Path(folder, "plain.jsonl"), Path(folder, "crashed.jsonl")
        with open_file(plain, total) as file:
            for index in range(total):
                file.append(line(index, texts[index]))
            file.finish()
        for results_until_crash, kept_frac in crashes:
            with open_file(crashed, total, resume=True) as file:
                for index in [index for index in order if index not in file.finished][:results_until_crash]:
                    file.append(line(index, texts[index]))
            assert not crashed.exists()
            if (journal := journal_path(crashed)).exists():  # a torn write, anywhere
                content = journal.read_bytes()
                journal.write_bytes(content[: round(len(content) * kept_frac)])
        with open_file(crashed, total, resume=True) as file:
            for index in [index for index in order if index not in file.finished]:
                file.append(line(index, texts[index]))
            assert [result["text"] for result in file.lines()] == texts
            file.finish()
        assert crashed.read_bytes() == plain.read_bytes()
        assert sorted(path.name for path in Path(folder).iterdir()) == ["crashed.jsonl", "plain.jsonl"]


def test_a_killed_process_loses_no_finished_result(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    script = (
        "import os, signal, sys; from pathlib import Path; from poise.cli.output import ResultFile\n"
        f"file = ResultFile(Path(sys.argv[1]), total=4, identity={IDENTITY!r})\n"
        "for index in (3, 0): file.append({'index': index, 'text': 'kept'})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)], check=False).returncode == -9
    with open_file(path, 4, resume=True) as file:
        assert file.finished == {0, 3}
        assert [result["text"] for result in file.lines()] == ["kept", "kept"]


def test_a_full_disk_is_one_line_and_what_was_finished_stays(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    script = (
        "import resource, sys; from pathlib import Path; from poise.cli.output import ResultFile\n"
        "from poise.errors import PoiseError\n"
        f"file = ResultFile(Path(sys.argv[1]), total=4, identity={IDENTITY!r})\n"
        "file.append({'index': 1, 'text': 'kept'})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "try: file.append({'index': 0, 'text': 'x' * 4000})\n"
        "except PoiseError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert run.stdout == f"{journal_path(path)} cannot be read or written: File too large\n"
    with open_file(path, 4, resume=True) as file:
        assert file.finished == {1}


def test_a_run_that_finished_nothing_leaves_nothing(tmp_path: Path) -> None:
    interrupted_run(tmp_path / "out.jsonl", [], 3)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_cannot_be_completed_leaves_no_output_but_its_results(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with open_file(path, 1) as file:
        file.append(line(0))
        path.mkdir()
        with pytest.raises(PoiseError, match=r"out\.jsonl cannot be read or written"):
            file.finish()
    path.rmdir()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.jsonl.partial"]


def test_an_interrupted_run_is_not_thrown_away_unasked(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    interrupted_run(path, [2], 3)
    with pytest.raises(UsageError) as refusal:
        open_file(path, 3)
    assert "holds 1 results of an interrupted run; add --resume to continue it, or --overwrite" in str(refusal.value)
    complete_run(path, 3, overwrite=True)
    assert not journal_path(path).exists()


def test_an_output_file_is_not_replaced_unasked(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("mine\n")
    with pytest.raises(UsageError, match="exists; add --overwrite to replace it, or name another"):
        open_file(path, 1)
    with open_file(path, 2, overwrite=True) as file:
        file.append(line(0))
    assert path.read_text() == "mine\n", "the old file stays until the new one is complete"
    with pytest.raises(UsageError, match="interrupted run"):
        open_file(path, 2)
    with open_file(path, 2, resume=True) as file:
        file.append(line(1))
        file.finish()
    assert [json.loads(text)["index"] for text in path.read_text().splitlines()] == [0, 1]


def test_a_journal_without_results_does_not_let_an_output_file_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("mine\n")
    journal_path(path).write_bytes(b"")
    with pytest.raises(UsageError, match="exists; add --overwrite"):
        open_file(path, 1)
    assert path.read_text() == "mine\n"


def test_results_of_another_run_are_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    interrupted_run(path, [0], 2)
    before = journal_path(path).read_bytes()
    with pytest.raises(UsageError, match="belongs to a run with other model; give the same again"):
        ResultFile(path, total=2, identity={**IDENTITY, "model": "/other"}, resume=True)
    assert journal_path(path).read_bytes() == before


@pytest.mark.parametrize("damage", ['{"index": 0}', '{"index": 2}', '{"index": -1}', "[]", "{", '{"text": "x"}'])
def test_a_damaged_journal_is_refused_by_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "out.jsonl"
    interrupted_run(path, [0], 2)
    with journal_path(path).open("a") as journal:
        journal.write(f"{damage}\n")
    with pytest.raises(UsageError, match=r"is damaged in line 3; use --overwrite"):
        open_file(path, 2, resume=True)


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_a_file_that_is_no_journal_is_never_touched(tmp_path: Path, options: dict[str, bool]) -> None:
    journal = journal_path(tmp_path / "out.jsonl")
    journal.write_text("somebody's notes")
    with pytest.raises(UsageError, match="is not a journal of this version of poise; move it away"):
        open_file(tmp_path / "out.jsonl", 1, **options)
    assert journal.read_text() == "somebody's notes"


def test_two_runs_do_not_write_one_journal(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with open_file(path, 2) as first:
        first.append(line(0))
        for overwrite in (False, True):
            with pytest.raises(UsageError, match="is being written by another run"):
                open_file(path, 2, resume=not overwrite, overwrite=overwrite)


def test_places_where_no_file_can_be_written_are_refused(tmp_path: Path) -> None:
    for path, complaint in [
        (tmp_path, "is not a regular file"),
        (Path("/dev/null"), "is not a regular file"),
        (tmp_path / "none" / "out.jsonl", "does not exist; create it"),
    ]:
        with pytest.raises(UsageError, match=complaint):
            open_file(path, 1, overwrite=True)


def test_a_link_is_followed_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "out.jsonl"
    link.symlink_to(tmp_path / "real" / "out.jsonl")
    complete_run(link, 2)
    assert link.is_symlink()
    assert (tmp_path / "real" / "out.jsonl").is_file()


def test_a_result_is_one_line_for_every_reader_and_keeps_its_characters(tmp_path: Path) -> None:
    complete_run(tmp_path / "out.jsonl", 2)
    text = (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    assert [json.loads(result) for result in text.splitlines()] == [line(0), line(1)]
    assert "ü" in text


HEADS = [{"index": index, "prompt": f"p{index}"} for index in range(2)]


def test_a_finished_output_is_recognised_by_its_prompts(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    assert finished_results(path, HEADS, IDENTITY) is None
    complete_run(path, 2)
    for others in (HEADS[:1], [*HEADS, HEADS[0]], [HEADS[0], {"index": 1, "prompt": "other"}]):
        with pytest.raises(UsageError, match="holds the results of other prompts; use --overwrite"):
            finished_results(path, others, IDENTITY)
    path.write_text("no JSON\n")
    with pytest.raises(UsageError, match="holds the results of other prompts"):
        finished_results(path, HEADS[:1], IDENTITY)


def test_a_finished_output_of_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    complete_run(path, 2)
    if "user.poise.identity" not in os.listxattr(path):
        pytest.skip(f"the file system of {tmp_path} keeps no attributes")
    assert finished_results(path, HEADS, IDENTITY) == FinishedResults(lines=[line(0), line(1)], is_same_run=True)
    other = {**IDENTITY, "model": "/other"}
    with pytest.raises(
        UsageError, match="holds the results of a run with other model; use --overwrite, or name another"
    ):
        finished_results(path, HEADS, other)
    with pytest.raises(UsageError, match="with other model and sampling options; use"):
        finished_results(path, HEADS, {**other, "sampling options": "new"})


def test_a_finished_output_that_does_not_say_its_run_is_known_by_its_prompts_alone(tmp_path: Path) -> None:
    complete_run(tmp_path / "out.jsonl", 2)
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((tmp_path / "out.jsonl").read_bytes())
    known = FinishedResults(lines=[line(0), line(1)], is_same_run=False)
    assert finished_results(copy, HEADS, {**IDENTITY, "model": "/other"}) == known
