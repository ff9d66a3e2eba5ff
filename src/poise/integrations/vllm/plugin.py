"""The entry point ``vllm.general_plugins: poise``: vLLM (0.33.0) calls ``register`` in each of its processes.

It puts Poise's policy where vLLM looks its policies up, under the one name that its configuration allows. Nothing changes for
a server without ``--enable-eplb``. Registering again changes nothing.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)

NAME = "default"
"""The only policy name that vLLM 0.33.0 accepts."""


def register() -> None:
    """A vLLM without this extension point is left as it is, with a warning."""
    try:
        from vllm.distributed.eplb.policy import EPLB_POLICIES, AbstractEplbPolicy
    except ImportError as error:
        logger.warning("Poise does not place experts: this vLLM has no load-balancing policies (%s); use 0.33.0", error)
        return
    if NAME not in EPLB_POLICIES:
        logger.warning("Poise does not place experts: this vLLM has no policy %r but %s", NAME, sorted(EPLB_POLICIES))
    elif not hasattr(EPLB_POLICIES[NAME], "is_poise"):
        EPLB_POLICIES[NAME] = policy_class(AbstractEplbPolicy, EPLB_POLICIES[NAME], os.environ)


def policy_class(base: Any, default: Any, environment: Mapping[str, str]) -> Any:
    """A policy of vLLM's kind, a subclass of ``base``, that falls back to the policy ``default``.

    Settings are read here, once. The log is opened at the first call: only then does a process know its rank.
    """
    from poise.integrations.vllm.agreement import difference_among_ranks
    from poise.integrations.vllm.expert_log import ExpertLog
    from poise.integrations.vllm.policy import SpeedAwareRebalance
    from poise.integrations.vllm.settings import settings_from

    settings = settings_from(environment)
    built: list[SpeedAwareRebalance] = []

    class PoiseEplbPolicy(base):  # type: ignore[misc]
        """Places experts by predicted time on unequal devices."""

        is_poise = True

        @classmethod
        def rebalance_experts(cls, *arguments: Any, **named: Any) -> Any:
            if not built:
                log = None
                if settings.expert_log is not None and _rank() == 0:
                    log = ExpertLog(settings.expert_log, window_steps=settings.window_steps)
                difference = functools.partial(difference_among_ranks, settings)
                built.append(
                    SpeedAwareRebalance(settings, default=default.rebalance_experts, log=log, difference=difference)
                )
            return built[0](*arguments, **named)

    return PoiseEplbPolicy


def _rank() -> int:
    """Of this process among all; 0 where there is one."""
    import torch.distributed

    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
