"""Compares the answers of a launch with those of one of its engines alone, and finds blocks and
requests that engines still hold.
"""

import time
from typing import Any

from pdlaunch.errors import PdlaunchError
from pdlaunch.http.headers import ROUTE_HEADER, WANTS_PAIR
from tests.e2e.client import Api, admin_api

NUM_TOKENS = 12
IDLE_TIMEOUT_S = 180.0
PROMPTS = (
    "Hello",
    "The capital of France is",
    "In the beginning there was a small machine that wanted to learn how to count.",
    # With vLLM, decode computes prompts of fewer than 64 tokens itself, so this one is longer.
    " ".join(f"{number} and {number + 1} make {2 * number + 1}." for number in range(40)),
)
MUST_BE_ZERO = (
    *("num_running", "num_waiting", "num_waiting_for_kv", "num_leased_requests"),
    *("num_leased_blocks", "num_quarantined_blocks"),
)
VLLM_MUST_BE_ZERO = (
    *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
)


def differences(url: str, api_key: str | None = None) -> list[str]:
    """Faults of a launch in float32: answers of pairs and of engines of role both that differ from
    those of one engine alone, with cold and warm prefix caches; and blocks that are not freed.
    """
    admin = admin_api(url)
    engines = {each["name"]: each["role"] for each in engines_of(admin)}
    # One engine alone moves no KV blocks.
    reference = min(engines, key=lambda name: engines[name] != "decode")
    asked = {"the router": Api(url, api_key, headers={ROUTE_HEADER: WANTS_PAIR})}
    both = [name for name, role in engines.items() if role == "both" and name != reference]
    asked |= {name: admin.engine(name) for name in both}
    found = []
    for prompt in PROMPTS:
        alone = _tokens(admin.engine(reference), prompt, cache_salt="alone")
        for name, api in asked.items():
            if any(_tokens(api, prompt) != alone for _ in range(2)):
                found.append(f"{name} does not answer {prompt[:20]!r} as {reference} alone")
    return found + await_idle(admin, timeout_s=IDLE_TIMEOUT_S)


def _tokens(api: Api, prompt: str, **fields: Any) -> list[int]:
    body = {"prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "return_token_ids": True}
    status, answer = api.post("/v1/completions", body | fields)
    assert status == 200, answer
    return answer["choices"][0]["token_ids"]


def engines_of(router: Api) -> list[dict[str, Any]]:
    """Name, role, kind and state of each engine of a router, without failed engines."""
    status, answer = router.get_object("/pdlaunch/status")
    if status != 200:
        raise PdlaunchError(f"{router.url} does not list its engines: HTTP {status}: {answer}")
    return [engine for engine in answer["engines"] if engine["state"] != "failed"]


def await_idle(admin: Api, *, timeout_s: float) -> list[str]:
    """Wait until engines hold no request and no block; after ``timeout_s``, return what is left."""
    deadline_at = time.monotonic() + timeout_s
    while True:
        try:
            left = _left(admin)
        except PdlaunchError as error:
            left = [str(error)]
        if not left or time.monotonic() > deadline_at:
            return left
        time.sleep(0.2)


def _left(admin: Api) -> list[str]:
    of_vllm = {engine["name"] for engine in engines_of(admin) if engine.get("kind") == "vllm"}
    left = [
        f"{name}: {metric} is {value:g}"
        for name in of_vllm
        for metric in VLLM_MUST_BE_ZERO
        if (value := admin.engine(name).metrics()[metric])
    ]
    status, answer = admin.get_object("/pdlaunch/integrity")
    if "engines" not in answer:
        raise PdlaunchError(f"the router does not tell its engines: HTTP {status}: {answer}")
    for report in answer["engines"]:
        engine = report["engine"]
        if engine in of_vllm:
            continue
        if not report.get("ok"):
            left.append(f"{engine}: {report.get('error')}")
            continue
        stats = report["stats"]
        left += [f"{engine}: {name} is {stats[name]}" for name in MUST_BE_ZERO if stats[name]]
        free, total = stats["num_free_blocks"], stats["num_blocks"]
        if free != total:
            left.append(f"{engine}: {free} of {total} blocks are free")
    return left
