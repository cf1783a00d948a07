"""Connections that are silent, half-spoken, left in the middle, or never read."""

from __future__ import annotations

import contextlib
import json
import random
import select
import socket
import time
import urllib.parse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tests.attacks.bystander import Bystander
from tests.attacks.target import CALM_S, Target
from tests.attacks.verdict import Verdict

NUM_OF_KIND = {
    "never spoke": 300,
    "half a header": 100,
    "a header that drips": 50,
    "half a body": 100,
}
SILENCE_LIMIT_S = 45.0
"""Silent and half-spoken connections are closed within 30 s; the rest is for the machine."""
NUM_LEAVERS = 300
NUM_DEAF = 60
DEAF_LIMIT_S = 60.0
"""For a small request beside readers that do not read, and for their requests to end."""
DESCRIPTORS_LEFT = 8


def connections(target: Target, verdict: Verdict, seed: int) -> None:
    """Each kind against the router."""
    before, descriptors = target.memory(), target.num_descriptors()
    leavers(target, verdict, random.Random(seed))
    silent(target, verdict)
    deaf(target, verdict)
    target.settle(verdict, before, "connections")
    deadline_s = time.monotonic() + CALM_S
    while (
        grown := _grown(descriptors, target.num_descriptors())
    ) and time.monotonic() < deadline_s:
        time.sleep(1)
    for problem in grown:
        verdict.broke("descriptors are closed", f"connections: {problem}")


def leavers(target: Target, verdict: Verdict, source: random.Random) -> None:
    """Clients that go away at any moment: nothing of theirs may stay."""
    patience_s = [source.random() ** 2 * 1.5 for _ in range(NUM_LEAVERS)]

    def one(number: int) -> None:
        fields = {
            "stream": number % 3 > 0,
            "n": 1 + number % 4,
            "ignore_eos": True,
            "max_tokens": 400,
        }
        with _connected(target) as connection, contextlib.suppress(OSError):
            connection.sendall(
                _request(target, {"prompt": f"{number} " + "word " * (number % 200), **fields})
            )
            connection.settimeout(patience_s[number])
            connection.recv(2**16)

    with Bystander(target) as bystander, ThreadPoolExecutor(24) as pool:
        list(pool.map(one, range(NUM_LEAVERS)))
    bystander.judge(verdict, f"{NUM_LEAVERS} clients that go away", limit_s=DEAF_LIMIT_S)
    target.check_alive(verdict, f"{NUM_LEAVERS} clients that go away")
    verdict.row(f"{NUM_LEAVERS} clients that go away", bystander.said())


def silent(target: Target, verdict: Verdict) -> None:
    """Connections that never say a whole request are closed; one that has asked may stay for the
    next.
    """
    half = (
        "POST /v1/completions HTTP/1.1\r\nHost: "
        f"{urllib.parse.urlsplit(target.router).netloc}\r\nX-A: "
    )
    with contextlib.ExitStack() as stack:
        kinds: dict[str, list[socket.socket]] = {kind: [] for kind in NUM_OF_KIND}
        for kind, number in NUM_OF_KIND.items():
            for _ in range(number):
                with contextlib.suppress(OSError):
                    kinds[kind].append(stack.enter_context(_connected(target)))
        for connection in kinds["half a header"] + kinds["a header that drips"]:
            with contextlib.suppress(OSError):
                connection.sendall(half.encode())
        for connection in kinds["half a body"]:
            with contextlib.suppress(OSError):
                connection.sendall(_request(target, {"prompt": "x" * 1000})[:-500])
        start_s = time.monotonic()
        with Bystander(target) as bystander:
            while any(map(_open, kinds.values())) and time.monotonic() < start_s + SILENCE_LIMIT_S:
                for connection in kinds["a header that drips"]:
                    with contextlib.suppress(OSError):
                        connection.sendall(b"a")
                time.sleep(1)
        seconds = time.monotonic() - start_s
        left = {kind: len(_open(opened)) for kind, opened in kinds.items()}
    how = f"connections by kind: {NUM_OF_KIND}"
    for kind, number in left.items():
        if number:
            verdict.broke(
                f"connections are closed within 30 s: {kind}",
                f"{how}: {number} are open after {seconds:.0f} s",
            )
    bystander.judge(verdict, how, limit_s=SILENCE_LIMIT_S / 3)
    target.check_alive(verdict, how)
    verdict.row(
        f"{sum(NUM_OF_KIND.values())} silent or half-spoken",
        f"open after {seconds:.0f} s: {left}",
        bystander.said(),
    )


def deaf(target: Target, verdict: Verdict) -> None:
    """Readers that never read: their requests end after a bound, and others are served
    meanwhile.
    """
    fields = {
        "max_tokens": 1500,
        "stream": True,
        "logprobs": 20,
        "n": 4,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    how = f"{NUM_DEAF} streams that nobody reads, {json.dumps(fields)}"
    with contextlib.ExitStack() as stack, Bystander(target) as bystander:
        start_s = time.monotonic()
        for number in range(NUM_DEAF):
            connection = stack.enter_context(_connected(target, receive_bytes=2048))
            with contextlib.suppress(OSError):
                connection.sendall(_request(target, {"prompt": f"reader {number}", **fields}))
        time.sleep(5)
        while (left := target.left()) and time.monotonic() < start_s + DEAF_LIMIT_S:
            time.sleep(1)
        seconds = time.monotonic() - start_s
    if left:
        verdict.broke(
            "a reader that does not read loses its place",
            f"{how}: after {seconds:.0f} s {left[:4]}",
        )
    bystander.judge(verdict, how, limit_s=DEAF_LIMIT_S / 2)
    target.check_alive(verdict, how)
    verdict.row(
        f"{NUM_DEAF} readers that do not read",
        f"ended after {seconds:.0f} s, left {left[:2]}",
        bystander.said(),
        bystander.said_of_memory(),
    )


def _connected(target: Target, receive_bytes: int | None = None) -> socket.socket:
    address = urllib.parse.urlsplit(target.router)
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.settimeout(10)
    with contextlib.suppress(OSError):
        connection.connect((address.hostname or "", address.port or 0))
    return connection


def _request(target: Target, body: dict[str, object]) -> bytes:
    content = json.dumps(body).encode()
    lines = (
        "POST /v1/completions HTTP/1.1",
        f"Host: {urllib.parse.urlsplit(target.router).netloc}",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def _open(opened: Sequence[socket.socket]) -> list[socket.socket]:
    """Those that the other side has not closed."""
    return [connection for connection in opened if not _is_closed(connection)]


def _is_closed(connection: socket.socket) -> bool:
    poller = select.poll()
    poller.register(connection, select.POLLIN | select.POLLRDHUP)
    return any(
        event & (select.POLLRDHUP | select.POLLHUP | select.POLLERR) for _, event in poller.poll(0)
    )


def _grown(before: dict[str, int], now: dict[str, int]) -> list[str]:
    return [
        f"{name} {before[name]} -> {now[name]}"
        for name in before
        if name in now and now[name] > before[name] + DESCRIPTORS_LEFT
    ]
