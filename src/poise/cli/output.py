"""Results on their way to a JSONL file: in order of input there, in order of finishing in a journal beside it.

Contract: the output file appears at once and complete, or not at all (written beside it, then renamed). Until then each
finished result is a line of the journal ``FILE.partial``, handed to the operating system before the next one, so that a
crash of the process loses none; `resume` continues from it. A journal without a result is not kept. It is locked while
a run writes it, and its first line says what it belongs to: one of another run, or a file that is none, is refused. The
output file carries the same in an extended attribute, where the file system has those (docs/decisions/012).
Not here: surviving a power failure (there is no fsync per line, only one of the complete file).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from poise.engine.request import RequestOutput
from poise.errors import PoiseError, UsageError

_MARK = b'{"poise_journal": 1, '
"""How every journal begins; the number is the version of its format."""
_ATTRIBUTE = "user.poise.identity"
"""The extended attribute of an output file that says what its results depend on, as JSON."""

Span = tuple[int, int]
"""(start, length) of a line in the journal, in bytes, its newline included."""


def journal_path(output: Path) -> Path:
    """Where the journal of `output` lies."""
    return output.with_name(f"{output.name}.partial")


def fingerprint(value: object) -> str:
    """A short name for a JSON-like value; equal values, and in practice only those, share it."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


class ResultFile:
    """`total` results, identified by index, on their way to the file `path`. A context manager.

    `identity` names what the results depend on (``{"prompts": fingerprint, ...}``). Raises UsageError when
    `path` cannot be written, when it or a journal exists and neither `resume` nor `overwrite` says what to do, or when
    the journal to be resumed has another identity; PoiseError when the disk fails later.
    """

    def __init__(
        self, path: Path, *, total: int, identity: Mapping[str, str], resume: bool = False, overwrite: bool = False
    ) -> None:
        self.path = writable_file(path)
        self.journal = journal_path(self.path)
        self.total = total
        if not (overwrite or self.journal.exists()):
            self._require_no_output()
        self._identity = dict(identity)
        header = _MARK + json.dumps({"identity": dict(identity)})[1:].encode() + b"\n"
        self._descriptor: int | None = _open_locked(self.journal)
        try:
            self._spans, self._end = self._take_over(header, resume=resume, overwrite=overwrite)
        except BaseException:
            os.close(self._descriptor)
            raise

    @property
    def finished(self) -> frozenset[int]:
        """The indices whose results are in the journal."""
        return frozenset(self._spans)

    def append(self, line: Mapping[str, object]) -> None:
        """Adds the result ``line["index"]``, which must not be there yet."""
        index = line["index"]
        assert isinstance(index, int), f"the index of a result is an integer, not {index!r}"
        assert 0 <= index < self.total, f"result {index} is not one of {self.total}"
        assert index not in self._spans, f"result {index} is finished already"
        encoded = _encode(line)
        self._write(encoded)
        self._spans[index] = (self._end, len(encoded))
        self._end += len(encoded)

    def lines(self) -> Iterator[dict[str, Any]]:
        """The finished results in order of input."""
        for encoded in self._encoded_lines():
            yield json.loads(encoded)

    def finish(self) -> None:
        """Puts the output file in its place and removes the journal. Every result must be there."""
        assert len(self._spans) == self.total, f"{len(self._spans)} of {self.total} results are finished"
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        with _reporting(self.path):
            try:
                with temporary.open("wb") as file:
                    file.writelines(self._encoded_lines())
                    file.flush()
                    with suppress(OSError):  # a file system without attributes; finished_results says so
                        os.setxattr(file.fileno(), _ATTRIBUTE, json.dumps(self._identity).encode())
                    os.fsync(file.fileno())
                temporary.replace(self.path)
            finally:
                temporary.unlink(missing_ok=True)
            self.journal.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Lets go of the journal, which stays if it holds a result."""
        if self._descriptor is None:
            return
        if not self._spans:
            self.journal.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _take_over(self, header: bytes, *, resume: bool, overwrite: bool) -> tuple[dict[int, Span], int]:
        """Reads the journal, refuses one that must not be touched, cuts off a torn last line. Returns spans and end."""
        assert self._descriptor is not None, "the journal is open"
        content = self.journal.read_bytes()
        if not content.startswith(_MARK[: len(content)]):
            raise UsageError(f"{self.journal} is not a journal of this version of poise; move it away")
        lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
        if len(lines) > 1 and not overwrite:
            if not resume:
                raise UsageError(
                    f"{self.journal} holds {len(lines) - 1} results of an interrupted run; "
                    f"add --resume to continue it, or --overwrite to start again"
                )
            self._require_identity(lines[0], header)
            spans, end = self._spans_of(lines), sum(map(len, lines))
            os.ftruncate(self._descriptor, end)
            return spans, end
        if not (overwrite or resume):
            self._require_no_output()
        with _reporting(self.journal):
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, header, 0)
        return {}, len(header)

    def _require_no_output(self) -> None:
        if self.path.exists():
            raise UsageError(f"output file {self.path} exists; add --overwrite to replace it, or name another")

    def _require_identity(self, found: bytes, wanted: bytes) -> None:
        if found == wanted:
            return
        with suppress(ValueError, KeyError, AttributeError, TypeError):  # else: damaged, said in general terms below
            old, new = json.loads(found)["identity"], json.loads(wanted)["identity"]
            if other := _differences(old, new):
                raise UsageError(
                    f"{self.journal} belongs to a run with other {other}; give the same again, or add --overwrite "
                    f"instead of --resume to start anew"
                )
        raise UsageError(f"{self.journal} is damaged in line 1; use --overwrite instead of --resume to start anew")

    def _spans_of(self, lines: Sequence[bytes]) -> dict[int, Span]:
        spans: dict[int, Span] = {}
        start = len(lines[0])
        for number, line in enumerate(lines[1:], start=2):
            index = _index_of(line)
            if index is None or index >= self.total or index in spans:
                raise UsageError(f"{self.journal} is damaged in line {number}; use --overwrite to start anew")
            spans[index] = (start, len(line))
            start += len(line)
        return spans

    def _write(self, encoded: bytes) -> None:
        assert self._descriptor is not None, "the journal is open"
        with _reporting(self.journal):
            written = 0
            while written < len(encoded):
                written += os.pwrite(self._descriptor, encoded[written:], self._end + written)

    def _encoded_lines(self) -> Iterator[bytes]:
        assert self._descriptor is not None, "the journal is open"
        for index in sorted(self._spans):
            start, length = self._spans[index]
            yield os.pread(self._descriptor, length, start)


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedResults:
    """The complete results in an output file. ``is_same_run``: the file says that they are of a run with this identity."""

    lines: list[dict[str, Any]]
    is_same_run: bool


def finished_results(
    path: Path, heads: Sequence[Mapping[str, object]], identity: Mapping[str, str]
) -> FinishedResults | None:
    """The results in `path` if it exists and no journal says that a newer run is under way; else None.

    Raises UsageError if they are not the results of the prompts in `heads` (what is known of each line before a run), or
    if the file says that they are of a run with another identity. Not every file says so: `is_same_run` is False then.
    """
    target = writable_file(path)
    if not target.exists() or journal_path(target).exists():
        return None
    with _reporting(path):
        content = target.read_bytes()
    try:
        lines = [json.loads(line) for line in content.splitlines()]
        same = len(lines) == len(heads) and all(
            {**line, **head} == line for line, head in zip(lines, heads, strict=True)
        )
    except (ValueError, TypeError):
        same = False
    if not same:
        raise UsageError(f"output file {path} holds the results of other prompts; use --overwrite, or name another")
    known = _identity_of(target)
    if known is not None and (other := _differences(known, identity)):
        raise UsageError(
            f"output file {path} holds the results of a run with other {other}; use --overwrite, or name another"
        )
    return FinishedResults(lines=lines, is_same_run=known is not None)


def _identity_of(output: Path) -> dict[str, str] | None:
    """What an output file says that its results depend on; None where it says nothing."""
    try:
        identity = json.loads(os.getxattr(output, _ATTRIBUTE))
    except (OSError, ValueError):
        return None
    return identity if isinstance(identity, dict) else None


def _differences(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """The names of what differs, for an error line."""
    return " and ".join(name for name in new if old.get(name) != new[name])


def output_line(head: Mapping[str, Any], output: RequestOutput) -> dict[str, Any]:
    """A line of output: `head` (what was known of it before the run), then what was generated."""
    completion = output.outputs[0]
    return {
        **head,
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "prompt_tokens": len(output.prompt_token_ids),
        "generated_tokens": len(completion.token_ids),
    }


def _encode(line: Mapping[str, object]) -> bytes:
    """One line for every reader: ``str.splitlines`` and JavaScript also end lines at the characters escaped here."""
    text = json.dumps(line, ensure_ascii=False)
    for separator in ("\u0085", "\u2028", "\u2029"):
        text = text.replace(separator, f"\\u{ord(separator):04x}")
    return text.encode() + b"\n"


def _index_of(line: bytes) -> int | None:
    try:
        index = json.loads(line)["index"]
    except (ValueError, TypeError, KeyError):
        return None
    return index if type(index) is int and index >= 0 else None


def writable_file(path: Path) -> Path:
    """`path` with symbolic links followed, once it is certain that a file can be put there."""
    target = Path(os.path.realpath(path))
    with _reporting(path):
        if target.exists() and not target.is_file():
            raise UsageError(f"output {path} is not a regular file; name a file to write")
    if not target.parent.is_dir():
        raise UsageError(f"output directory {target.parent} does not exist; create it, or name a file in another")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise UsageError(f"output directory {target.parent} is not writable; name a file in another")
    return target


def _open_locked(journal: Path) -> int:
    with _reporting(journal):
        descriptor = os.open(journal, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UsageError(
                f"{journal} is being written by another run; wait for it, or name another output"
            ) from None
        except OSError:
            os.close(descriptor)
            raise
    return descriptor


@contextmanager
def _reporting(path: Path) -> Iterator[None]:
    """Turns an error of the file system (a full disk, a lost mount) into one line that names the file."""
    try:
        yield
    except OSError as error:
        raise PoiseError(f"{path} cannot be read or written: {error.strerror or error}") from error
