"""How good guesses of experts were, in the Klotski paper's terms (``predict.guesses``): used at all, truly the hottest."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Hits:
    """Of ``named`` experts, summed over layers and passes: ``used`` by some token, among the ``hottest`` (a sum of chances)."""

    named: int = 0
    used: int = 0
    hottest: float = 0.0

    def __add__(self, other: Hits) -> Hits:
        return Hits(named=self.named + other.named, used=self.used + other.used, hottest=self.hottest + other.hottest)

    def __sub__(self, other: Hits) -> Hits:
        return Hits(named=self.named - other.named, used=self.used - other.used, hottest=self.hottest - other.hottest)

    def as_json(self) -> dict[str, float | None]:
        """The counts and both shares."""
        return {**asdict(self), "used_frac": self.used_frac, "hottest_frac": self.hottest_frac}

    @property
    def used_frac(self) -> float | None:
        """Share (0-1) that some token used; None where none was named."""
        return self.used / self.named if self.named else None

    @property
    def hottest_frac(self) -> float | None:
        """Share (0-1) that was among the hottest; None where none was named."""
        return self.hottest / self.named if self.named else None
