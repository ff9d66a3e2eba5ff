"""How sequences are grouped: the batch group of Klotski (section 4.1), bs rows in each of n batches, and what a pass takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupShape:
    """``chunk_tokens``: of each prompt per pass; ``pass_tokens``: prompt tokens of all batches in a pass, but that one
    batch's chunk always goes. Prompts come in over several passes where they are more, beside rows that already decode.
    """

    batch_size: int
    num_batches: int
    chunk_tokens: int
    pass_tokens: int

    @property
    def max_rows(self) -> int:
        """Sequences that run at once."""
        return self.batch_size * self.num_batches
