"""Names the hosts of a launch that runs on several, as settings."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from pdlaunch.config.field_types import FrozenModel, read_list
from pdlaunch.config.roles import Role

Placement = Literal["local", "hosts", "ray", "slurm"]
PlacementStrategy = Literal["pack", "spread"]

LOCAL = "local"  # Names the supervisor's own host, on which the router runs


def on_host(name: str, host: str) -> str:
    """Return the name of a process for people, with its host where that is another one."""
    return name if host == LOCAL else f"{name} on {host}"


def _check_address(text: str) -> str:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise ValueError(
            f"{text[:80]!r} is no address; write a number such as 10.0.0.7 or fd00::7"
        ) from None
    # Peers that dial 0.0.0.0 reach themselves, and the launch waits until its time-out.
    if address.is_unspecified or address.is_multicast:
        raise ValueError(f"{text} is no address of one host; name the one that others reach")
    return str(address)


HostAddress = Annotated[str, AfterValidator(_check_address)]


class HostSettings(FrozenModel):
    """Names a host that engines may run on."""

    # fmt: off
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$",
        description="The `--name` of its agent; `local` is the supervisor's own host, without "
        "one.")
    bind_address: HostAddress | None = Field(
        None,
        description="Its processes listen here; its address on the route to the supervisor if "
        "unset.")
    advertise_address: HostAddress | None = Field(
        None, description="Other hosts connect here; `bind_address` when unset.")
    roles: Annotated[tuple[Role, ...], BeforeValidator(read_list)] | None = Field(
        None,
        description="It takes engines of these roles alone, such as `prefill,both`; of all if "
        "unset.")
    machine: str | None = Field(
        None,
        description="Profile such as h100x8, for `check-config` before its agent has joined.")
    # fmt: on


def _read_host(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


def _differ(hosts: Sequence[HostSettings]) -> Sequence[HostSettings]:
    names = [host.name for host in hosts]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two hosts have the name {twice}")
    return hosts


Hosts = Annotated[
    tuple[Annotated[HostSettings, BeforeValidator(_read_host)], ...],
    BeforeValidator(read_list),
    AfterValidator(_differ),
]
