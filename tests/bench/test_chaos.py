"""``pdlaunch smoke --chaos`` compares answers with those of one engine alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pdlaunch.bench import chaos
from pdlaunch.bench.chaos import smoke_under_chaos, wrong_answers


def test_it_says_how_many_and_when_but_neither_prompt_nor_answer() -> None:
    sent = [("equal", 1.0), ("wrong", 1.5), ("error", 2.0)]
    said = "1 wrong; 1 error; wrong after 1.5 s; error after 2.0 s"
    assert wrong_answers(sent, exact=True) == said
    # In other dtypes greedy answers may differ.
    assert wrong_answers(sent, exact=False) == "1 error; error after 2.0 s"
    assert wrong_answers(sent[:1], exact=True) is None


class Router:
    """Answers every prompt with its sum; through pairs, ``damage`` is added to one answer."""

    url = "http://127.0.0.1:9"

    def __init__(self, damage: int = 0) -> None:
        self.damage, self.num_asked = damage, 0

    def engine(self, name: str) -> Router:
        return Router()

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.num_asked += 1
        added = self.damage if self.num_asked == 7 else 0
        return 200, {"choices": [{"token_ids": [sum(body["prompt"]) + added]}]}


@pytest.mark.parametrize(("damage", "failure"), [(0, None), (1, "1 wrong; wrong after 0.0 s")])
def test_a_wrong_answer_under_faults_is_told(
    monkeypatch: pytest.MonkeyPatch, damage: int, failure: str | None
) -> None:
    killed: list[str] = []
    totals = {"transfer_failures": 3, "leases_expired": 0, "router_engine_failures": 0}
    engines = [{"name": "prefill-0", "role": "prefill"}, {"name": "decode-0", "role": "decode"}]
    monkeypatch.setattr(chaos, "Api", lambda *_, **__: Router(damage))
    monkeypatch.setattr(chaos, "admin_api", lambda url: Router())
    monkeypatch.setattr(chaos, "engines_of", lambda admin: engines)
    monkeypatch.setattr(chaos, "await_idle", lambda admin, timeout_s: [])
    monkeypatch.setattr(chaos, "engine_totals", lambda admin: totals)
    monkeypatch.setattr(chaos, "kill_and_wait", lambda deployment, name, _: killed.append(name))
    monkeypatch.setattr(chaos.time, "sleep", lambda seconds: None)
    processes = {"prefill-0/rank-0": 1, "decode-0/rank-0": 2, "router": 3}
    deployment: Any = SimpleNamespace(url=Router.url, processes=lambda: processes)
    load, left, faults = smoke_under_chaos(deployment, 3, api_key=None, exact=True)
    assert load.failure == failure
    assert load.name.endswith("requests under faults end with the tokens of one engine alone")
    assert int(load.name.split()[0]) >= chaos.NUM_REQUESTS
    assert (left.failure, faults.failure, killed) == (None, None, ["decode-0/rank-0"])
