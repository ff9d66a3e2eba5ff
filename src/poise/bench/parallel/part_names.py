"""Parts of `poise bench parallel` and of its suite, in their order: all that the command line needs to know of them."""

from __future__ import annotations

PARALLEL = ("exact", "unequal", "unequal-random", "cut", "switch", "watching", "scaling", "halves")
PROBE = (
    "code",
    "mixed",
    "switch",
    "decode",
    "decode-mixed",
    "decode-switch",
    "decode-switch-256",
    "decode-switch-512",
    "decode-volatile",
    "unequal",
    "unequal-decode",
    "unequal-switch",
    "ways",
    "online",
    "ahead",
    "slots",
    "no-engines",
    "random",
    "random-decode",
    "overhead",
    "break-even-tokens",
    "break-even-imbalance",
    "break-even-imbalance-1Gbits",
)
