"""Says what links between engines that run already should give, as seen from this machine."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

import psutil

from pdlaunch.config.http_names import is_loopback
from pdlaunch.machine.link_speed import (
    ExpectedSpeed,
    between_gpus,
    measure_copy_gigabytes_per_s,
    over_network,
    within_cpus,
)
from pdlaunch.machine.network import address_towards, device_of
from pdlaunch.machine.probe import probe_machine

_CPU_BUILD = "+cpu"
"""Ends the version of a vLLM that computes on CPUs."""


class Links:
    """Tells of links; looks at this machine once, when a link lies within it."""

    def __init__(self) -> None:
        self._here: dict[bool, ExpectedSpeed] = {}
        """By whether engines compute on CPUs although there may be GPUs."""

    def expected(self, prefill: str, decode: str, versions: Sequence[str | None]) -> ExpectedSpeed:
        """Return what the link between two engines should give.

        ``prefill``, ``decode``: their URLs; ``versions``: of both.
        """
        far = [url for url in (prefill, decode) if not is_here(url)]
        if len(far) == 2:
            return ExpectedSpeed(None, "both run on other hosts; ask on one of these")
        if far:
            address = address_towards(urlsplit(far[0]).hostname or "")
            device = None if address is None else device_of(address)
            if device is None:
                return ExpectedSpeed(None, f"this host has no route to {far[0]}")
            return over_network(device)
        on_cpus = any(version and version.endswith(_CPU_BUILD) for version in versions)
        if on_cpus not in self._here:
            self._here[on_cpus] = _within_host(on_cpus=on_cpus)
        return self._here[on_cpus]


def _within_host(*, on_cpus: bool) -> ExpectedSpeed:
    machine = probe_machine()
    if on_cpus or not (machine.gpus or machine.has_hidden_gpus):
        return within_cpus(measure_copy_gigabytes_per_s())
    if not machine.gpus:
        return ExpectedSpeed(None, "this host has GPUs that this process does not see")
    return between_gpus(machine)


def is_here(url: str) -> bool:
    """Tell whether a URL leads to this host, by the loopback device or an address of its own."""
    host = urlsplit(url).hostname or ""
    if url.startswith("unix:") or is_loopback(host):
        return True
    try:
        found = {str(address[0]) for *_, address in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    own = {
        each.address.partition("%")[0]
        for device in psutil.net_if_addrs().values()
        for each in device
    }
    return not found.isdisjoint(own)
