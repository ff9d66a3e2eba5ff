"""A socket between every two ranks, beside the process groups, for replicas of experts on the auxiliary track.

Gloo takes ten times as much processor time for a chunk as a plain socket, which ranks on CPUs lack for their experts (decision
046). Ranks tell each other where they listen over the store. The address is that of GLOO_SOCKET_IFNAME where it is set, else
that from which the ranks' meeting point is reached. Who connects says which rank it is and a word that only the ranks know.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import struct
import time
from contextlib import suppress

from poise.parallel.group import RankGroup

_HELLO = struct.Struct("<i16s")
_SIOCGIFADDR = 0x8915
_SLICE_S = 0.2
_RETRY_S = 0.05


def open_links(group: RankGroup, *, name: str = "link") -> dict[int, socket.socket]:
    """All ranks at once: a connected socket to every other rank. ``name`` tells several sets of links of a job apart.

    Raises RankLostError, on all ranks, where one cannot be reached.
    """
    host, word = _own_address(group.meeting_host), secrets.token_bytes(16)
    with socket.create_server((host, 0), backlog=group.num_ranks) as listener:
        here = json.dumps([host, listener.getsockname()[1], word.hex()])
        group.put(f"{name}/{group.rank}", here)
        links = {rank: _connect(group, rank, name) for rank in range(group.rank)}
        links |= _accept(group, listener, word)
    for link in links.values():
        link.settimeout(None)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return links


def _own_address(meeting_host: str) -> str:
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        if interface:
            with suppress(OSError):
                told = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
                return socket.inet_ntoa(told[20:24])
        try:
            probe.connect((meeting_host, 9))  # sends nothing: it only finds the way
        except OSError:
            return socket.gethostbyname(socket.gethostname())
        return str(probe.getsockname()[0])


def _connect(group: RankGroup, rank: int, name: str) -> socket.socket:
    """To a lower rank, which may not listen yet for a moment."""
    host, port, word = json.loads(group.hear(f"{name}/{rank}"))
    deadline_s = time.monotonic() + group.behind_s
    while True:
        group.check()
        try:
            link = socket.create_connection((host, port), timeout=_SLICE_S * 5)
        except OSError as error:
            if time.monotonic() > deadline_s:
                group.end_all(
                    f"rank {group.rank} cannot reach rank {rank} at {host}:{port} ({error}); set GLOO_SOCKET_IFNAME to the "
                    "network interface that all ranks share"
                )
            time.sleep(_RETRY_S)
        else:
            link.sendall(_HELLO.pack(group.rank, bytes.fromhex(word)))
            return link


def _accept(group: RankGroup, listener: socket.socket, word: bytes) -> dict[int, socket.socket]:
    """From all higher ranks."""
    links: dict[int, socket.socket] = {}
    awaited = set(range(group.rank + 1, group.num_ranks))
    deadline_s = time.monotonic() + 2 * group.behind_s
    listener.settimeout(_SLICE_S)
    while awaited:
        group.check()
        if time.monotonic() > deadline_s:
            group.end_all(f"rank {min(awaited)} does not connect to rank {group.rank}")
        with suppress(TimeoutError):
            link, _ = listener.accept()
            rank = _greeted(link, word)
            if rank in awaited:
                awaited.remove(rank)
                links[rank] = link
            else:
                link.close()
    return links


def _greeted(link: socket.socket, word: bytes) -> int | None:
    """Which rank it is; None for somebody else."""
    link.settimeout(5 * _SLICE_S)
    try:
        said = link.recv(_HELLO.size, socket.MSG_WAITALL)
    except OSError:
        return None
    if len(said) < _HELLO.size:
        return None
    rank, told = _HELLO.unpack(said)
    return int(rank) if secrets.compare_digest(told, word) else None
