"""Time of moving bytes, and the roofline: what no schedule can beat."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from poise.cost.curves import Floats
from poise.spec.machine import Link, Tier


def transfer_s(nbytes: ArrayLike, over: Link | Tier) -> Floats:
    """Seconds for each transfer of ``nbytes`` by itself: latency (0 for a tier) and bytes over the rate. No bytes: no time."""
    size = np.asarray(nbytes, dtype=float)
    latency_s = over.latency_s if isinstance(over, Link) else 0.0
    return np.where(size > 0, latency_s + size / over.bytes_per_s, 0.0)


def roofline_s(nbytes: ArrayLike, flops: ArrayLike, *, bytes_per_s: float, flops_per_s: float) -> Floats:
    """The larger of the time to move ``nbytes`` and the time to compute ``flops``, both at full rate."""
    assert min(bytes_per_s, flops_per_s) > 0, "rates are positive"
    return np.maximum(np.asarray(nbytes, dtype=float) / bytes_per_s, np.asarray(flops, dtype=float) / flops_per_s)
