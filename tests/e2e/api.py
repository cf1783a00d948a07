"""Small calls that the end-to-end tests share."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def post(url: str, path: str, body: dict[str, Any], timeout_s: float = 120.0) -> tuple[int, dict[str, Any]]:
    """Status and JSON body."""
    request = urllib.request.Request(
        url + path, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def get(url: str, path: str) -> str:
    with urllib.request.urlopen(url + path, timeout=30) as response:
        return response.read().decode()


def complete(url: str, prompt: list[int], num_tokens: int, **fields: Any) -> list[int]:
    """Token ids of a greedy completion of exactly ``num_tokens``."""
    body = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    status, answer = post(url, "/v1/completions", body | fields)
    assert status == 200, answer
    return answer["choices"][0]["token_ids"]


def complete_all(url: str, prompts: list[list[int]], num_tokens: int, concurrency: int) -> list[list[int]]:
    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(lambda prompt: complete(url, prompt, num_tokens), prompts))


def metrics(url: str) -> dict[str, float]:
    """Samples of ``/metrics``; labels stay in the name."""
    lines = [line for line in get(url, "/metrics").splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def total(samples: dict[str, float], name: str) -> float:
    """Sum of a metric over its labels."""
    return sum(value for sample, value in samples.items() if sample.split("{")[0] == name)
