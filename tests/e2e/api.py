"""Small calls that the end-to-end tests share."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pdlaunch.client.api import Api
from pdlaunch.client.smoke import engines_of, leftovers


def complete(url: str, prompt: list[int], num_tokens: int, **fields: Any) -> list[int]:
    """Token ids of a greedy completion of exactly ``num_tokens``."""
    body = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    status, answer = Api(url).post("/v1/completions", body | fields)
    assert status == 200, answer
    return answer["choices"][0]["token_ids"]


def complete_all(url: str, prompts: list[list[int]], num_tokens: int, concurrency: int, **fields: Any) -> list[list[int]]:
    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(lambda prompt: complete(url, prompt, num_tokens, **fields), prompts))


def engine_apis(url: str) -> list[Api]:
    return [Api(engine["url"]) for engine in engines_of(Api(url))]


def engine_total(url: str, name: str) -> float:
    """Sum of a metric over all engines."""
    return sum(api.metrics()[f"pdlaunch_{name}"] for api in engine_apis(url))


def idle(url: str) -> bool:
    """No engine has a request, a leased or a quarantined block."""
    return not any(value for api in engine_apis(url) for value in leftovers(api).values())
