"""Routes by load, with real engines: whoever computes a prompt, the tokens are the model's own."""

from __future__ import annotations

import json
import random
import urllib.request
from pathlib import Path
from typing import Any

from pdlaunch.http.headers import ROUTE_HEADER
from pdlaunch.launch.client.deployment import running_deployment
from tests.e2e.api import complete_all
from tests.e2e.conftest import default_environ
from tests.e2e.tiny_models import VOCAB_SIZE, greedy, make_tiny_model

ARGUMENTS = ("--dtype", "float32", "--kv-cache-memory", "16MiB", "--max-num-batched-tokens", "64")


def ask(url: str, prompt: list[int], **headers: str) -> tuple[str, list[int]]:
    """Return the route and the tokens of a greedy answer."""
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
    request = urllib.request.Request(
        url + "/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"} | headers,
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer: dict[str, Any] = json.load(response)
        return response.headers[ROUTE_HEADER], answer["choices"][0]["token_ids"]


def test_every_route_gives_the_tokens_of_the_model(tmp_path: Path) -> None:
    model, rng = make_tiny_model("llama", tmp_path), random.Random(3)
    prompts = [[rng.randrange(3, VOCAB_SIZE) for _ in range(20 + 9 * i)] for i in range(12)]
    expected = greedy(model, prompts, 24)
    with running_deployment(
        ("--model", str(model), *ARGUMENTS), environ=default_environ()
    ) as deployment:
        url = deployment.url
        assert complete_all(url, prompts, 24, concurrency=12) == expected
        route, tokens = ask(url, prompts[0])
        assert "; kind=" in route
        assert tokens == expected[0][:8]
        route, tokens = ask(url, prompts[1], **{ROUTE_HEADER: "pair"})
        assert route.startswith("prefill-0")
        assert tokens == expected[1][:8]
        with urllib.request.urlopen(f"{url}/metrics", timeout=60) as response:
            page = response.read().decode()
        routed = [
            float(line.rpartition(" ")[2])
            for line in page.splitlines()
            if line.startswith("pdlaunch_router_routes_total{")
        ]
        assert sum(routed) == len(prompts) + 2
