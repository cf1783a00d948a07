"""Collects all that a launch writes about its requests. It may not contain prompts or answers."""

import json
import re
import urllib.parse
import urllib.request
from collections.abc import Iterable

from pdlaunch.launch.client.api import read_requests, reading_api
from tests.e2e.client import Api, Deployment

SHORTEST = 12
"""In characters: shorter parts of an answer could be found by chance."""


def told_by(deployment: Deployment) -> dict[str, str]:
    """Place -> text: logs, terminal, requests, traces, the page's data, metrics."""
    url = deployment.url
    logs = [path for path in deployment.log_dir.rglob("*") if path.is_file()]
    told = {path.name: path.read_text(errors="replace") for path in logs}
    told["terminal"] = deployment.output()
    told["traces"] = "".join(
        Api(url).get(f"/pdlaunch/requests/{urllib.parse.quote(request_id, safe='')}")[1]
        for request_id in [one.id for one in read_requests(reading_api(url, None), "last", 500)]
    )
    for path in ("/pdlaunch/requests?last=500", "/pdlaunch/status", "/metrics"):
        told[path] = Api(url).get(path)[1]
    return told


def places_of(told: dict[str, str], texts: Iterable[str]) -> list[tuple[str, str]]:
    """Places with lines of the texts, plain or as JSON. (Logs would escape newlines.)"""
    parts = {part for text in texts for part in text.split("\n") if len(part) >= SHORTEST}
    assert parts
    parts |= {json.dumps(part)[1:-1] for part in parts}
    return [(place, part) for place, text in told.items() for part in parts if part in text]


def places_of_ids(told: dict[str, str], token_ids: Iterable[list[int]]) -> list[tuple[str, str]]:
    """Places with three consecutive token ids, with any separators."""
    rows = {
        rf"\b{first}\D{{1,3}}{second}\D{{1,3}}{third}\b"
        for ids in token_ids
        for first, second, third in zip(ids, ids[1:], ids[2:], strict=False)
    }
    found = re.compile("|".join(sorted(rows)))
    return [(place, match[0]) for place, text in told.items() if (match := found.search(text))]
