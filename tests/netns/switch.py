"""A switch between hosts: a process that passes frames from one host's device to another's, and
loses, delays and slows them down as it is told.

It is run as ``python -m tests.netns.switch PID..`` with the process ids of the hosts. Each gets a
device ``eth0`` in its network namespace. Commands come as lines of JSON on standard input, each is
answered by one on standard output; the end of standard input ends the switch, and with it the
devices.

The kernel's own emulator (``tc netem``) is not in every kernel; this one needs ``/dev/net/tun``.
"""

import ctypes
import fcntl
import heapq
import itertools
import os
import random
import select
import socket
import struct
import sys
import time
from collections import Counter
from pathlib import Path

import msgspec

DEVICE = "eth0"
MTU = 9000
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_CLONE_NEWNET = 0x40000000
_BROADCAST_BIT = 1
_QUEUE_S = 0.5
"""A link that is slow drops what would wait for longer."""


class Link(msgspec.Struct, kw_only=True):
    """The state of a host's cable; it holds for both directions."""

    loss: float = 0.0
    """Share of the frames that are lost."""
    delay_s: float = 0.0
    bytes_per_s: float = 0.0
    """0: no limit."""
    is_cut: bool = False


class SetLink(msgspec.Struct, tag=True):
    port: int
    link: Link


class Count(msgspec.Struct, tag=True):
    """Asks for the bytes that have gone from each host to each other one."""


class SetDoors(msgspec.Struct, tag=True):
    """Lets TCP connections to these ports of a host through, first and last of each range, and no
    other ones: a firewall before the host.
    """

    port: int
    doors: list[tuple[int, int]]


class Knocks(msgspec.Struct, tag=True):
    """Asks which TCP connections were begun: source, target, port, whether it was let through."""


class Switch:
    def __init__(self, taps: list[int], seed: int = 0) -> None:
        self._taps = taps
        self._links = [Link() for _ in taps]
        self._free_at = [0.0 for _ in taps]
        self._ports: dict[bytes, int] = {}
        self._waiting: list[tuple[float, int, int, bytes]] = []
        self._order = itertools.count()
        self._random = random.Random(seed)
        self._doors: dict[int, list[tuple[int, int]]] = {}
        self.num_bytes: Counter[tuple[int, int]] = Counter()
        self.knocks: set[tuple[int, int, int, bool]] = set()

    def set_link(self, port: int, link: Link) -> None:
        self._links[port] = link
        self._free_at[port] = 0.0

    def set_doors(self, port: int, doors: list[tuple[int, int]]) -> None:
        self._doors[port] = doors

    def receive(self, source: int) -> None:
        while True:
            try:
                frame = os.read(self._taps[source], 65536)
            except BlockingIOError:
                return
            self._ports[frame[6:12]] = source
            known = None if frame[0] & _BROADCAST_BIT else self._ports.get(frame[:6])
            everybody = (port for port in range(len(self._taps)) if port != source)
            for target in everybody if known is None else (known,):
                self._pass_on(source, target, frame)

    def send_due(self) -> float | None:
        """Send what is due; return the seconds until more is."""
        now = time.monotonic()
        while self._waiting and self._waiting[0][0] <= now:
            _, _, target, frame = heapq.heappop(self._waiting)
            self._write(target, frame)
        return max(0.0, self._waiting[0][0] - now) if self._waiting else None

    def _is_let_in(self, source: int, target: int, frame: bytes) -> bool:
        """Judge what begins a TCP connection; all else passes."""
        wanted = begun_port(frame)
        if wanted is None:
            return True
        doors = self._doors.get(target)
        is_open = doors is None or any(first <= wanted <= last for first, last in doors)
        self.knocks.add((source, target, wanted, is_open))
        return is_open

    def _pass_on(self, source: int, target: int, frame: bytes) -> None:
        if not self._is_let_in(source, target, frame):
            return
        due_at = now = time.monotonic()
        for port in (source, target):
            link = self._links[port]
            if link.is_cut or (link.loss and self._random.random() < link.loss):
                return
            due_at += link.delay_s
            if link.bytes_per_s:
                begins_at = max(now, self._free_at[port])
                if begins_at > now + _QUEUE_S:
                    return
                self._free_at[port] = begins_at + len(frame) / link.bytes_per_s
                due_at = max(due_at, self._free_at[port] + link.delay_s)
        self.num_bytes[source, target] += len(frame)
        if due_at > now:
            heapq.heappush(self._waiting, (due_at, next(self._order), target, frame))
        else:
            self._write(target, frame)

    def _write(self, target: int, frame: bytes) -> None:
        try:
            os.write(self._taps[target], frame)
        except (BlockingIOError, OSError):
            return  # the host's queue is full, or the host is gone


def begun_port(frame: bytes) -> int | None:
    """The port to which a frame begins a TCP connection (SYN without ACK); None: it does not."""
    match frame[12:14]:
        case b"\x08\x00":
            segment, protocol = 14 + (frame[14] & 15) * 4, frame[23]
        case b"\x86\xdd":
            segment, protocol = 54, frame[20]
        case _:
            return None
    if protocol != socket.IPPROTO_TCP or frame[segment + 13] & 0x12 != 0x02:
        return None
    return int.from_bytes(frame[segment + 2 : segment + 4])


def open_tap(pid: int) -> int:
    """Make the device in the network namespace of a process; this one is in it from then on."""
    namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
    os.close(namespace)
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), _IFF_TAP | _IFF_NO_PI))
    return tap


def main() -> None:
    switch = Switch(taps := [open_tap(int(pid)) for pid in sys.argv[1:]])
    ports = {tap: port for port, tap in enumerate(taps)}
    poll = select.poll()
    for fd in (*taps, 0):
        poll.register(fd, select.POLLIN)
    decoder = msgspec.json.Decoder(SetLink | Count | SetDoors | Knocks)
    print("ready", flush=True)  # noqa: T201 - the channel to the test
    commands = b""
    while True:
        wait_s = switch.send_due()
        for fd, _ in poll.poll(None if wait_s is None else wait_s * 1000 + 1):
            if fd:
                switch.receive(ports[fd])
                continue
            if not (received := os.read(0, 65536)):
                return
            *lines, commands = (commands + received).split(b"\n")
            for line in lines:
                answer: object = None
                match decoder.decode(line):
                    case SetLink(port=port, link=link):
                        switch.set_link(port, link)
                    case SetDoors(port=port, doors=doors):
                        switch.set_doors(port, doors)
                    case Knocks():
                        answer = sorted(switch.knocks)
                    case Count():
                        answer = [
                            [source, target, count]
                            for (source, target), count in switch.num_bytes.items()
                        ]
                print(msgspec.json.encode(answer).decode(), flush=True)  # noqa: T201


if __name__ == "__main__":
    assert Path("/dev/net/tun").exists()
    main()
