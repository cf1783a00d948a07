"""Launches over hosts on networks of other kinds: IPv6 alone, behind firewalls, with Mooncake. The
tokens are those of one host.
"""

from urllib.parse import urlsplit

import pytest

from tests.mooncake import mooncake_problem
from tests.netns.hosts import Network
from tests.netns.launch import PORT, far_launch
from tests.netns.switch import DEVICE
from tests.netns.test_launch import (
    FIRST_DATA_PORT,
    HERE,
    LAST_DATA_PORT,
    THERE,
    TRUSTED,
    serves_over,
)

pytestmark = pytest.mark.hosts_long
CONTROL_PORT = 7070
CHOSEN_PORTS = (32768, 60999)
"""Ports that Linux gives out; docs/hosts.md and the rendered NetworkPolicies name them."""
CONFIG = {"kv_transfer": TRUSTED, "hosts": [HERE, THERE]}


def test_hosts_with_addresses_of_ipv6_alone(network: Network) -> None:
    for host in network.hosts:
        host.run("ip", "-4", "addr", "flush", "dev", DEVICE)
    config = CONFIG | {"control_address": network["a"].address6}
    with far_launch(network, config, ["b"]) as launch:
        urls = {engine["name"]: urlsplit(engine["url"]) for engine in launch.status()["engines"]}
        assert {(name, url.scheme, url.hostname) for name, url in urls.items()} == {
            ("prefill-0", "https", network["a"].address6),
            ("decode-0", "https", network["b"].address6),
        }
        serves_over(launch)
        for name in ("a", "b"):
            open_to_others = {each.address for each in network[name].listening()} - {"127.0.0.1"}
            assert open_to_others == {network[name].address6}


def test_the_documented_ports_are_enough(network: Network) -> None:
    """docs/hosts.md says what a firewall has to let through; nobody knocks elsewhere."""
    engines = [(FIRST_DATA_PORT, LAST_DATA_PORT), CHOSEN_PORTS]
    network.set_doors("a", *engines, (CONTROL_PORT, CONTROL_PORT))
    network.set_doors("b", *engines)
    chosen = network["b"].run("cat", "/proc/sys/net/ipv4/ip_local_port_range")
    assert tuple(map(int, chosen.split())) == CHOSEN_PORTS
    with far_launch(network, CONFIG | {"control_port": CONTROL_PORT}, ["b"]) as launch:
        serves_over(launch)
        knocks = network.knocks()
        assert [knock for knock in knocks if not knock.is_let_in] == []
        # Each of the ranges is of use.
        unused = [
            (first, last)
            for first, last in (*engines, (CONTROL_PORT, CONTROL_PORT))
            if not any(first <= knock.port <= last for knock in knocks)
        ]
        assert unused == [], knocks
        # The firewall is one: a stranger does not get to the router, which is not listed.
        words = ("curl", "--silent", "--max-time", "2", f"http://{network['a'].address}:{PORT}")
        assert "28" in network["stranger"].run("sh", "-c", f"{' '.join(words)}; echo $?")
        assert [knock.port for knock in network.knocks() if not knock.is_let_in] == [PORT]


def test_mooncake_moves_blocks_between_hosts(network: Network) -> None:
    if problem := mooncake_problem():
        pytest.skip(f"mooncake: {problem}")
    config = CONFIG | {"kv_transfer": {**TRUSTED, "connector": "mooncake"}}
    with far_launch(network, config, ["b"]) as launch:
        serves_over(launch, "mooncake/tcp")
