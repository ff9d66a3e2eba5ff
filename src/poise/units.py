"""Bytes and seconds: parsing what people write, printing what people read."""

from __future__ import annotations

import re

from poise.errors import UsageError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_FACTORS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _FACTORS[f"{_letter}B"] = 1000**_power
    _FACTORS[f"{_letter}IB"] = _FACTORS[_letter] = 1024**_power


def parse_bytes(text: str | int) -> int:
    """``"8GiB"``, ``"512MB"``, ``"2G"`` (binary, as most tools take it) or a plain number of bytes.

    Raises UsageError for anything else, or for a size that is not positive.
    """
    if isinstance(text, int):
        size = text
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
        factor = _FACTORS.get(match.group(2).upper()) if match else None
        if match is None or factor is None:
            raise UsageError(
                f"memory size {text!r} is not understood; write a number with a unit, such as 8GiB or 900MB"
            )
        size = int(float(match.group(1)) * factor)
    if size <= 0:
        raise UsageError(f"memory size {text!r} must be positive; write, for example, 8GiB")
    return size


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
