"""A network of our own: a namespace for each rank, joined by a bridge in a namespace of its own, every link with a rate.

The namespaces have no names: this process holds them open, so that the kernel removes them, the bridge and the links when
it ends, however it ends. The machine's own network is not touched, and addresses cannot collide with it. Traffic is
shaped both ways (token bucket): what a rank sends at its end, what it receives at the bridge's.

Needs root (CAP_NET_ADMIN, CAP_SYS_ADMIN) and iproute2 (`ip`, `tc`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

INTERFACE = "link0"
"""What a rank's link is called in its namespace."""
_NEW_NETWORK = 0x40000000
_WITHIN_S = 10
_MAX_QUEUE_S = 0.05
_MIN_BURST_BYTES = 72 * 1024
"""What passes at once after a pause. A bucket smaller than a segment of the stack (64 KiB) would cut each into packets."""
_MAX_BURST_S = 0.0002
_ENTER = """
import ctypes, os, sys
if ctypes.CDLL(None, use_errno=True).setns(int(sys.argv[1]), 0x40000000):
    sys.exit("cannot enter the network namespace")
os.execvp(sys.argv[2], sys.argv[2:])
"""


class NetworkError(Exception):
    """The network cannot be made here; the message says why, in one line."""


class Network:
    """``Network(4, bytes_per_s=…)``: ``namespaces[rank]`` is the descriptor to enter, ``address(rank)`` its address.

    Raises NetworkError.
    """

    def __init__(self, ranks: int, *, bytes_per_s: int) -> None:
        _check_tools()
        self._open: list[int] = []
        try:
            self._bridge = self._make_namespace()
            self.namespaces = tuple(self._make_namespace() for _ in range(ranks))
            self._connect(bytes_per_s)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def address(rank: int) -> str:
        """IPv4 address of a rank."""
        return f"10.77.0.{rank + 1}"

    def close(self) -> None:
        """Lets go of the namespaces; they end with the last process in them. Safe to call twice."""
        while self._open:
            os.close(self._open.pop())

    def _make_namespace(self) -> int:
        descriptor = _new_namespace()
        self._open.append(descriptor)
        return descriptor

    def _connect(self, bytes_per_s: int) -> None:
        ports = [f"port{rank}" for rank in range(len(self.namespaces))]
        plug = ["link add name hub type bridge", "link set hub up"]
        for port, namespace in zip(ports, self.namespaces, strict=True):
            plug.append(f"link add name {port} type veth peer name {INTERFACE} netns /proc/self/fd/{namespace}")
            plug += [f"link set {port} master hub", f"link set {port} up"]
        self._batch("ip", self._bridge, plug)
        self._batch("tc", self._bridge, [_shape(port, bytes_per_s) for port in ports])
        for rank, namespace in enumerate(self.namespaces):
            address = f"addr add {self.address(rank)}/24 dev {INTERFACE}"
            self._batch("ip", namespace, ["link set lo up", address, f"link set {INTERFACE} up"])
            self._batch("tc", namespace, [_shape(INTERFACE, bytes_per_s)])

    def _batch(self, tool: str, namespace: int, lines: Sequence[str]) -> None:
        """Runs lines of `ip` or `tc` inside a namespace. Raises NetworkError."""
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _ENTER, str(namespace), tool, "-batch", "-"],
            input="".join(f"{line}\n" for line in lines),
            capture_output=True,
            text=True,
            pass_fds=(namespace, *self.namespaces),
            timeout=_WITHIN_S,
        )
        if done.returncode:
            raise NetworkError(f"{tool} failed: {' '.join(done.stderr.split())}")


def _check_tools() -> None:
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise NetworkError(f"{' and '.join(missing)} not found; install iproute2 (Debian: apt-get install iproute2)")
    if os.geteuid() != 0:
        raise NetworkError("network namespaces need root; run as root")


def _new_namespace() -> int:
    """A descriptor that holds a new network namespace. A short-lived child makes it: this process stays where it is."""
    script = (
        "import ctypes, os, sys\n"
        f"if ctypes.CDLL(None, use_errno=True).unshare({_NEW_NETWORK}):\n"
        "    sys.exit(os.strerror(ctypes.get_errno()))\n"
        "print(flush=True)\n"
        "sys.stdin.read()\n"
    )
    argv = [sys.executable, "-I", "-S", "-c", "import os\n" + script]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        if not child.stdout.readline():
            raise NetworkError(f"the kernel refuses a network namespace ({child.stderr.read().decode().strip()})")
        return os.open(f"/proc/{child.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _shape(device: str, bytes_per_s: int) -> str:
    burst = max(_MIN_BURST_BYTES, round(bytes_per_s * _MAX_BURST_S))
    queue_ms = round(_MAX_QUEUE_S * 1000)
    return f"qdisc add dev {device} root tbf rate {bytes_per_s * 8}bit burst {burst}b latency {queue_ms}ms"
