"""Which rank this process is, and the store through which ranks find each other; as ``torchrun`` says in the environment.

Nothing assumes one host: the store lies where MASTER_ADDR and MASTER_PORT say, kept by ``torchrun`` itself, or by rank 0
where ranks are started one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from poise.errors import RanksError

_HOW = "start ranks with: torchrun --nproc-per-node RANKS -m poise ..."


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """``rank`` of ``num_ranks``, the ``local_rank``-th of ``local_ranks`` on this host. ``keeps_store``: the store lies in this
    process."""

    rank: int
    num_ranks: int
    local_rank: int
    host: str
    port: int
    attempt: int
    keeps_store: bool
    local_ranks: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Launch:
        """Raises RanksError where the variables that ``torchrun`` sets are missing or cannot be."""
        rank, num_ranks = _whole(environment, "RANK"), _whole(environment, "WORLD_SIZE")
        if not 0 <= rank < num_ranks:
            raise RanksError(f"RANK is {rank} and WORLD_SIZE {num_ranks}; a rank is 0 to {num_ranks - 1}; {_HOW}")
        if not environment.get("MASTER_ADDR"):
            raise RanksError(f"MASTER_ADDR is not set, so ranks cannot find each other; {_HOW}")
        return cls(
            rank=rank,
            num_ranks=num_ranks,
            local_rank=_whole(environment, "LOCAL_RANK", rank),
            host=environment["MASTER_ADDR"],
            port=_whole(environment, "MASTER_PORT"),
            attempt=_whole(environment, "TORCHELASTIC_RESTART_COUNT", 0),
            local_ranks=max(1, _whole(environment, "LOCAL_WORLD_SIZE", 1)),
            keeps_store=rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        )

    def connect(self, *, timeout_s: float) -> Store:
        """The store that all ranks of this job share. Raises RanksError when it is out of reach for ``timeout_s``."""
        try:
            store = TCPStore(
                self.host,
                self.port,
                self.num_ranks,
                is_master=self.keeps_store,
                timeout=timedelta(seconds=timeout_s),
                wait_for_workers=False,
            )
        except (RuntimeError, ValueError) as error:
            raise RanksError(
                f"rank {self.rank} cannot reach the ranks' meeting point {self.host}:{self.port} "
                f"({_first_line(error)}); check MASTER_ADDR, MASTER_PORT and the firewall between the machines"
            ) from None
        return PrefixStore(f"poise/{self.attempt}", store)


def _whole(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        raise RanksError(f"{name} is {'not set' if text is None else repr(text)}; it is a whole number; {_HOW}")
    return int(text)


def _first_line(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 160 else f"{text[:160]}..."
