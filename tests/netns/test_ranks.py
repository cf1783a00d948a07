"""Ranks on two hosts move KV blocks over the network between them: what listens, what a broken
network does, and that nothing is open without a trusted one.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import numpy as np
import psutil
import pytest

from pdlaunch.machine.host import find_libraries
from pdlaunch.protocol.control import PairFailed, PairReady
from pdlaunch.protocol.sockets import LaunchKeys, new_launch_keys
from pdlaunch.protocol.transfer import PullDrained, PullFinished
from tests.netns.far_rank import PORTS, FarRank, far_rank
from tests.netns.hosts import Listening, Network, new_network
from tests.transfer.rank_process import grant, pull

FIRST, LAST = map(int, PORTS.split("-"))
NUM_BLOCKS = 48
BYTES = NUM_BLOCKS * 3 * 8 * 2 * 16 * 64 * 4
PROBE = """
import socket, sys
for port in map(int, sys.argv[2:]):
    with socket.create_connection((sys.argv[1], port), timeout=20) as probe:
        probe.sendall(b"\\xff" + bytes(8) + b"\\x7f\\x03")
        probe.settimeout(4)
        answer = b""
        try:
            while len(answer) < 64 and (chunk := probe.recv(64 - len(answer))):
                answer += chunk
        except OSError:
            pass
        print(port, answer[12:32].rstrip(b"\\0").decode(errors="replace") or "open")
"""
"""Greets ports as ZMQ does; one with CURVE says so."""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Network]:
    with new_network("a", "b", "stranger") as network:
        yield network


@pytest.fixture(autouse=True)
def healed(hosts: Network) -> Iterator[None]:
    yield
    for name in ("a", "b"):
        hosts.set_link(name)


@contextlib.contextmanager
def two_ranks(
    hosts: Network, *, is_trusted: bool = True, is_ipv6: bool = False, **transfer: object
) -> Iterator[tuple[FarRank, FarRank]]:
    """Prefill on a, decode on b."""
    keys: LaunchKeys = new_launch_keys()
    network = {"is_trusted": is_trusted, "is_ipv6": is_ipv6}
    with (
        far_rank(hosts["a"], "prefill", keys, **network, **transfer) as holder,
        far_rank(hosts["b"], "decode", keys, **network, **transfer) as puller,
    ):
        puller.call("registry", [holder.entry()])
        yield holder, puller


@pytest.fixture(scope="module", params=["nixl", "mooncake"])
def pair(request: pytest.FixtureRequest, hosts: Network) -> Iterator[tuple[FarRank, FarRank]]:
    if request.param == "mooncake":
        libraries = find_libraries()
        if not libraries.mooncake or libraries.missing_for_mooncake:
            pytest.skip(f"mooncake: {libraries.missing_for_mooncake or 'not installed'}")
    with two_ranks(hosts, connector=request.param) as pair:
        pair[1].report(PairReady)
        yield pair


def moved(pair: tuple[FarRank, FarRank], name: str, **options: float) -> PullFinished:
    """Pull blocks under a name; what has come is what was there."""
    holder, puller = pair
    there, here = list(range(NUM_BLOCKS)), list(range(NUM_BLOCKS))[::-1]
    holder.submit(grant(name, there, salt=name))
    puller.submit(pull(name, holder.remote(name), here, salt=name, **options))
    finished = puller.event(PullFinished)
    if finished.ok:
        np.testing.assert_array_equal(puller.blocks(here), holder.blocks(there))
    return finished


def listening_on(network: Network, name: str) -> list[Listening]:
    return sorted(network[name].listening(), key=lambda each: each.port)


def test_blocks_go_over_the_network(hosts: Network, pair: tuple[FarRank, FarRank]) -> None:
    before = hosts.num_bytes("a", "b"), hosts["b"].received_bytes()
    finished = moved(pair, "plain")
    assert finished.ok, finished.error
    assert finished.num_bytes == BYTES
    assert finished.path in ("nixl/UCX", "mooncake/tcp")
    assert hosts.num_bytes("a", "b") - before[0] > BYTES
    assert hosts["b"].received_bytes() - before[1] > BYTES


def test_only_data_ports_ask_nobody(hosts: Network, pair: tuple[FarRank, FarRank]) -> None:
    """Each rank listens at its side channel, which speaks CURVE, and at data ports of the range."""
    is_mooncake = pair[0].options.spec.kv_transfer.connector == "mooncake"
    for name in ("a", "b"):
        address = hosts[name].address
        found = listening_on(hosts, name)
        assert is_mooncake or {each.address for each in found} == {address}
        ports = [str(each.port) for each in found]
        answers = hosts["stranger"].run(sys.executable, "-c", PROBE, address, *ports)
        told = dict(line.split() for line in answers.splitlines())
        is_open = {int(port) for port, mechanism in told.items() if mechanism != "CURVE"}
        assert {port for port in is_open if not FIRST <= port <= LAST} == set()
        assert len(is_open) == (2 if is_mooncake else 1)
        assert len(found) - len(is_open) == 1, "the side channel"


@pytest.mark.parametrize(
    "link",
    [{"loss": 0.02}, {"delay_s": 0.03}, {"loss": 0.01, "delay_s": 0.01, "bytes_per_s": 2e7}],
    ids=["loss", "delay", "both, and slow"],
)
def test_a_bad_network_costs_time_alone(
    hosts: Network, pair: tuple[FarRank, FarRank], link: dict[str, float]
) -> None:
    hosts.set_link("a", **link)
    finished = moved(pair, f"bad {link}")
    assert finished.ok, finished.error


def test_a_cut_ends_the_pull_and_no_block_is_lost(
    hosts: Network, pair: tuple[FarRank, FarRank]
) -> None:
    """The pull gives up in time; its blocks come back once nothing can write to them any more."""
    puller = pair[1]
    hosts.set_link("a", bytes_per_s=1e6)  # it is under way when the link is cut
    holder = pair[0]
    holder.submit(grant("cut", list(range(NUM_BLOCKS)), salt="cut"))
    blocks = list(range(NUM_BLOCKS))
    puller.submit(pull("cut", holder.remote("cut"), blocks, salt="cut", timeout_s=4))
    received = hosts["b"].received_bytes()
    while hosts["b"].received_bytes() < received + 300_000:
        pass
    hosts.set_link("a", is_cut=True)
    finished = puller.event(PullFinished)
    assert not finished.ok
    hosts.set_link("a")
    if finished.in_flight:
        puller.event(PullDrained)
    again = moved(pair, "healed")
    if not again.ok:  # its connection has ended: the next handshake makes another
        puller.report(PairReady)
        again = moved(pair, "healed again")
    assert again.ok, again.error


def test_nothing_is_open_on_a_network_that_is_not_trusted(network: Network) -> None:
    with two_ranks(network, is_trusted=False) as (holder, puller):
        failed = puller.report(PairFailed)
        assert "p2p" in failed.error
        for name, rank in (("a", holder), ("b", puller)):
            assert rank.endpoint.startswith(f"tcp://{network[name].address}:")
            assert [
                f"tcp://{each.address}:{each.port}" for each in listening_on(network, name)
            ] == [rank.endpoint]


def test_addresses_of_ipv6(network: Network) -> None:
    with two_ranks(network, is_ipv6=True) as pair:
        pair[1].report(PairReady)
        finished = moved(pair, "six")
        assert finished.ok, finished.error
        for name in ("a", "b"):
            assert {each.address for each in listening_on(network, name)} == {
                network[name].address6
            }


def test_holder_that_dies_in_the_middle_is_noticed(network: Network) -> None:
    with two_ranks(network) as pair:
        holder, puller = pair
        puller.report(PairReady)
        assert moved(pair, "before").ok
        network.set_link("a", bytes_per_s=1e6)
        holder.submit(grant("late", list(range(NUM_BLOCKS)), salt="late"))
        puller.submit(
            pull("late", holder.remote("late"), list(range(NUM_BLOCKS)), salt="late", timeout_s=30)
        )
        received = network["b"].received_bytes()
        while network["b"].received_bytes() < received + 300_000:
            pass
        for process in network["a"].processes():
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended with its parent
                process.kill()
        network.set_link("a")
        puller.call("registry", [])
        finished = puller.event(PullFinished)
        assert not finished.ok
        if finished.in_flight:
            puller.event(PullDrained)
