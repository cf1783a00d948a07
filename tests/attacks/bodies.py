"""Huge bodies that the limit of bytes lets in, alone and several at once, beside a small request;
and bodies that never end.
"""

import socket
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from tests.attacks.bystander import Bystander
from tests.attacks.target import CHAT, COMPLETIONS, VOCAB_SIZE, Answer, Target
from tests.attacks.verdict import Verdict

BODY_BYTES = 16 * 2**20 - 4096
"""Just under the default of limits.max_body_bytes."""
OTHERS_LIMIT_S = 15.0
"""For a small request beside them, on two busy cores."""
AT_ONCE = 8
NUM_UNFINISHED = 60
CALM_ROUNDS = 12
KEPT_MIB = 64
"""Room of four bodies, which malloc may keep: a body that is lost with each request is more."""
ANSWER_LIMIT_S = 180.0

MESSAGE = b'{"role":"user","content":"a"}'
TEXT_PART = b'{"type":"text","text":"a"}'
TO_THE_CHAT = b'{"max_tokens":2,"messages":['
PROMPT = b'{"max_tokens":2,"prompt":'


def fill(start: bytes, piece: bytes, end: bytes) -> bytes:
    """As many pieces as the limit leaves room for."""
    return start + piece * ((BODY_BYTES - len(start) - len(end)) // len(piece)) + end


def members(form: bytes, count: int) -> bytes:
    return b",".join(form % number for number in range(count))


def each_body() -> Iterator[tuple[str, str, bytes]]:
    """What it is, path and content, one after the other, as they are large."""
    yield "valid messages", CHAT, fill(TO_THE_CHAT, MESSAGE + b",", MESSAGE + b"]}")
    yield "lists for messages", CHAT, fill(TO_THE_CHAT, b"[],", b"[]]}")
    parts = TO_THE_CHAT + b'{"role":"user","content":['
    yield "parts of one message", CHAT, fill(parts, TEXT_PART + b",", TEXT_PART + b"]}]}")
    yield "a long prompt", COMPLETIONS, fill(PROMPT + b'"', b"ab cd ", b'"}')
    yield "token ids", COMPLETIONS, fill(PROMPT + b"[", b"1,", b"1]}")
    yield "many prompts", COMPLETIONS, fill(PROMPT + b"[", b'"' + b"a b " * 4000 + b'",', b'"a"]}')
    yield "stop strings", COMPLETIONS, fill(PROMPT + b'"a","stop":[', b'"b",', b'"c"]}')
    biased = b'{"prompt":"a","max_tokens":40,"n":16,"ignore_eos":true,"logit_bias":{'
    yield "logit_bias", COMPLETIONS, biased + members(b'"%d":1', VOCAB_SIZE) + b"}}"
    yield "an unknown field", COMPLETIONS, fill(PROMPT + b'"a","', b"k", b'":1}')
    yield "unknown fields", COMPLETIONS, PROMPT + b'"a",' + members(b'"k%d":1', 10**6) + b"}"
    strings = b'{"return_token_strs":true,"prompt":"'
    yield "tokenize", "/tokenize", fill(strings, b"ab cd ", b'"}')
    yield "detokenize", "/detokenize", fill(b'{"tokens":[', b"1,", b"1]}")
    code = b'{"role":"user","content":"{% for i in range(10**9) %}x{% endfor %}"}]}'
    yield "a template's own code", CHAT, TO_THE_CHAT + code
    nested = b'],"chat_template_kwargs":{"messages":1,"a":' + b"[" * 200 + b"]" * 200 + b"}}"
    yield "chat_template_kwargs", CHAT, TO_THE_CHAT + MESSAGE + nested


SEVERAL = ("valid messages", "lists for messages", "a long prompt", "token ids", "logit_bias")
"""Sent ``AT_ONCE`` as well."""


def bodies(target: Target, verdict: Verdict) -> None:
    """Each body once, then some of them several at a time, then bodies that never end.

    Memory is counted from the second round on: threads and heaps that the first long bodies bring
    about stay.
    """
    one_round(target, verdict)
    before = calm_memory(target)
    one_round(target, verdict)
    unfinished(target, verdict)
    target.settle(verdict, before, "bodies", spare_mib=KEPT_MIB)


def one_round(target: Target, verdict: Verdict) -> None:
    for what, path, content in each_body():
        send(target, verdict, what, path, content, num_times=1)
        if what in SEVERAL:
            send(target, verdict, what, path, content, num_times=AT_ONCE)


def calm_memory(target: Target) -> dict[str, float]:
    """What each process holds, in MiB, once none gives any back."""
    now = target.memory()
    for _ in range(CALM_ROUNDS):
        time.sleep(5)
        before, now = now, target.memory()
        if all(now.get(name, 0) > before[name] - 1 for name in before):
            break
    return now


def send(
    target: Target, verdict: Verdict, what: str, path: str, content: bytes, *, num_times: int
) -> None:
    """Answers, seconds, and what a bystander noticed."""
    how = (
        f"{num_times} x {what}: {len(content)} bytes to {path}, {content[:80]!r}..{content[-40:]!r}"
    )
    start_s = time.monotonic()

    def one(_: int) -> Answer:
        return target.send("router", path, content, timeout_s=ANSWER_LIMIT_S)

    with Bystander(target) as bystander, ThreadPoolExecutor(num_times) as pool:
        answers = list(pool.map(one, range(num_times)))
        seconds = time.monotonic() - start_s
    for answer in answers:
        target.judge(verdict, answer, how)
    bystander.judge(verdict, how, limit_s=OTHERS_LIMIT_S)
    statuses = dict(Counter(answer.status for answer in answers))
    verdict.row(f"{num_times} x {what}", f"{statuses} in {seconds:.1f} s", *bystander.said())


def unfinished(target: Target, verdict: Verdict) -> None:
    """Bodies of which the last part never comes: they cost memory only within the budget, and are
    refused in time.
    """
    address = urllib.parse.urlsplit(target.router)
    head = (
        f"POST {COMPLETIONS} HTTP/1.1\r\nHost: {address.netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {BODY_BYTES}\r\n\r\n"
    )
    part = head.encode() + b'{"prompt":"' + b"a" * (BODY_BYTES - 2**20)

    def one(_: int) -> str:
        place = address.hostname or "", address.port or 0
        try:
            with socket.create_connection(place, timeout=120) as connection:
                connection.sendall(part)
                line = connection.recv(64).partition(b"\r\n")[0]
                return line.decode(errors="replace") or "closed"
        except OSError as error:
            return type(error).__name__

    start_s = time.monotonic()
    with Bystander(target) as bystander, ThreadPoolExecutor(NUM_UNFINISHED) as pool:
        statuses = Counter(pool.map(one, range(NUM_UNFINISHED)))
    how = f"{NUM_UNFINISHED} bodies of {len(part)} of {BODY_BYTES} bytes that never end"
    if statuses["TimeoutError"]:
        verdict.broke("a body that never ends is given up in 120 s", f"{how}: {dict(statuses)}")
    bystander.judge(verdict, how, limit_s=OTHERS_LIMIT_S)
    target.check_alive(verdict, how)
    ended = f"{dict(statuses)} in {time.monotonic() - start_s:.1f} s"
    verdict.row(f"{NUM_UNFINISHED} x unfinished", ended, *bystander.said())
