"""Text that any machine has, in two domains: Python code and English prose.

Code is the standard library of the running interpreter. Prose is manual pages, licences, the documentation under
``/usr/share/doc``, Perl's pods and Python's own topics. Files are deduplicated by content and
split into train and held-out by a hash of the content, so that a split never depends on the order of files. Nothing is
downloaded.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MIN_FILE_CHARS = 400
MAX_FILE_CHARS = 120_000
MAX_PAGES_PER_PREFIX = 24
"""Some tools ship thousands of near-identical manual pages; this many of one prefix are taken."""
HELD_OUT_FRAC = 0.04

_SKIPPED_CODE = (
    "site-packages",
    "encodings/",
    "lib2to3/tests/data",
    "idlelib/Icons",
    "pydoc_data",
    "test/encoded_modules",
)
_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".html", ".pod", ".gz")


@dataclass(frozen=True, kw_only=True, slots=True)
class Domain:
    """The documents of one domain, split by content."""

    name: str
    train: list[str]
    held_out: list[str]


def load_corpus() -> list[Domain]:
    """Reads both domains of this machine."""
    return [_split("code", _code_files()), _split("prose", _prose_files())]


def _split(name: str, documents: Iterator[str]) -> Domain:
    seen: set[bytes] = set()
    train: list[str] = []
    held_out: list[str] = []
    for text in documents:
        if len(text) < MIN_FILE_CHARS or _mostly_symbols(text):
            continue
        digest = hashlib.blake2b(text[:20_000].encode(), digest_size=8).digest()
        if digest in seen:
            continue
        seen.add(digest)
        is_held_out = int.from_bytes(digest, "big") / 2**64 < HELD_OUT_FRAC
        (held_out if is_held_out else train).append(text[:MAX_FILE_CHARS])
    return Domain(name=name, train=train, held_out=held_out)


def _mostly_symbols(text: str) -> bool:
    sample = text[:8000]
    letters = sum(character.isascii() and (character.isalpha() or character.isspace()) for character in sample)
    return letters < 0.65 * len(sample)


def _code_files() -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root).as_posix()
        if not any(part in relative for part in _SKIPPED_CODE):
            yield path.read_text(errors="ignore")


def _prose_files() -> Iterator[str]:
    yield from _manual_pages(Path("/usr/share/man"))
    for root in [Path("/usr/share/common-licenses"), Path("/usr/share/doc"), Path("/usr/share/perl")]:
        for path in sorted(root.rglob("*")) if root.is_dir() else []:
            if not path.is_file() or "changelog" in path.name.lower() or "examples" in path.parts:
                continue
            known = (
                path.suffix in _TEXT_SUFFIXES or path.name in ("copyright", "README") or root.name == "common-licenses"
            )
            if known and path.stat().st_size < 2_000_000:
                yield _plain(path)
    from pydoc_data.topics import topics

    yield from (text for _, text in sorted(topics.items()))


def _manual_pages(root: Path) -> Iterator[str]:
    taken: dict[str, int] = {}
    for path in sorted(root.glob("man[1-8]/*")):
        prefix = re.split(r"[-_.:]", path.name)[0]
        taken[prefix] = taken.get(prefix, 0) + 1
        if taken[prefix] <= MAX_PAGES_PER_PREFIX and path.is_file():
            yield _without_roff(_read(path))


def _plain(path: Path) -> str:
    text = _read(path)
    if path.suffix == ".html" or path.name.endswith(".html.gz"):
        text = re.sub(r"(?is)<(script|style)\b.*?</\1>", "", text)
        text = html.unescape(re.sub(r"<[^>]+>", "", text))
    return re.sub(r"\n{3,}", "\n\n", text)


def _read(path: Path) -> str:
    if path.suffix != ".gz":
        return path.read_text(errors="ignore")
    try:
        return gzip.decompress(path.read_bytes()).decode(errors="ignore")
    except (OSError, EOFError):
        return ""


def _without_roff(source: str) -> str:
    """Drops roff requests and escapes; fills paragraphs as roff would; keeps headings."""
    paragraphs: list[str] = [""]
    literal = False
    for line in source.splitlines():
        if line.startswith((".nf", ".EX", ".fi", ".EE")):
            literal = line.startswith((".nf", ".EX"))
            paragraphs.append("")
        elif line.startswith((".SH", ".SS", ".Sh", ".Ss")):
            paragraphs += [line[3:].strip().strip('"') + "\n", ""]
        elif line.startswith((".B ", ".I ", ".BR ", ".IR ", ".RB ", ".RI ", ".BI ", ".IB ")):
            request, text = line.split(" ", 1)
            parts = [quoted or bare for quoted, bare in re.findall(r'"([^"]*)"|(\S+)', text)]
            paragraphs[-1] += (" " if request in (".B", ".I") else "").join(parts) + " "
        elif line.startswith((".PP", ".P", ".TP", ".IP", ".LP", ".sp", ".Pp")) or not line.strip():
            paragraphs.append("")
        elif not line.startswith((".", "'", "\\")):
            paragraphs[-1] += line + ("\n" if literal else " ")
    text = "\n\n".join(paragraph.strip(" ") for paragraph in paragraphs if paragraph.strip())
    text = re.sub(r"\\f(\[\w*\]|\(\w\w|\w)|\\[&|^/,%:]|\\s[-+]?\d", "", text)
    text = text.replace("\\-", "-").replace("\\(aq", "'").replace("\\(bu", "*").replace("\\e", "\\")
    text = re.sub(r"\\\((lq|rq|dq)|\\\*\(..|\\\[.*?\]|\\\(..", "", text)
    return re.sub(r"\n{3,}", "\n\n", text)
