"""Every request field with extreme values, alone and in combinations, at the router and at each
engine.
"""

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pdlaunch.protocol.openai.body import RequestBody
from pdlaunch.protocol.openai.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
)
from tests.attacks.target import CHAT, COMPLETIONS, VOCAB_SIZE, Target
from tests.attacks.verdict import Verdict

FORMS: dict[str, type[RequestBody]] = {
    COMPLETIONS: CompletionRequest,
    CHAT: ChatCompletionRequest,
    "/tokenize": TokenizeCompletionRequest,
    "/detokenize": DetokenizeRequest,
}
STRANGE_FIELDS = ("", "\0", "tools", "tool_choice", "unknown", "kv_transfer_params.pdlaunch")
BASES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "Hello world", "max_tokens": 3, "temperature": 0.7},
    CHAT: {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "temperature": 0.7},
    "/tokenize": {"prompt": "Hello world"},
    "/detokenize": {"tokens": [72, 105]},
}

VALUES: list[Any] = [
    *json.loads(r"""[
        0, -1, 1, 2, 1.5, -0.0, 5e-324, 1e-320, 1e-300, 1e-38, 1e-10, 1e38, 3.5e38, 1e300,
        1.7976931348623157e308, 2147483647, 2147483648, 4294967296, 9007199254740993,
        9223372036854775807, 9223372036854775808, 18446744073709551616, 1000000000000000000000000,
        -2147483648, -9223372036854775808, -18446744073709551616,
        null, true, false, "", "a", "1", "\u0000", "\u202e\ud83d\ude00\ufffe",
        "{{ cycler }}", "{% for i in range(9) %}",
        [], {}, [[]], [null], [1], ["a"], [""], [{}], [-1], [2147483648], [9223372036854775808],
        {"a": 1}, {"0": 1}, {"-1": 5}, {"1": 1000}, {"1": "x"}, {"1": null}, {"1e2": 1},
        {"\u0661": 1}, {" 1": 1}, {"1_0": 1}, {"2147483648": 5},
        [{"role": "user"}], [{"role": "x", "content": 5}],
        {"include_usage": true}, {"include_usage": "x"}, {"do_remote_decode": true},
        {"choices": [[]]}, {"type": "json_object"}
    ]"""),
    *([VOCAB_SIZE - 1], [VOCAB_SIZE], {str(VOCAB_SIZE - 1): -100}, {str(VOCAB_SIZE): 5}),
    *("x" * 5000, ["a"] * 33, [0] * 5000, {str(token): -100 for token in range(300)}),
    [{"role": "user", "content": [{"type": "text", "text": "a"}] * 50}],
]
"""Values that any field may be given."""
RAW: list[bytes] = [
    *rb"""NaN Infinity -Infinity 1e999 -1e999 1e-999 00 +1 0x1 tru 'a' /*c*/1 "\ud800" """.split(),
    *(b"1 1", b'"\xff\xfe"', b"\xef\xbb\xbf1"),
    *(b"1" * 5000, b"1." + b"1" * 5000, b"1e-" + b"9" * 400),
    *(b"[" * 900 + b"]" * 900, b"[" * 9000 + b"]" * 9000, b'{"a":' * 900 + b"1" + b"}" * 900),
]
"""JSON that a serializer would not write."""

LEGAL: dict[str, tuple[object, ...]] = {
    "temperature": (0, 5e-324, 1e-38, 1e-6, 0.01, 0.7, 1, 2, 1e38, 1e300),
    "top_p": (5e-324, 1e-38, 1e-9, 0.5, 0.999999999, 1),
    "top_k": (-1, 0, 1, 2, VOCAB_SIZE, 2**31 - 1),
    "min_p": (0, 5e-324, 1e-9, 0.5, 1),
    "repetition_penalty": (5e-324, 1e-300, 1e-38, 1e-3, 0.5, 1, 2, 1e3, 1e38, 1e300),
    "presence_penalty": (-2, 0, 2),
    "frequency_penalty": (-2, 0, 2),
    "logit_bias": (
        {},
        {"0": 100, "1": -100},
        {str(token): -100 for token in range(300)},
        {str(token): 100 for token in range(0, VOCAB_SIZE, 200)},
    ),
    "seed": (None, 0, -1, 2**63 - 1, -(2**63) + 1),
    "n": (1, 2, 5, 16),
    "max_tokens": (1, 2, 3, 17),
    "min_tokens": (0, 1),
    "ignore_eos": (False, True),
    "stop": ("", "a", ["a", "b"], ["\u0000"], ["x" * 1000] * 32),
    "stop_token_ids": ([], [0], list(range(128))),
    "include_stop_str_in_output": (False, True),
    "skip_special_tokens": (False, True),
    "stream": (False, True),
    "return_token_ids": (False, True),
    "cache_salt": ("", "x" * 1024, "\u0000"),
}
"""Values at the edge of what is accepted; combinations of these are what kills."""
LEGAL_HERE: dict[str, dict[str, tuple[object, ...]]] = {
    COMPLETIONS: {
        "logprobs": (None, 0, 1, 20),
        "prompt": ("a", "", "Hello " * 150, [1, 2, 3], [[5], [6, 7]], ["a", "b"]),
    },
    CHAT: {
        "logprobs": (False, True),
        "top_logprobs": (0, 20),
        "messages": (
            [{"role": "user", "content": "a"}],
            [
                {"role": "system", "content": "b" * 500},
                {"role": "user", "content": [{"type": "text", "text": "c"}]},
            ],
            [{"role": "user", "content": "{{ 1 }}"}] * 40,
        ),
    },
}


@dataclass(frozen=True)
class Case:
    who: str
    path: str
    body: bytes
    what: str

    def __str__(self) -> str:
        body = self.body if len(self.body) <= 400 else self.body[:200] + b" .. " + self.body[-200:]
        return f"{self.who} {self.path} ({self.what}) {body!r}"


def fuzz(target: Target, verdict: Verdict, num_requests: int, seed: int) -> None:
    """Send that many cases, half of them single fields, one after the other: what dies, died of the
    last one.
    """
    source = random.Random(seed)
    before = target.memory()
    statuses: Counter[tuple[str, int]] = Counter()
    slowest_s, slowest = 0.0, "none"
    for case in choose(source, [*target.urls], num_requests):
        answer = target.send(case.who, case.path, case.body)
        target.judge(verdict, answer, str(case))
        statuses[case.who, answer.status] += 1
        if answer.seconds > slowest_s:
            slowest_s, slowest = answer.seconds, str(case)
    target.settle(verdict, before, f"fuzz, {num_requests} requests, seed {seed}")
    for who in target.urls:
        found = {status: count for (name, status), count in sorted(statuses.items()) if name == who}
        verdict.row(f"fuzz of {who}", f"{sum(found.values())} requests", f"statuses {found}")
    verdict.row("slowest", f"{slowest_s:.1f} s", slowest[:150])


def choose(source: random.Random, names: list[str], num_requests: int) -> Iterator[Case]:
    """A shuffled mix: half single fields (all of them when there is room), the rest
    combinations.
    """
    singles = [case for who in names for case in single_fields(who)]
    source.shuffle(singles)
    singles = singles[: num_requests // 2]
    cases = singles + [
        combination(source, source.choice(names)) for _ in range(num_requests - len(singles))
    ]
    source.shuffle(cases)
    yield from cases


def single_fields(who: str) -> Iterator[Case]:
    for path, form in FORMS.items():
        neutral = getattr(form, "NEUTRAL", {})
        names = dict.fromkeys(
            [*form.model_fields, *neutral, *STRANGE_FIELDS, *TokenizeChatRequest.model_fields]
        )
        for name in names:
            rest = {key: value for key, value in BASES[path].items() if key != name}
            for value in VALUES:
                yield Case(who, path, json.dumps(rest | {name: value}).encode(), name)
            start, _, end = json.dumps(rest | {name: "raw"}).encode().rpartition(b'"raw"')
            for raw in RAW:
                yield Case(who, path, start + raw + end, f"{name}, raw")


def combination(source: random.Random, who: str) -> Case:
    path = source.choice((COMPLETIONS, CHAT))
    choices = LEGAL | LEGAL_HERE[path]
    names = source.sample(sorted(choices), source.randint(2, 8))
    body = BASES[path] | {name: source.choice(choices[name]) for name in names}
    return Case(who, path, json.dumps(body).encode(), "combination")
