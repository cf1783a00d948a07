"""``kv_transfer_params``, ``resume`` and ids: lies about where KV blocks are, and about what was
said.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tests.attacks.target import COMPLETIONS as PATH
from tests.attacks.target import Target, text_of
from tests.attacks.verdict import Verdict

PROMPT = (
    "Words that fill some blocks with keys and values: "
    + "one two three four five six seven eight " * 4
)

COMMANDS = (
    "/pdlaunch/release",
    "/sleep?level=9",
    "/sleep?level=x",
    "/sleep?level=1&mode=nonsense",
    "/wake_up?tags=nonsense",
)

LIES: dict[str, tuple[object, ...]] = {
    "remote_engine_id": (1, "", "x" * 300, "\u0000", None, "evil"),
    "remote_request_id": (1, "", "x" * 300, "somebody-else", None),
    "remote_host": ("", "x" * 300, "tcp://127.0.0.1", "\u0000", 5, None),
    "remote_port": (0, -1, 70000, "1", None),
    "remote_block_ids": (
        1,
        [],
        [[]],
        [[-1]],
        [["a"]],
        [[2**31]],
        [[2**63]],
        [[1] * 10000],
        [1, 2],
        [[0]] * 1000,
        None,
    ),
    "remote_num_tokens": (-1, 0, 1, 2**31, 2**63, 10**30, "5", None),
    "tp_size": (0, -1, 64, 5000, "a"),
    "remote_lease_s": (-1, 1e300, 5e-324, "x"),
    "do_remote_decode": (True, 1, "x", None),
    "do_remote_prefill": (False, 1, "x", None),
    "pdlaunch": (
        *(
            1,
            [],
            {},
            {"unknown": 1},
            {"first_tokens": []},
            {"first_tokens": [{}]},
            {"first_tokens": [{"token_id": -5}]},
        ),
        *(
            {"first_tokens": [{"token_id": 5}]},
            {"first_tokens": [{"token_id": 10**6}]},
            {"first_tokens": [{"token_id": 5}] * 500},
        ),
        {"first_tokens": [{"token_id": 5, "finish_reason": "nonsense"}]},
        {"first_tokens": [{"token_id": 5, "logprob": 1e308, "top_logprobs": [[5, 1.0]] * 100}]},
        *(
            {"first_token_sent": True},
            {"awaits_lease": True},
            {"awaits_lease": True, "first_token_sent": True},
        ),
        *(
            {"lease_id": "x"},
            {"lease_id": "x" * 251},
            {"lease_id": "\u0000\r\n"},
            {"lease_id": "../../x"},
            {"lease_id": 5},
        ),
    ),
}
RESUMES: tuple[object, ...] = (
    *(
        1,
        [],
        {},
        {"choices": 1},
        {"choices": []},
        {"choices": [[]]},
        {"choices": [[]] * 500},
        {"choices": [[{}]]},
    ),
    *(
        {"choices": [[{"token_id": 5}]]},
        {"choices": [[{"token_id": 5}] * 9000]},
        {"choices": [[{"token_id": 2**63}]]},
    ),
    *(
        {"choices": [[{"token_id": -5}]]},
        {"choices": [[{"token_id": 49151}]]},
        {"choices": [[{"token_id": 49152}]]},
    ),
    {"choices": [[{"token_id": 5, "finish_reason": "stop"}]]},
    {"choices": [[{"token_id": 5, "finish_reason": 5}]]},
    {"choices": [[{"token_id": 5}]], "sent": False},
    {
        "choices": [[{"token_id": 5, "logprob": None, "top_logprobs": [[1, 2], [3, 4]]}]],
        "sent": False,
    },
)
REQUEST_IDS = (
    "x" * 5000,
    "a b",
    "\xe9",
    "../../etc",
    "a/b",
    "a%0d%0aX: y",
    "",
    "\t",
    "same",
    "same",
)


def kv_fuzz(target: Target, verdict: Verdict) -> None:
    """Every lie at the engine that would believe it, and all of them at the router, which believes
    none.
    """
    before = target.memory()
    statuses: Counter[int] = Counter()
    prefill = next(name for name in target.names if name.startswith("prefill"))
    decode = next(name for name in target.names if name.startswith("decode"))
    handed = hand_over(target, verdict, prefill)
    with listener() as (port, num_connections):
        requests = [*lies(handed, port), *((decode, body, {}) for body in resumes())]
        requests += [(prefill, prefill_body(pdlaunch=lie), {}) for lie in LIES["pdlaunch"]]
        requests += [
            ("router", {"prompt": "a", "max_tokens": 2, "kv_transfer_params": handed}, {}),
            ("router", resumes()[3], {}),
        ]
        small = {"prompt": "a", "max_tokens": 2}
        requests += [
            (who, small, {"X-Request-Id": given})
            for given in REQUEST_IDS
            for who in ("router", decode)
        ]
        for who, body, headers in requests:
            answer = target.ask(decode if who == "decode" else who, PATH, body, headers=headers)
            statuses[answer.status] += 1
            target.judge(verdict, answer, f"{who} {PATH} {headers} {json.dumps(body)[:500]}")
        if num_connections():
            verdict.broke(
                "engines connect to no address that a client names",
                f"{num_connections()} connections to port {port}",
            )
    steal(target, verdict, prefill, decode)
    release(target, verdict, prefill)
    target.settle(verdict, before, "kv_fuzz")
    verdict.row(
        "kv_transfer_params, resume, ids",
        f"{sum(statuses.values())} requests",
        f"statuses {dict(sorted(statuses.items()))}",
    )


def prefill_body(**params: object) -> dict[str, Any]:
    return {
        "prompt": PROMPT,
        "max_tokens": 1,
        "kv_transfer_params": {"do_remote_decode": True, **params},
    }


def hand_over(target: Target, verdict: Verdict, prefill: str) -> dict[str, Any]:
    """What a prefill engine hands over for ``PROMPT``."""
    answer = target.ask(prefill, PATH, prefill_body())
    if answer.status != 200:
        verdict.broke("prefill hands over", f"{answer.status} {answer.body[:200]!r}")
        return {}
    params: dict[str, Any] = json.loads(answer.body)["kv_transfer_params"]
    return params


def lies(handed: dict[str, Any], port: int) -> Iterator[tuple[str, dict[str, Any], dict[str, str]]]:
    """Requests to decode; ``port``: a listener of ours that nobody should ever connect to."""
    engines = ("evil", handed.get("remote_engine_id"))
    told = [
        {"remote_host": "127.0.0.1", "remote_port": port, "remote_engine_id": engine}
        for engine in engines
    ]
    told += [{name: value} for name, values in LIES.items() for value in values]
    for lie in told:
        yield (
            "decode",
            {
                "prompt": PROMPT,
                "max_tokens": 4,
                "temperature": 0,
                "kv_transfer_params": handed | lie,
            },
            {},
        )


def resumes() -> list[dict[str, Any]]:
    extras: tuple[dict[str, Any], ...] = ({}, {"logprobs": 3}, {"stream": True, "logprobs": 2})
    return [
        {"prompt": "Hello world", "max_tokens": 5, "resume": resume, **extra}
        for resume in RESUMES
        for extra in extras
    ]


def steal(target: Target, verdict: Verdict, prefill: str, decode: str) -> None:
    """Another prompt under a lease of ``PROMPT``: the blocks must not be used, the answer is that
    of the other prompt.
    """
    other = {
        "prompt": "A wholly different question about somebody else's secrets. " * 3,
        "max_tokens": 8,
        "temperature": 0,
    }
    honest = target.ask(decode, PATH, other)
    # What prefill drew for its own prompt is told beside the blocks; it is no secret to who holds
    # the key of the engines.
    handed = {
        name: value
        for name, value in hand_over(target, verdict, prefill).items()
        if name != "pdlaunch"
    }
    stolen = target.ask(decode, PATH, other | {"kv_transfer_params": handed})
    target.judge(verdict, stolen, "another prompt under a lease")
    if stolen.status == 200 and text_of(stolen) != text_of(honest):
        verdict.broke(
            "no answer is made from another prompt's blocks",
            f"{other} under a lease of {PROMPT[:60]!r}..",
        )
    verdict.row("another prompt under a lease", stolen.status, "answered from its own tokens")


def release(target: Target, verdict: Verdict, prefill: str) -> None:
    """Nonsense to the commands of an engine."""
    nonsense = (
        b"",
        b"[]",
        b"5",
        b'{"request_id":5}',
        b'{"request_id":"unknown"}',
        b"\xff",
        b'{"request_id":"' + b"x" * 5000 + b'"}',
    )
    for path in COMMANDS:
        for body in nonsense:
            answer = target.send(prefill, path, body)
            target.judge(verdict, answer, f"{prefill} {path} {body[:60]!r}")


@contextlib.contextmanager
def listener() -> Iterator[tuple[int, Any]]:
    """A port of ours, and a function that says how many have connected to it."""
    found: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, address = server.accept()
                    found.append(address)
                    connection.close()

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1], lambda: len(found)
        server.shutdown(socket.SHUT_RDWR)
