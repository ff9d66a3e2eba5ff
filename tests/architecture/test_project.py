"""The project's own rules: import contracts, the public names, the README's snippets."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import poise
import poise.plan

ROOT = Path(__file__).resolve().parents[2]


def test_imports_go_down_only() -> None:
    result = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports"))], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-2000:]


def test_every_public_name_can_be_imported() -> None:
    for name in poise.__all__:
        assert getattr(poise, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = poise.nonsense


def test_every_planner_can_be_imported_and_is_a_function() -> None:
    for name in poise.plan.__all__:
        assert callable(getattr(poise.plan, name))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = poise.plan.nonsense


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_python_snippets_run(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    assert snippets, f"{page} shows no Python"
    for snippet in snippets:
        exec(compile(snippet, page, "exec"), {})


def test_every_table_of_commands_matches_the_command_line() -> None:
    shown = set(re.findall(r"^\| `poise (\w+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE))
    helped = subprocess.run(
        [sys.executable, "-m", "poise", "--help"], capture_output=True, text=True, check=True
    ).stdout
    commands = ("demo", "generate", "plan", "profile", "record", "distill", "place", "bench")
    assert shown == {command for command in commands if command in helped}
