"""Who takes part in the probe suite, besides those of every contest."""

from __future__ import annotations

from poise.bench.parallel.contest import EVEN_LATELY, MOVERS, ORACLE, PROBE, STATIC, Contenders

UNPREDICTED: Contenders = {
    "after the gate": {"balance": "probe", "steps": {"predictor": "none"}},
    "last pass": {"balance": "probe", "steps": {"predictor": "last"}},
}
"""Counts after the gate and copies that all wait for (UltraEP's way), and the counts of the pass before."""
WAYS: Contenders = {
    **UNPREDICTED,
    "frozen gate": {"balance": "probe"},
    "not suspended": {"balance": "probe", "steps": {"suspends": False}},
    **ORACLE,
}
SLOTS: Contenders = {
    f"{slots} replica slots": {"balance": "probe", "steps": {"replica_slots": slots}} for slots in range(5)
}
ALL: Contenders = STATIC | MOVERS | PROBE | {"last pass": UNPREDICTED["last pass"]} | ORACLE
"""Of a model that nothing was distilled for."""
VOLATILE: Contenders = {
    **STATIC,
    "eplb": MOVERS["eplb"],
    "eplb, last burst": {"balance": "eplb", "placement": EVEN_LATELY},
    **PROBE,
    **ORACLE,
}
"""EPLB with a long window, and with one of a burst."""
