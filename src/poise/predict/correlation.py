"""Klotski's correlation table (section 5): which experts a layer will need, told by those that the layer before chose.

``pairs[l][p][e]`` counts the tokens that chose expert p at MoE layer l - 1 and e at layer l; layer 0 has marginals only. From
it each token votes: its chance of choosing e is that of the layer as a whole, times the lift of e by each expert that the
token chose before, to the power 1 / sqrt(top_k), since experts of one token are no independent evidence. The chances are
scaled to the layer's choices per token; summed over all tokens they are the expected load.
Letters: T tokens, K choices, E experts, L MoE layers (by position). A choice of E or more is masked, and counts for nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from poise.spec.tensor_file import TensorFormat

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

HALF_LIFE_TOKENS_PER_EXPERT = 64
"""After so many tokens an observation counts half: routing follows the text at hand."""
START_TOKENS_PER_EXPERT = 8
"""What a table recorded elsewhere counts for when it is the beginning of one that learns: more makes it slow to learn."""
PRIOR_TOKENS = 4.0
"""Every row of the table begins as if so many tokens had chosen as the layer does on average."""
MAX_VOTERS = 128
"""With more tokens an even sample votes for all: nearly every expert is used then, and a prediction must stay cheap."""
MAX_CHANCE = 0.98
REFRESH_FRAC = 0.125
"""A layer's lifts are worked out anew when its table has grown by this share."""

TABLE_FORMAT = TensorFormat(
    kind="correlation table",
    version=1,
    required={"pairs": ("F32", 3), "rows": ("F32", 2), "chosen": ("F32", 2), "tokens": ("F32", 1)},
    fields={"model": str, "top_k": int},
    remedy="record it for this model with `poise record MODEL --table`",
)


class CorrelationTable:
    """Learns from the routing of real tokens and predicts a layer's from the one before.

    ``forgets``: old tokens count less and less; False: all count alike, as in a recording.

    Pure: no clock and no random state; the same observations give the same table.
    """

    def __init__(self, *, num_layers: int, num_experts: int, top_k: int, forgets: bool = True) -> None:
        assert num_layers >= 1, "a table needs a layer"
        assert 1 <= top_k <= num_experts, f"top_k {top_k} of {num_experts} experts"
        self.num_layers, self.num_experts, self.top_k = num_layers, num_experts, top_k
        self.half_life_tokens: int | None = HALF_LIFE_TOKENS_PER_EXPERT * num_experts if forgets else None
        self._pairs_LEE = np.zeros((num_layers, num_experts, num_experts), dtype=np.float32)
        self._rows_LE = np.zeros((num_layers, num_experts), dtype=np.float32)
        self._chosen_LE = np.zeros((num_layers, num_experts), dtype=np.float32)
        self._tokens_L = np.zeros(num_layers, dtype=np.float32)
        self._forget_lifts()

    @staticmethod
    def nbytes_for(*, num_layers: int, num_experts: int) -> int:
        """What a table takes in memory."""
        return 4 * num_layers * num_experts * (2 * num_experts + 3)

    def observe(self, layer: int, chosen_TK: Ints, previous_TK: Ints | None = None) -> None:
        """Learns what tokens chose at ``layer``, and, row by row the same tokens, at the layer before it."""
        assert (layer == 0) == (previous_TK is None), "every layer but the first needs what the one before chose"
        tokens, experts = len(chosen_TK), self.num_experts
        keep = 1.0 if self.half_life_tokens is None else 0.5 ** (tokens / self.half_life_tokens)
        self._tokens_L[layer] = self._tokens_L[layer] * keep + tokens
        self._chosen_LE[layer] = self._chosen_LE[layer] * keep + self._counts_E(chosen_TK)
        self._since_L[layer] += tokens
        if previous_TK is None:
            return
        assert len(previous_TK) == tokens, f"{len(previous_TK)} tokens at the layer before, {tokens} at layer {layer}"
        wide = experts + 1
        flat = np.minimum(previous_TK, experts)[:, :, None] * wide + np.minimum(chosen_TK, experts)[:, None, :]
        pairs_EE = np.bincount(flat.ravel(), minlength=wide * wide).reshape(wide, wide)[:experts, :experts]
        if keep != 1.0:
            self._pairs_LEE[layer] *= keep
        self._pairs_LEE[layer] += pairs_EE
        self._rows_LE[layer] = self._rows_LE[layer] * keep + self._counts_E(previous_TK)

    def marginal_E(self, layer: int) -> Floats:
        """A token's chance of choosing each expert, whatever it chose before."""
        prior = PRIOR_TOKENS * self.top_k / self.num_experts
        chance_E = (self._chosen_LE[layer] + prior) / (self._tokens_L[layer] + PRIOR_TOKENS)
        return np.asarray(np.minimum(chance_E, MAX_CHANCE), dtype=np.float32)

    @property
    def num_tokens(self) -> float:
        """Tokens that it has learnt from, old ones counting less: of the layer that has seen fewest."""
        return float(self._tokens_L.min())

    @property
    def chances_LE(self) -> Floats:
        """``marginal_E`` of every layer."""
        return np.stack([self.marginal_E(layer) for layer in range(self.num_layers)])

    def chances_TE(self, layer: int, previous_TK: Ints) -> Floats:
        """Chance of each token to choose each expert of ``layer``. For layer 0 only the number of rows counts."""
        marginal_E = self.marginal_E(layer)
        if layer == 0:
            return np.asarray(np.broadcast_to(marginal_E, (len(previous_TK), self.num_experts)))
        lift_EE = self._lift_EE(layer)
        tokens, top_k = previous_TK.shape
        rows_TKE = lift_EE.take(np.minimum(previous_TK, self.num_experts).ravel(), axis=0).reshape(tokens, top_k, -1)
        odds_TE = np.add.reduce(rows_TKE, axis=1)
        np.exp(odds_TE, out=odds_TE)
        odds_TE *= marginal_E
        odds_TE *= (marginal_E.sum() / odds_TE.sum(axis=1))[:, None]
        return np.asarray(np.minimum(odds_TE, np.float32(MAX_CHANCE), out=odds_TE))

    def predict(self, layer: int, previous_TK: Ints) -> Floats:
        """Votes: the expected number of these tokens that choose each expert of ``layer``. Shape (E,)."""
        return self.foresee(layer, previous_TK)[1]

    def foresee(self, layer: int, previous_TK: Ints) -> tuple[Floats, Floats]:
        """(chance that at least one of these tokens chooses each expert of ``layer``, votes as of ``predict``)."""
        voters_TK = sampled(previous_TK, MAX_VOTERS)
        scale = np.float32(len(previous_TK) / max(1, len(voters_TK)))
        chances_TE = self.chances_TE(layer, voters_TK)
        votes_E = chances_TE.sum(axis=0) * scale
        used_E = -np.expm1(np.log1p(-chances_TE).sum(axis=0) * scale)
        return np.asarray(used_E, dtype=np.float32), np.asarray(votes_E, dtype=np.float32)

    def top(self, layer: int, previous_TK: Ints, count: int) -> Ints:
        """The ``count`` experts of ``layer`` with the most votes, most first; equal votes in order of expert."""
        return np.argsort(-self.predict(layer, previous_TK), kind="stable")[:count]

    def lighten(self) -> None:
        """Makes what the table knows count for a few tokens only, and forget from now on: it follows the text at hand."""
        self.half_life_tokens = HALF_LIFE_TOKENS_PER_EXPERT * self.num_experts
        most_L = np.float32(START_TOKENS_PER_EXPERT * self.num_experts)
        scale_L = np.minimum(1.0, most_L / np.maximum(self._tokens_L, 1.0)).astype(np.float32)
        self._pairs_LEE *= scale_L[:, None, None]
        self._rows_LE *= scale_L[:, None]
        self._chosen_LE *= scale_L[:, None]
        self._tokens_L *= scale_L
        self._forget_lifts()

    def save(self, path: Path, *, model: str) -> None:
        """Writes the table whole or not at all. ``model``: its fingerprint. Raises TraceError if it cannot be written."""
        tensors = {
            "pairs": self._pairs_LEE,
            "rows": self._rows_LE,
            "chosen": self._chosen_LE,
            "tokens": self._tokens_L,
        }
        TABLE_FORMAT.save(path, tensors, {"model": model, "top_k": self.top_k})

    @classmethod
    def load(cls, path: Path, *, model: str) -> CorrelationTable:
        """Raises TraceError for a table that is damaged, of another version, or of a model with another fingerprint."""
        tensors, fields = TABLE_FORMAT.load(path)
        if fields["model"] != model:
            raise TABLE_FORMAT.refusal(path, f"is of model {fields['model'][:60]}, and this one is {model}")
        num_layers, num_experts = tensors["chosen"].shape
        shapes = {"pairs": (num_layers, num_experts, num_experts), "rows": (num_layers, num_experts)}
        if any(tensors[name].shape != shape for name, shape in shapes.items()) or len(tensors["tokens"]) != num_layers:
            raise TABLE_FORMAT.refusal(path, "is damaged: its tensors are of different numbers of layers or experts")
        if not 1 <= fields["top_k"] <= num_experts or not num_layers:
            raise TABLE_FORMAT.refusal(path, f"is damaged: top_k {fields['top_k']} of {num_experts} experts")
        if not all(np.isfinite(tensor).all() and (tensor >= 0).all() for tensor in tensors.values()):
            raise TABLE_FORMAT.refusal(path, "is damaged: it has counts that are negative or not finite")
        table = cls(num_layers=num_layers, num_experts=num_experts, top_k=fields["top_k"])
        table._pairs_LEE, table._rows_LE = tensors["pairs"], tensors["rows"]
        table._chosen_LE, table._tokens_L = tensors["chosen"], tensors["tokens"]
        table._forget_lifts()
        return table

    def _counts_E(self, chosen_TK: Ints) -> Ints:
        return np.bincount(np.minimum(chosen_TK, self.num_experts).ravel(), minlength=self.num_experts + 1)[:-1]

    def _lift_EE(self, layer: int) -> Floats:
        """Logarithm of each expert's lift by each expert before it, damped; a last row of zeros for masked choices."""
        if self._since_L[layer] > REFRESH_FRAC * self._tokens_L[layer]:
            self._since_L[layer] = 0
            expected_EE = np.asarray(PRIOR_TOKENS + self._pairs_LEE[layer] / self.marginal_E(layer), dtype=np.float32)
            log_rows_E1 = np.log(self._rows_LE[layer] + np.float32(PRIOR_TOKENS))[:, None]
            self._lift_LEE[layer, :-1] = (np.log(expected_EE) - log_rows_E1) / np.float32(np.sqrt(self.top_k))
        return np.asarray(self._lift_LEE[layer])

    def _forget_lifts(self) -> None:
        self._lift_LEE = np.zeros((self.num_layers, self.num_experts + 1, self.num_experts), dtype=np.float32)
        self._since_L = self._tokens_L.copy()


def sampled(choices_TK: Ints, count: int) -> Ints:
    """At most ``count`` of the rows, evenly spaced."""
    return choices_TK[:: -(-len(choices_TK) // count)] if len(choices_TK) > count else choices_TK
