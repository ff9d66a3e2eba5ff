"""One rank of the exchange benchmark: times all-to-all over Gloo, and plain sockets beside it. Prints JSON on rank 0.

Run by ``exchange.py`` as every rank of a cluster in a box.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

_WITHIN = timedelta(seconds=60)
_WARM_UP = 3
_SOCKET_BYTES = 1 << 20


def main() -> None:
    """``argv``: repeats, socket seconds, then sizes in bytes of what each rank holds, its own part included."""
    repeats, socket_s, sizes = int(sys.argv[1]), float(sys.argv[2]), [int(size) for size in sys.argv[3:]]
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dist.init_process_group("gloo", timeout=_WITHIN)
    try:
        seconds = {size: _all_to_all_s(size, world, repeats) for size in sizes}
        empty_s = _all_to_all_s(world * 8, world, repeats)
        sockets = _socket_bytes_per_s(rank, socket_s) if world == 2 else None
    finally:
        dist.destroy_process_group()
    if rank == 0:
        print(json.dumps({"seconds": seconds, "smallest_s": empty_s, "socket_bytes_per_s": sockets}))


def _all_to_all_s(size_bytes: int, world: int, repeats: int) -> float:
    """Median time of one all-to-all in which every rank holds ``size_bytes``, an equal part for each rank."""
    sent = torch.zeros(size_bytes // world * world, dtype=torch.uint8)
    received = torch.empty_like(sent)
    times = []
    for index in range(_WARM_UP + repeats):
        dist.barrier()
        began = time.perf_counter()
        dist.all_to_all_single(received, sent)
        if index >= _WARM_UP:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def _socket_bytes_per_s(rank: int, seconds: float) -> float:
    """What two ranks move over one TCP connection, both ways at once, bytes a second each way."""
    host = os.environ["MASTER_ADDR"]
    with socket.socket() as listener:
        if rank == 0:
            listener.bind((host, 0))
            listener.listen(1)
            listener.settimeout(_WITHIN.total_seconds())
        port = torch.tensor([listener.getsockname()[1] if rank == 0 else 0])
        dist.broadcast(port, 0)
        peer = listener.accept()[0] if rank == 0 else socket.create_connection((host, int(port)), timeout=60)
    with peer:
        peer.settimeout(_WITHIN.total_seconds())
        return _both_ways(peer, seconds)


def _both_ways(peer: socket.socket, seconds: float) -> float:
    began = time.perf_counter()
    block = bytes(_SOCKET_BYTES)

    def send() -> None:
        while time.perf_counter() - began < seconds:
            peer.sendall(block)
        peer.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    memory, received = bytearray(_SOCKET_BYTES), 0
    while count := peer.recv_into(memory):
        received += count
    sender.join()
    return received / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
