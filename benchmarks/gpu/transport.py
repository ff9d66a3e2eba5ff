"""How fast `--balance probe` brings replicas from GPU to GPU by way of pinned memory and a socket, between two processes."""

from __future__ import annotations

import multiprocessing
import socket
import statistics
import time
from multiprocessing.connection import Connection

import torch

from benchmarks.gpu.layers import SHAPES
from poise.engine.stepwise import MOST_CHUNK_BYTES
from poise.model.streams import new_stream, settle
from poise.parallel.replica_fetch import Wanted
from poise.parallel.replica_staging import Landing, Outlet, host_memory
from poise.parallel.replica_track import ReplicaTrack

EXPERTS, ROUNDS, WITHIN_S = 3, 12, 5.0
DEVICE = torch.device("cuda", 0)
EXPERT_BYTES = {name: 3 * hidden * intermediate * 2 for name, (hidden, intermediate, _) in SHAPES.items()}


def transport() -> list[dict[str, object]]:
    """A row for each model: bytes a second and seconds for three experts. What has come is compared."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = context.Process(target=_serve, args=(there, listener.getsockname()[1]), daemon=True)
        server.start()
        link, _ = listener.accept()
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    track = ReplicaTrack({1: link}, lambda asked, rank: None, chunk_bytes=MOST_CHUNK_BYTES)
    try:
        return [_row(track, layer, name) for layer, name in enumerate(SHAPES)]
    finally:
        track.close()
        here.send("end")
        server.join(timeout=10.0)


def _row(track: ReplicaTrack, layer: int, name: str) -> dict[str, object]:
    times = _rounds(track, layer, EXPERT_BYTES[name])
    seconds = statistics.median(times)
    return {
        "model": name,
        "expert_bytes": EXPERT_BYTES[name],
        "chunk_bytes": MOST_CHUNK_BYTES,
        "seconds": seconds,
        "slowest_s": max(times),
        "bytes_per_s": EXPERTS * EXPERT_BYTES[name] / seconds,
    }


def _rounds(track: ReplicaTrack, layer: int, expert_bytes: int) -> list[float]:
    staged = host_memory(EXPERTS, expert_bytes, pinned=DEVICE.type == "cuda")
    slots = torch.empty(EXPERTS, expert_bytes, dtype=torch.uint8, device=DEVICE)
    stream, times = new_stream(DEVICE), []
    for number in range(ROUNDS + 1):
        slots.zero_()
        settle(DEVICE)
        wanted = [
            Wanted(
                expert=expert,
                source=1,
                run=staged[expert].numpy().data,
                landing=Landing(staged[expert], slots[expert], stream, None),
            )
            for expert in range(EXPERTS)
        ]
        began_s = time.perf_counter()
        track.fetch(layer, wanted)
        fetched = track.finish(within_s=WITHIN_S)
        if number:
            times.append(time.perf_counter() - began_s)
        assert fetched.arrived == (True,) * EXPERTS, f"{fetched.nbytes} bytes came within {WITHIN_S} s"
        for expert in range(EXPERTS):
            assert torch.equal(slots[expert], _content(expert, expert_bytes)), "other bytes have come"
    return times


def _serve(pipe: Connection, port: int) -> None:
    """Experts of all models, as so many layers."""
    experts_LE = [[_content(expert, nbytes) for expert in range(EXPERTS)] for nbytes in EXPERT_BYTES.values()]
    settle(DEVICE)
    outlet = Outlet(lambda layer, expert: experts_LE[layer][expert], DEVICE, num_ranks=2, chunk_bytes=MOST_CHUNK_BYTES)
    link = socket.create_connection(("127.0.0.1", port))
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    track = ReplicaTrack({0: link}, outlet.chunk, chunk_bytes=MOST_CHUNK_BYTES)
    pipe.recv()
    track.close()


def _content(expert: int, nbytes: int) -> torch.Tensor:
    return (torch.arange(nbytes, device=DEVICE) * (2 * expert + 1) >> 3).to(torch.uint8)
