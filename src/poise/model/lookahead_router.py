"""One layer's router, taken out of its model: it asks the model's own selection code, and shares the weights' memory.

Softmax, sigmoid, biases, group limits, sparse mixers: whatever the class does is run as it is. What a predictor adds to the
logits is put in where the class computes them, by its one linear map onto the experts. On a processor a router that turns out
to choose the experts with the greatest logits is asked for just that, which takes a third of the time (decision 063).
Letters: T tokens, H hidden size, E experts (idle ones included), K choices.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from poise.model.greatest import greatest_TK
from poise.model.lookahead_sites import FromModel, RouterSite
from poise.model.seam import Forward
from poise.model.wide import WideLinear

TRIED_TOKENS = 256
"""Of a router, to see whether it goes by its logits alone."""


class FrozenRouter(nn.Module):
    """A router that can be asked outside its model, about any hidden states. Not trained.

    ``num_experts``: idle ones included; ``num_outputs``: the logits it computes, which may be more (shared experts').
    Its weights must be in memory, not streamed.
    """

    def __init__(self, model: nn.Module, site: RouterSite, num_experts: int) -> None:
        super().__init__()
        self._site = site
        self.hidden_size = site.hidden_size
        self.router = frozen_copy(model.get_submodule(site.module))
        self._own = {
            value.name: _of_model(model, value.name)
            for value in [*site.arguments, *site.keywords.values()]
            if isinstance(value, FromModel)
        }
        weights = [*self.router.parameters(), *self._own.values()]
        self.device = weights[0].device
        self.is_loaded = not any(tensor.is_meta for tensor in weights)
        """Whether its weights are in memory: those of a layer that streams are not."""
        self.num_outputs = num_experts
        trial = self._trial(num_experts) if self.is_loaded else None
        self.has_logits = trial is not None and len(trial.seen) == 1
        """Whether something can be added to the logits: the class must compute them in one linear map."""
        if trial is not None and self.has_logits:
            self.num_outputs = trial.num_outputs
        self.scores = "other" if trial is None else trial.scores
        """What it makes of its logits: ``softmax``, ``sigmoid`` (one expert does not lower another), or ``other``."""
        self._top_k = 0
        """How many of the greatest logits are its choice; 0: it is run as it is."""
        self._map = trial.maps[0] if trial is not None and self.has_logits else None
        """Weight and bias of its linear map."""
        if self._map is not None and self.device.type == "cpu":
            self._top_k = self._greatest(*self._map, random=torch.Generator().manual_seed(0))

    @property
    def goes_by_logits(self) -> bool:
        """Whether it is asked for the experts with the greatest logits, and for nothing else."""
        return self._top_k > 0

    def choices_TK(self, hidden_TH: torch.Tensor, added_TE: torch.Tensor | None = None) -> torch.Tensor:
        """What the router chooses for these hidden states, int64; ``added_TE`` is added to its logits."""
        with torch.inference_mode():
            if self._top_k and self._map is not None:
                return self._greatest_TK(*self._map, hidden_TH, added_TE)
            changed = nullcontext() if added_TE is None else _Logits(self.num_outputs, added_TE)
            return self._run(hidden_TH, changed).to(torch.int64)

    def logits_TE(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """Its logits as fp32, outside any graph."""
        assert self.has_logits, "this router has no logits"
        logits = _Logits(self.num_outputs, None)
        with torch.no_grad():
            self._run(hidden_TH, logits)
        return logits.seen[0].reshape(-1, self.num_outputs).float()

    def _greatest_TK(
        self,
        weight_EH: torch.Tensor,
        bias_E: torch.Tensor | None,
        hidden_TH: torch.Tensor,
        added_TE: torch.Tensor | None,
    ) -> torch.Tensor:
        logits_TE = nn.functional.linear(hidden_TH.to(weight_EH.dtype), weight_EH, bias_E)
        if added_TE is not None:
            logits_TE += added_TE
        return torch.from_numpy(greatest_TK(logits_TE.float().numpy(), self._top_k))

    def _greatest(self, weight_EH: torch.Tensor, bias_E: torch.Tensor | None, *, random: torch.Generator) -> int:
        """How many it chooses, if these have the greatest logits for each of some random tokens; else 0."""
        own = [*self.router.parameters(), *self._own.values()]
        if all(tensor.data_ptr() != weight_EH.data_ptr() for tensor in own):
            return 0  # a copy, for which there is no room
        hidden_TH = torch.randn(TRIED_TOKENS, self.hidden_size, generator=random).to(self._site.dtype)
        with torch.inference_mode():
            index_TK = self.choices_TK(hidden_TH)
            logits_TE = nn.functional.linear(hidden_TH.to(weight_EH.dtype), weight_EH, bias_E).float()
        top_k = index_TK.shape[1]
        if top_k > self.num_outputs or int(index_TK.max()) >= self.num_outputs:
            return 0
        is_each = bool((index_TK.sort(dim=1).values.diff(dim=1) > 0).all())
        greatest = torch.from_numpy(greatest_TK(logits_TE.numpy(), top_k))
        return top_k if is_each and torch.equal(logits_TE.gather(1, index_TK), logits_TE.gather(1, greatest)) else 0

    def _trial(self, num_experts: int) -> _Logits:
        """What can be seen of its logits when it is asked about anything."""
        hidden_TH = torch.ones(2, self.hidden_size, dtype=self._site.dtype, device=self.device)
        with torch.inference_mode():
            maps = _Logits(num_experts, None)
            self._run(hidden_TH, maps)
            if not maps.seen and len(maps.wider) == 1:
                maps = _Logits(maps.wider[0], None)
                self._run(hidden_TH, maps)
        return maps

    def _run(self, hidden_TH: torch.Tensor, logits: AbstractContextManager[Any]) -> torch.Tensor:
        """(T, K) choices."""
        site = self._site
        hidden = hidden_TH.to(site.dtype)
        hidden = hidden if site.hidden_dims == 2 else hidden[None]
        arguments = [self._filled(value) for value in site.arguments]
        keywords = {name: self._filled(value) for name, value in site.keywords.items()}
        if isinstance(site.hidden_at, int):
            arguments[site.hidden_at] = hidden
        else:
            keywords[site.hidden_at] = hidden
        if site.is_block:
            return self._up_to_experts(arguments, keywords, logits)
        with logits:
            output = self.router(*arguments, **keywords)
        index: torch.Tensor = output if site.index_at is None else output[site.index_at]
        return index.reshape(len(hidden_TH), -1)

    def _up_to_experts(
        self, arguments: list[Any], keywords: dict[str, Any], logits: AbstractContextManager[Any]
    ) -> torch.Tensor:
        """The block, until it parks. The mode spans the park, but nothing else runs before the block is ended."""

        def run() -> torch.Tensor:
            with logits:
                output: torch.Tensor = self.router(*arguments, **keywords)
                return output

        block = Forward(run)
        try:
            parked = block.start()
            assert parked is not None, "the block ended without its experts"
            return parked.top_k_index_TK
        finally:
            block.abort()

    def _filled(self, value: Any) -> Any:
        return self._own[value.name] if isinstance(value, FromModel) else value


class _Logits(TorchFunctionMode):
    """While it is on, takes down what the linear maps onto the experts return, with ``added_TE`` added to it."""

    def __init__(self, num_outputs: int, added_TE: torch.Tensor | None) -> None:
        super().__init__()
        self.num_outputs = num_outputs
        self._added_TE = added_TE
        self.seen: list[torch.Tensor] = []
        self.maps: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        """Weight and bias of each."""
        self.wider: list[int] = []
        self.scores = "other"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and result.shape[-1] > self.num_outputs:
            self.wider.append(result.shape[-1])
        elif func is nn.functional.linear and result.shape[-1] == self.num_outputs:
            if self._added_TE is not None:
                result = result + self._added_TE.view(result.shape).to(result.dtype)
            self.seen.append(result)
            weight, bias = (_argument(place, name, args, kwargs) for place, name in ((1, "weight"), (2, "bias")))
            self.maps.append((weight.detach(), None if bias is None else bias.detach()))
        elif self.seen and self.scores == "other" and func in _SCORES:
            self.scores = _SCORES[func]
        return result


def _argument(place: int, name: str, args: Any, kwargs: Any) -> Any:
    return args[place] if len(args) > place else (kwargs or {}).get(name)


_SCORES: dict[Any, str] = {
    torch.softmax: "softmax",
    nn.functional.softmax: "softmax",
    torch.Tensor.softmax: "softmax",
    torch.sigmoid: "sigmoid",
    nn.functional.sigmoid: "sigmoid",
    torch.Tensor.sigmoid: "sigmoid",
}


def frozen_copy(module: nn.Module) -> Any:
    """A module of the same class over the same memory: no hooks, no gradients, and linear layers as transformers has them.

    Methods that were bound to the module are bound to the copy.
    """
    copied = module.__class__.__new__(nn.Linear if type(module) is WideLinear else module.__class__)
    for name, value in vars(module).items():
        if isinstance(value, MethodType) and value.__self__ is module:
            value = MethodType(value.__func__, copied)
        copied.__dict__[name] = OrderedDict() if "_hooks" in name else value
    copied.__dict__["_parameters"] = {
        name: None if value is None else nn.Parameter(value.detach(), requires_grad=False)
        for name, value in module._parameters.items()
    }
    copied.__dict__["_buffers"] = dict(module._buffers)
    copied.__dict__["_modules"] = {
        name: None if child is None else frozen_copy(child) for name, child in module._modules.items()
    }
    copied.training = False
    return copied


def _of_model(model: nn.Module, name: str) -> torch.Tensor:
    path, _, key = name.rpartition(".")
    tensor: torch.Tensor = getattr(model.get_submodule(path), key)
    return tensor.detach()
