"""PROBE's lookahead predictor: what a MoE layer's router will choose, told one MoE layer earlier.

``logits_hat = W_l h + b_l + W2 silu(W1 h)``, h being the hidden states at the seam of layer l - 1 (its router's input): the
layer's own router, weights and selection code, asked a layer early, plus a residual that starts at zero and can be trained.
Source: PROBE (arXiv 2602.00509), gate-initialised lookahead predictor. A prediction never changes an output: tokens follow
the true router. Layer 0, and routers that cannot be asked early (``model.lookahead_sites``), are not predicted.
Letters: T tokens, H hidden size, E experts, K choices, W width. Layers are counted by position among the MoE layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from poise.model.inspect import ExpertsModule
from poise.model.lookahead_router import FrozenRouter
from poise.model.lookahead_sites import RouterSite, find_sites
from poise.spec.tensor_file import TensorFormat

Ints = npt.NDArray[np.int64]

LOOKAHEAD_FORMAT = TensorFormat(
    kind="lookahead predictor",
    version=1,
    required={"inner": ("F32", 3), "outer": ("F32", 3)},
    fields={"model": str, "layers": list},
    remedy="train it for this model with `poise distill MODEL`",
)
"""``inner`` (P, W, H) and ``outer`` (P, E, W) of the P predicted layers, whose positions are ``layers``."""


class Residual(nn.Module):
    """``W2 silu(W1 h)`` in fp32. W2 begins at zero, so that nothing is added before it is trained."""

    def __init__(self, hidden: int, width: int, outputs: int, *, device: torch.device, random: torch.Generator) -> None:
        super().__init__()
        start_WH = torch.randn(width, hidden, generator=random) / hidden**0.5
        self.inner_WH = nn.Parameter(start_WH.to(device))
        self.outer_EW = nn.Parameter(torch.zeros(outputs, width, device=device))

    def forward(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """What is added to the logits, (T, E), fp32."""
        inner_TW = nn.functional.silu(nn.functional.linear(hidden_TH.float(), self.inner_WH))
        return nn.functional.linear(inner_TW, self.outer_EW)


class Lookahead(nn.Module):
    """The predictors of a whole model. They share the memory of its routers' weights; only residuals are their own.

    Made by ``of_model`` or ``load``.
    """

    def __init__(self, routers: Sequence[FrozenRouter | None], experts_L: Sequence[int], width: int | None) -> None:
        super().__init__()
        self.width = width
        self.is_distilled = False
        """Whether its residuals come from a file."""
        self.experts_L = tuple(experts_L)
        self._predicted = tuple(layer for layer, router in enumerate(routers) if layer and router is not None)
        self.routers = nn.ModuleDict({str(at): router for at, router in enumerate(routers) if router is not None})
        self.residuals = nn.ModuleDict()

    @classmethod
    def of_model(
        cls,
        model: Any,
        modules: Sequence[ExpertsModule],
        *,
        width: int | None = None,
        seed: int = 0,
        sites: Sequence[RouterSite | None] | None = None,
    ) -> Self:
        """``model``: loaded; ``modules``: its experts modules in order of layer. ``width``: of the residuals; None: none.

        ``seed``: of the residuals' inner weights. The outer ones are zero, so at first a width changes nothing. ``sites``: its
        routers, if they were found before.
        """
        idle_L = [module.num_experts + module.num_idle for module in modules]
        routers = [
            None if site is None else FrozenRouter(model, site, outputs)
            for site, outputs in zip(sites or find_sites(model, modules), idle_L, strict=True)
        ]
        usable = [router if router is not None and router.is_loaded else None for router in routers]
        lookahead = cls(usable, [module.num_experts for module in modules], width)
        if width is not None:
            assert width >= 1, f"a residual of width {width}"
            random = torch.Generator().manual_seed(seed)
            for layer in lookahead.learning_layers:
                router = lookahead.router(layer)
                lookahead.residuals[str(layer)] = Residual(
                    router.hidden_size, width, router.num_outputs, device=router.device, random=random
                )
        return lookahead

    @property
    def name(self) -> str:
        """For people."""
        if self.width is None:
            return "frozen routers, asked a layer early"
        return f"{'distilled routers' if self.is_distilled else 'routers and residuals'}, asked a layer early"

    @property
    def predicted_layers(self) -> tuple[int, ...]:
        """The layers that ``predicts``, ascending."""
        return self._predicted

    @property
    def learning_layers(self) -> tuple[int, ...]:
        """Those among them to whose logits a residual can be added."""
        return tuple(layer for layer in self._predicted if self.router(layer).has_logits)

    def predicts(self, layer: int) -> bool:
        """Whether ``choices_TK`` can be asked about the layer."""
        return layer in self._predicted

    def choices_TK(self, layer: int, hidden_TH: torch.Tensor) -> torch.Tensor:
        """The experts that ``layer`` will choose, int64, from the hidden states at the seam of MoE layer ``layer - 1``.

        An index of ``experts_L[layer]`` or more is an expert without weights.
        """
        assert self.predicts(layer), f"MoE layer {layer} cannot be predicted"
        with torch.inference_mode():
            return self.router(layer).choices_TK(hidden_TH, self._added_TE(layer, hidden_TH))

    def counts_E(self, layer: int, hidden_TH: torch.Tensor, real_T: torch.Tensor | None = None) -> Ints:
        """How many of the tokens will choose each expert of ``layer``. ``real_T``: bool, False for padding; None: all real."""
        chosen_TK = self.choices_TK(layer, hidden_TH if real_T is None or bool(real_T.all()) else hidden_TH[real_T])
        return counted_E(chosen_TK, self.experts_L[layer])

    def own_choices_TK(self, layer: int, hidden_TH: torch.Tensor) -> torch.Tensor:
        """What the frozen router of ``layer`` chooses for these hidden states as they are: at its own seam, the truth."""
        return self.router(layer).choices_TK(hidden_TH)

    def own_logits_TE(self, layer: int, hidden_TH: torch.Tensor) -> torch.Tensor:
        """The frozen router's logits for these hidden states, fp32, outside any graph."""
        return self.router(layer).logits_TE(hidden_TH)

    def scores(self, layer: int) -> str:
        """What the router of ``layer`` makes of its logits: ``softmax``, ``sigmoid``, or ``other``."""
        return self.router(layer).scores

    def save(self, path: Path, *, model: str) -> None:
        """Writes the residuals whole or not at all. ``model``: its fingerprint. Raises TraceError if it cannot be written."""
        assert self.width is not None, "a lookahead without residuals has nothing to save"
        layers = self.learning_layers
        residuals = [self.residual(layer) for layer in layers]
        tensors = {
            "inner": _stacked([one.inner_WH for one in residuals]),
            "outer": _stacked([one.outer_EW for one in residuals]),
        }
        LOOKAHEAD_FORMAT.save(path, tensors, {"model": model, "layers": list(layers)})

    @classmethod
    def load(
        cls,
        path: Path,
        model: Any,
        modules: Sequence[ExpertsModule],
        *,
        fingerprint: str,
        sites: Sequence[RouterSite | None] | None = None,
    ) -> Self:
        """``fingerprint``: of the loaded ``model``. Raises TraceError for a file that is damaged or of another model."""
        tensors, fields = _read(path, fingerprint)
        inner_PWH, outer_PEW = tensors["inner"], tensors["outer"]
        width = inner_PWH.shape[1]
        if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
            raise LOOKAHEAD_FORMAT.refusal(path, "is damaged: it has weights that are not finite")
        if width < 1 or outer_PEW.shape[2] != width:
            raise LOOKAHEAD_FORMAT.refusal(path, "is damaged: its tensors are of different widths")
        lookahead = cls.of_model(model, modules, width=width, sites=sites)
        if fields["layers"] != list(lookahead.learning_layers):
            raise LOOKAHEAD_FORMAT.refusal(path, "is damaged: it is of other layers than the model's")
        shapes = [_stacked([getattr(r, n) for r in lookahead._residuals()]).shape for n in ("inner_WH", "outer_EW")]
        if [inner_PWH.shape, outer_PEW.shape] != shapes:
            raise LOOKAHEAD_FORMAT.refusal(path, f"is damaged: its tensors are not of shapes {shapes[0]}, {shapes[1]}")
        with torch.no_grad():
            for residual, inner_WH, outer_EW in zip(lookahead._residuals(), inner_PWH, outer_PEW, strict=True):
                for parameter, values in ((residual.inner_WH, inner_WH), (residual.outer_EW, outer_EW)):
                    parameter.copy_(torch.from_numpy(values)[: len(parameter), : parameter.shape[1]])
        lookahead.is_distilled = True
        return lookahead

    def _residuals(self) -> list[Residual]:
        return [self.residual(layer) for layer in self.learning_layers]

    def residual(self, layer: int) -> Residual:
        """What a learning layer adds to its router's logits."""
        residual = self.residuals[str(layer)]
        assert isinstance(residual, Residual)
        return residual

    def router(self, layer: int) -> FrozenRouter:
        """The frozen router of a layer that has one."""
        router = self.routers[str(layer)]
        assert isinstance(router, FrozenRouter)
        return router

    def _added_TE(self, layer: int, hidden_TH: torch.Tensor) -> torch.Tensor | None:
        if str(layer) not in self.residuals:
            return None
        added_TE: torch.Tensor = self.residual(layer)(hidden_TH)
        return added_TE


def counted_E(chosen_TK: torch.Tensor, num_experts: int) -> Ints:
    """How often each expert was chosen. ``num_experts`` or more: none, or one without weights."""
    if chosen_TK.device.type == "cpu":
        return np.bincount(chosen_TK.numpy().ravel(), minlength=num_experts)[:num_experts]
    counts_E = torch.bincount(chosen_TK.flatten().clamp(max=num_experts), minlength=num_experts + 1)[:num_experts]
    return np.asarray(counts_E.numpy(force=True))


def saved_width(path: Path, *, fingerprint: str) -> int:
    """The width of a saved predictor. Raises TraceError for a file that is none, or not of the model of ``fingerprint``."""
    tensors, _ = _read(path, fingerprint)
    return int(tensors["inner"].shape[1])


def _read(path: Path, fingerprint: str) -> tuple[Mapping[str, npt.NDArray[Any]], Mapping[str, Any]]:
    tensors, fields = LOOKAHEAD_FORMAT.load(path)
    if fields["model"] != fingerprint:
        raise LOOKAHEAD_FORMAT.refusal(path, f"is of model {fields['model'][:60]}, and this one is {fingerprint}")
    return tensors, fields


def _stacked(weights: Sequence[torch.Tensor]) -> npt.NDArray[Any]:
    """One array of them all; smaller ones are filled up with zeros."""
    rows, columns = (max((each.shape[dim] for each in weights), default=0) for dim in (0, 1))
    stacked = np.zeros((len(weights), rows, columns), dtype=np.float32)
    for place, each in enumerate(weights):
        stacked[place, : each.shape[0], : each.shape[1]] = each.detach().numpy(force=True)
    return stacked
