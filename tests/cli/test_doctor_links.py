"""Where the engines are that ``pdlaunch doctor`` looks at, and what lies between them."""

from __future__ import annotations

import psutil
import pytest

from pdlaunch.cli import doctor as doctor_links
from pdlaunch.cli.doctor import Links, is_here
from pdlaunch.machine.facts import Machine
from pdlaunch.machine.link_speed import ExpectedSpeed
from tests.checks.contexts import GPU

FAR = "http://198.51.100.1:8000"
"""An address of nobody."""
HERE = ("unix:/run/p.sock", "http://127.0.0.1:8000")


def test_addresses_of_this_machine_are_here() -> None:
    own = {
        each.address
        for device in psutil.net_if_addrs().values()
        for each in device
        if each.family.name == "AF_INET"
    }
    assert own
    assert all(is_here(f"http://{address}:8000") for address in own)
    assert all(map(is_here, HERE))
    assert not is_here(FAR)
    assert not is_here("http://no-such-host.invalid:1")


def test_engines_of_other_hosts_are_out_of_sight() -> None:
    found = Links().expected(FAR, "http://198.51.100.2:1", ("0.32.0", "0.32.0"))
    assert found.gigabytes_per_s is None
    assert "both run on other hosts" in found.text


@pytest.mark.parametrize("is_prefill_far", [True, False])
def test_one_engine_elsewhere_is_reached_over_a_device(
    monkeypatch: pytest.MonkeyPatch, is_prefill_far: bool
) -> None:
    asked: list[str] = []
    wire = ExpectedSpeed(12.5, "eth7 with 100 Gbit/s")
    monkeypatch.setattr(doctor_links, "address_towards", lambda host: asked.append(host) or "a")
    monkeypatch.setattr(doctor_links, "device_of", {"a": "eth7"}.get)
    monkeypatch.setattr(doctor_links, "over_network", {"eth7": wire}.get)
    urls = (FAR, HERE[0]) if is_prefill_far else (HERE[0], FAR)
    assert Links().expected(*urls, ("0.32.0", "0.32.0")) is wire
    assert asked == ["198.51.100.1"]
    monkeypatch.setattr(doctor_links, "address_towards", lambda host: None)
    assert "no route" in Links().expected(*urls, ("0.32.0", "0.32.0")).text


@pytest.mark.parametrize(
    ("machine", "version", "words"),
    [
        (Machine(), "0.32.0", "a plain copy reaches"),
        (GPU, "0.32.0+cpu", "a plain copy reaches"),
        (Machine(has_hidden_gpus=True), "0.32.0", "does not see"),
        (GPU, "0.32.0", "GPU"),
    ],
)
def test_engines_of_this_host_share_its_memory_or_its_gpus(
    monkeypatch: pytest.MonkeyPatch, machine: Machine, version: str, words: str
) -> None:
    probed: list[Machine] = []
    monkeypatch.setattr(doctor_links, "probe_machine", lambda: probed.append(machine) or machine)
    monkeypatch.setattr(doctor_links, "measure_copy_gigabytes_per_s", lambda: 32.0)
    links = Links()
    for _ in range(3):
        assert words in links.expected(*HERE, (version, version)).text
    assert len(probed) == 1
