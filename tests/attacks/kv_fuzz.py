"""``kv_transfer_params``, ``resume`` and ids: lies about where KV blocks are, and about what was
said.
"""

import contextlib
import json
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tests.attacks.target import COMPLETIONS as PATH
from tests.attacks.target import Target, text_of
from tests.attacks.verdict import Verdict

PREFILL, DECODE = "prefill-0", "decode-0"
PROMPT = (
    "Words that fill some blocks with keys and values: "
    + "one two three four five six seven eight " * 4
)

GREEDY = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0}

COMMANDS = (
    "/pdlaunch/release",
    "/sleep?level=9",
    "/sleep?level=x",
    "/sleep?level=1&mode=nonsense",
    "/wake_up?tags=nonsense",
)

LONG = "x" * 300
LIES: dict[str, list[Any]] = json.loads(r"""{
    "remote_engine_id": [1, "", "\u0000", null, "evil"],
    "remote_request_id": [1, "", "\u0000", null, "somebody-else"],
    "remote_host": ["", "\u0000", null, 5, "tcp://127.0.0.1"],
    "remote_port": [0, -1, 70000, "1", null],
    "remote_block_ids": [1, [], [[]], [[-1]], [["a"]], [[2147483648]], [[9223372036854775808]],
                         [1, 2], null],
    "remote_num_tokens": [-1, 0, 1, 2147483648, 9223372036854775808, "5", null],
    "tp_size": [0, -1, 64, 5000, "a"],
    "remote_lease_s": [-1, 1e300, 5e-324, "x"],
    "do_remote_decode": [true, 1, "x", null],
    "do_remote_prefill": [false, 1, "x", null],
    "pdlaunch": [null, 1, [], {}, {"unknown": 1}, {"first_tokens": 1}, {"first_tokens": []},
                 {"first_tokens": [{}]}, {"first_tokens": [{"token_id": -5}]},
                 {"first_tokens": [{"token_id": 5}]}, {"first_tokens": [{"token_id": 1000000}]},
                 {"first_tokens": [{"token_id": 5, "finish_reason": "nonsense"}]},
                 {"first_token_sent": true}, {"awaits_lease": true},
                 {"awaits_lease": true, "first_token_sent": true},
                 {"lease_id": "x"}, {"lease_id": "\u0000\r\n"}, {"lease_id": "../../x"},
                 {"lease_id": 5}]
}""")
for field in ("remote_engine_id", "remote_request_id", "remote_host"):
    LIES[field].append(LONG)
LIES["remote_block_ids"] += [[[1] * 10_000], [[0]] * 1000]
LIES["pdlaunch"] += [
    {"lease_id": LONG},
    {"first_tokens": [{"token_id": 5}] * 500},
    {"first_tokens": [{"token_id": 5, "logprob": 1e308, "top_logprobs": [[5, 1.0]] * 100}]},
]
RESUMES: list[Any] = [
    *json.loads("""[
        1, [], {}, {"choices": 1}, {"choices": []}, {"choices": [[]]}, {"choices": [[{}]]},
        {"choices": [[{"token_id": 5}]]}, {"choices": [[{"token_id": -5}]]},
        {"choices": [[{"token_id": 49151}]]}, {"choices": [[{"token_id": 49152}]]},
        {"choices": [[{"token_id": 9223372036854775808}]]},
        {"choices": [[{"token_id": 5, "finish_reason": "stop"}]]},
        {"choices": [[{"token_id": 5, "finish_reason": 5}]]},
        {"choices": [[{"token_id": 5}]], "sent": false},
        {"choices": [[{"token_id": 5, "logprob": null, "top_logprobs": [[1, 2], [3, 4]]}]],
         "sent": false}
    ]"""),
    {"choices": [[]] * 500},
    {"choices": [[{"token_id": 5}] * 9000]},
]
REQUEST_IDS = ("x" * 5000, "a b", "\xe9", "../../etc", "a%0d%0aX: y", "", "\t", "same", "same")


def kv_fuzz(target: Target, verdict: Verdict) -> None:
    """Every lie at the engine that would believe it, and all of them at the router, which believes
    none.
    """
    before = target.memory()
    statuses: Counter[int] = Counter()
    handed = hand_over(target, verdict)
    right = text_of(target.ask(DECODE, PATH, GREEDY))
    with socket.create_server(("127.0.0.1", 0)) as trap:
        for lie in lies(handed, trap.getsockname()[1]):
            answer = target.ask(DECODE, PATH, GREEDY | {"kv_transfer_params": handed | lie})
            statuses[answer.status] += 1
            how = f"{DECODE} {PATH} {json.dumps(lie)[:500]}"
            target.judge(verdict, answer, how)
            # A first token that is wrong is a wrong answer of the caller's own making.
            is_told = "pdlaunch" in lie or "do_remote_decode" in lie
            if answer.status == 200 and not is_told and text_of(answer) != right:
                verdict.broke("a lie about blocks changes no token", how)
        small = {"prompt": "a", "max_tokens": 2}
        requests: list[tuple[str, dict[str, Any], dict[str, str]]] = [
            *((DECODE, body, {}) for body in resumes()),
            *((PREFILL, prefill_body(pdlaunch=lie), {}) for lie in LIES["pdlaunch"]),
            ("router", small | {"kv_transfer_params": handed}, {}),
            ("router", resumes()[3], {}),
        ]
        for given in REQUEST_IDS:
            requests += [(who, small, {"X-Request-Id": given}) for who in ("router", DECODE)]
        for who, body, headers in requests:
            answer = target.ask(who, PATH, body, headers=headers)
            statuses[answer.status] += 1
            target.judge(verdict, answer, f"{who} {PATH} {headers} {json.dumps(body)[:500]}")
        trap.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            how = f"{trap.accept()[1]} connected to {trap.getsockname()}"
            verdict.broke("engines connect to no address that a client names", how)
    steal(target, verdict)
    command(target, verdict)
    target.settle(verdict, before, "kv_fuzz")
    verdict.row(
        "kv_transfer_params, resume, ids",
        f"{sum(statuses.values())} requests",
        f"statuses {dict(sorted(statuses.items()))}",
    )


def prefill_body(**params: object) -> dict[str, Any]:
    return GREEDY | {"max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True, **params}}


def hand_over(target: Target, verdict: Verdict) -> dict[str, Any]:
    """What a prefill engine hands over for ``PROMPT``."""
    answer = target.ask(PREFILL, PATH, prefill_body())
    if answer.status != 200:
        verdict.broke("prefill hands over", f"{answer.status} {answer.body[:200]!r}")
        return {}
    return json.loads(answer.body)["kv_transfer_params"]


def lies(handed: dict[str, Any], port: int) -> Iterator[dict[str, Any]]:
    """What to say in place of the truth; ``port``: a listener of ours that nobody should ever
    connect to.
    """
    for engine in ("evil", handed.get("remote_engine_id")):
        yield {"remote_host": "127.0.0.1", "remote_port": port, "remote_engine_id": engine}
    for name, values in LIES.items():
        yield from ({name: value} for value in values)


def resumes() -> list[dict[str, Any]]:
    extras: tuple[dict[str, Any], ...] = ({}, {"logprobs": 3}, {"stream": True, "logprobs": 2})
    return [
        {"prompt": "Hello world", "max_tokens": 5, "resume": resume, **extra}
        for resume in RESUMES
        for extra in extras
    ]


def steal(target: Target, verdict: Verdict) -> None:
    """Another prompt under a lease of ``PROMPT``: the blocks must not be used, the answer is that
    of the other prompt.
    """
    other = {
        "prompt": "A wholly different question about somebody else's secrets. " * 3,
        "max_tokens": 8,
        "temperature": 0,
    }
    honest = target.ask(DECODE, PATH, other)
    # What prefill drew for its own prompt is told beside the blocks; it is no secret to who holds
    # the key of the engines.
    handed = hand_over(target, verdict)
    handed.pop("pdlaunch", None)
    stolen = target.ask(DECODE, PATH, other | {"kv_transfer_params": handed})
    target.judge(verdict, stolen, "another prompt under a lease")
    if stolen.status == 200 and text_of(stolen) != text_of(honest):
        verdict.broke(
            "no answer is made from another prompt's blocks",
            f"{other} under a lease of {PROMPT[:60]!r}..",
        )
    verdict.row("another prompt under a lease", stolen.status, "answered from its own tokens")


def command(target: Target, verdict: Verdict) -> None:
    nonsense = b'|[]|5|{"request_id":5}|{"request_id":"unknown"}|\xff'.split(b"|")
    nonsense.append(b'{"request_id":"' + b"x" * 5000 + b'"}')
    for path in COMMANDS:
        for body in nonsense:
            answer = target.send(PREFILL, path, body)
            target.judge(verdict, answer, f"{PREFILL} {path} {body[:60]!r}")
