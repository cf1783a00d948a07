"""Launches of the demo model over several hosts, with what the network and the hosts may do to
them: the tokens are those of one host, whatever happens.
"""

import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pdlaunch.checks.probed import is_slow
from pdlaunch.protocol.control import MODEL_CHANGED
from tests.e2e.tiny_models import make_tiny_model
from tests.e2e.waiting import await_true
from tests.netns.hosts import Host, Network, new_network
from tests.netns.launch import FarLaunch, far_launch, wait_for
from tests.netns.stranger import Seen

TRUSTED = {"trusted_network": True, "pull_timeout_s": 5}
HERE, THERE = {"name": "local", "roles": "prefill"}, {"name": "b", "roles": "decode"}
FIRST_DATA_PORT, LAST_DATA_PORT = 21000, 21999
# A host that falls over is noticed after one and a half times this.
PAIR = {"kv_transfer": TRUSTED, "hosts": [HERE, THERE], "agent_timeout_s": 10}
NUM_QUESTIONS = 6
NUM_TOKENS = 12
QUESTIONS = [
    {
        "prompt": f"Line {index}: " + "the river runs from the hills to the sea and " * 12,
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "return_token_ids": True,
    }
    for index in range(NUM_QUESTIONS)
]


@pytest.fixture(scope="module")
def pair() -> Iterator[FarLaunch]:
    with new_network("a", "b", "stranger") as network, far_launch(network, PAIR, ["b"]) as launch:
        yield launch


@pytest.fixture(scope="module")
def expected(pair: FarLaunch) -> list[list[int]]:
    """The tokens of a prefill engine alone, which pulls nothing."""
    return tokens_of(pair.ask_alone("prefill-0", *fresh("alone")))


def fresh(name: str) -> list[dict[str, Any]]:
    """The questions, in a part of the prefix caches of their own: KV blocks move anew."""
    return [question | {"cache_salt": name} for question in QUESTIONS]


def tokens_of(answers: Sequence[Any]) -> list[list[int]]:
    assert not [answer for answer in answers if isinstance(answer, str)]
    return [answer["choices"][0]["token_ids"] for answer in answers]


def judge(answers: Sequence[Any], expected: Sequence[list[int]]) -> int:
    """No answer is wrong, and none is missing; return how many are whole and right."""
    assert "stuck" not in answers
    whole = [
        (answer["choices"][0]["token_ids"], tokens)
        for answer, tokens in zip(answers, expected, strict=True)
        if not isinstance(answer, str)
    ]
    for answer, tokens in whole:
        assert answer == tokens
    return len(whole)


def pulled_bytes(launch: FarLaunch, path: str = "nixl/UCX") -> float:
    """Bytes that decode has pulled on a path, as the router's metrics count them."""
    return sum(
        float(line.rpartition(" ")[2])
        for line in launch.get("/metrics").splitlines()
        if line.startswith("pdlaunch_kv_pull_bytes_sum") and f'path="{path}"' in line
    )


def asked_meanwhile(
    launch: FarLaunch, questions: list[dict[str, Any]], disturb: Callable[[], None]
) -> list[Any]:
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(launch.ask, *questions)
        disturb()
    return answers.result()


def under_way(launch: FarLaunch) -> None:
    before = launch.network.num_bytes("a", "b")
    wait_for(
        lambda: launch.network.num_bytes("a", "b") > before + (1 << 18), launch, "nothing moves"
    )


def pulls_again(launch: FarLaunch, name: str) -> None:
    """Blocks move again: after pulls that took too long their pair rests for a while."""
    salts = (f"{name} {number}" for number in itertools.count())

    def moves() -> bool:
        before = pulled_bytes(launch)
        launch.ask(*fresh(next(salts)))
        return pulled_bytes(launch) > before

    wait_for(moves, launch, "no block moves")


def serves_again(launch: FarLaunch, name: str, expected: list[list[int]]) -> None:
    wait_for(
        lambda: judge(launch.ask(*fresh(name)), expected) == NUM_QUESTIONS, launch, "no answers"
    )


def serves_over(launch: FarLaunch, path: str = "nixl/UCX") -> None:
    """Answers are right, and KV blocks for them have gone from a to b on this path."""
    assert {each["path"].split()[0] for each in launch.status()["pairs"]} == {path}
    alone = tokens_of(launch.ask_alone("prefill-0", *fresh("alone")))
    pulled, passed = pulled_bytes(launch, path), launch.network.num_bytes("a", "b")
    assert judge(launch.ask(*fresh("together")), alone) == NUM_QUESTIONS
    pulled = pulled_bytes(launch, path) - pulled
    assert pulled > 1 << 20
    assert launch.network.num_bytes("a", "b") - passed > pulled


def test_blocks_go_over_the_network(pair: FarLaunch) -> None:
    serves_over(pair)


def test_a_slow_network_is_told(pair: FarLaunch) -> None:
    """The pair was measured over its own path when it shook hands."""
    (measured,) = pair.status()["pairs"]
    assert measured["gigabytes_per_s"] > 0
    assert ("PD504" in pair.output()) is is_slow(measured["gigabytes_per_s"], "hosts")


def test_what_listens_is_documented_and_closed_to_strangers(pair: FarLaunch) -> None:
    """docs/hosts.md: HTTP over TLS that asks for the token, ZMQ with CURVE, and data ports."""
    expected = {
        ("a", "supervisor"): ["curve 0"],
        ("a", "prefill-0"): ["tls 401"],
        ("a", "prefill-0/rank-0"): ["curve 0", "data"],
        ("b", "decode-0"): ["tls 401"],
        ("b", "decode-0/rank-0"): ["curve 0", "data"],
    }
    # A door that answers slowly looks open.
    await_true(
        lambda: doors_of(pair.network) == expected, lambda: f"{doors_of(pair.network)} is right"
    )


def doors_of(network: Network) -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    for name in ("a", "b"):
        host = network[name]
        listening = [each for each in host.listening() if not each.address.startswith("127.")]
        assert {each.address for each in listening} == {host.address}
        doors = knock(network["stranger"], host.address, [each.port for each in listening])
        for each in listening:
            door = doors[each.port]
            kind = f"{door.kind} {door.status}"
            if door.kind == "open" and FIRST_DATA_PORT <= each.port <= LAST_DATA_PORT:
                kind = "data"
            where = "supervisor" if " serve " in f" {each.process} " else each.process
            found.setdefault((name, where), []).append(kind)
    return {where: sorted(kinds) for where, kinds in found.items()}


def knock(stranger: Host, address: str, ports: Sequence[int]) -> dict[int, Seen]:
    said = stranger.run(
        sys.executable, "-m", "tests.netns.stranger", address, *map(str, ports), timeout_s=240
    )
    return {seen.port: seen for seen in (Seen(**each) for each in json.loads(said))}


def test_a_bad_network_costs_time_alone(pair: FarLaunch, expected: list[list[int]]) -> None:
    pair.network.set_link("b", loss=0.01, delay_s=0.01, bytes_per_s=2e7)
    try:
        assert judge(pair.ask(*fresh("bad network")), expected) == NUM_QUESTIONS
    finally:
        pair.network.set_link("b")


def test_a_cut_leaves_nothing_wrong_and_nothing_stuck(
    pair: FarLaunch, expected: list[list[int]]
) -> None:
    def cut() -> None:
        under_way(pair)
        pair.network.set_link("b", is_cut=True)
        time.sleep(4)
        pair.network.set_link("b")

    pulls_again(pair, "before the cut")
    judge(asked_meanwhile(pair, fresh("cut"), cut), expected)
    serves_again(pair, "after", expected)


def test_a_host_that_falls_over_takes_no_answer_along(
    pair: FarLaunch, expected: list[list[int]]
) -> None:
    """The last one of these: what is left of the pair serves alone."""

    def fall() -> None:
        under_way(pair)
        pair.network["b"].kill()

    pulls_again(pair, "before the fall")
    judge(asked_meanwhile(pair, fresh("fall"), fall), expected)
    serves_again(pair, "on one host", expected)


@pytest.mark.hosts_long
def test_two_by_two_over_two_hosts(network: Network) -> None:
    """Pairs answer as one engine alone, which is asked over TLS."""
    config = {
        "kv_transfer": TRUSTED,
        "hosts": ["local", "b"],
        "placement_strategy": "spread",
        "prefill": {"replicas": 2},
        "decode": {"replicas": 2},
    }
    with far_launch(network, config, ["b"]) as launch:
        engines = launch.status()["engines"]
        assert {engine["url"].partition(":")[0] for engine in engines} == {"https"}
        places = {engine["name"]: engine["host"] for engine in engines}
        assert sorted(places.values()) == ["b", "b", "local", "local"]
        for name, host in places.items():
            assert f"{name}{'' if host == 'local' else ' on b'}: ready" in launch.output()
        assert launch.differences() == []
        before = network.num_bytes("a", "b") + network.num_bytes("b", "a")
        alone = tokens_of(launch.ask_alone("prefill-0", *fresh("alone")))
        assert judge(launch.ask(*fresh("together")), alone) == NUM_QUESTIONS
        assert network.num_bytes("a", "b") + network.num_bytes("b", "a") > before + (1 << 20)


def test_a_host_with_other_weights_at_the_same_path_is_refused() -> None:
    with (
        tempfile.TemporaryDirectory(dir="/var/tmp") as folder,
        new_network("a", "b") as network,
    ):
        own, other = (
            make_tiny_model("llama", Path(folder) / str(seed), seed=seed) for seed in (1, 2)
        )
        network["b"].run("mount", "--bind", str(other), str(own))
        # Its rank becomes ready first, or the handshake comes before.
        refusal = f"{MODEL_CHANGED}: model.safetensors .SHA-256|model_digest: decode-0/rank-0 has"
        with (
            pytest.raises(AssertionError, match=refusal) as failed,
            far_launch(network, PAIR | {"model": str(own)}, ["b"]),
        ):
            pass
        assert "fix:" not in str(failed.value), "the message says what to do"
