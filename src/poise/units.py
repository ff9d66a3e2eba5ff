"""Bytes and seconds: parsing what people write, printing what people read."""

from __future__ import annotations

import re

from poise.errors import UsageError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
MAX_BYTES = 1 << 60
"""More than any memory holds; figures beyond it would not fit into what computes with them."""

_FACTORS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _FACTORS[f"{_letter}B"] = 1000**_power
    _FACTORS[f"{_letter}IB"] = _FACTORS[_letter] = 1024**_power


def parse_bytes(text: str | int) -> int:
    """``"8GiB"``, ``"512MB"``, ``"2G"`` (binary, as most tools take it) or a plain number of bytes.

    Raises UsageError for anything else, or for a size that is not positive or more than 1 EiB.
    """
    if isinstance(text, bool) or not isinstance(text, (int, str)):
        raise UsageError(
            f"memory size {_shown(text)} is neither a text nor a whole number of bytes; write 8GiB, or 1 << 33"
        )
    size = text if isinstance(text, int) else _size(text)
    if size < 1:
        raise UsageError(f"memory size {_shown(text)} must be positive; write, for example, 8GiB")
    if size > MAX_BYTES:
        raise UsageError(f"memory size {_shown(text)} is more than 1 EiB; write, for example, 8GiB")
    return int(size)


def _size(text: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    factor = _FACTORS.get(match.group(2).upper()) if match else None
    if match is None or factor is None:
        raise UsageError(
            f"memory size {_shown(text)} is not understood; write a number with a unit, such as 8GiB or 900MB"
        )
    return float(match.group(1)) * factor


def _shown(value: object) -> str:
    """``value`` in at most 60 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def format_bytes(size: float) -> str:
    """``1536`` as ``"1.5 KiB"``: three significant digits, binary units."""
    for unit, factor in (("TiB", 1 << 40), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(size) >= factor:
            return f"{size / factor:.3g} {unit}" if abs(size) < 999.5 * factor else f"{size / factor:.0f} {unit}"
    return f"{size:.0f} B"


def format_s(seconds: float) -> str:
    """``0.0123`` as ``"12.3 ms"``, ``75`` as ``"1m15s"``."""
    for unit, factor in (("us", 1e-6), ("ms", 1e-3)):
        if seconds < 999.5 * factor:
            return f"{seconds / factor:.3g} {unit}"
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"
