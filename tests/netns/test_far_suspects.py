"""A request of which a rank dies is told from others when rank 0 is on another host, and the
supervisor on a third host.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.test_suspects import POISON, SICK_RUNNER
from tests.netns.hosts import Network, new_network
from tests.netns.launch import far_launch

ROOT = Path(__file__).parents[2]
CONFIG = {
    "hosts": [{"name": "b"}, {"name": "c"}, {"name": "d"}],
    "both": {"replicas": 2, "tensor_parallel_size": 3, "hosts_per_engine": 3},
}


@pytest.fixture
def network() -> Iterator[Network]:
    with new_network("a", "b", "c", "d") as network:
        yield network


@pytest.mark.hosts_long
def test_a_request_that_kills_the_rank_of_another_host_fails_after_two_deaths(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rank 0, which knows what is computed, is on b.
    sick = network["c"].file("/tmp/sick")
    sick.mkdir()
    (sick / "sitecustomize.py").write_text(SICK_RUNNER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(("/tmp/sick", str(ROOT))))
    with far_launch(network, CONFIG, ["b", "c", "d"]) as launch:
        (answer,) = launch.ask({"prompt": [40, 41, POISON], "max_tokens": 5, "temperature": 0})
        assert "request_kills_engine" in str(answer)
        assert launch.output().count("on c was killed by SIGSEGV") == 2
