"""Settings that name the hosts of a launch."""

import ipaddress
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from pdlaunch.config.field_types import FrozenModel, read_list
from pdlaunch.config.roles import Role

Placement = Literal["local", "hosts", "ray", "slurm"]
PlacementStrategy = Literal["pack", "spread"]

LOCAL = "local"  # The name of the host that runs the supervisor and the router


def on_host(name: str, host: str) -> str:
    """Return a process's name for messages, with its host unless that is the local host."""
    return name if host == LOCAL else f"{name} on {host}"


def _check_address(text: str) -> str:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise ValueError(
            f"{text[:80]!r} is not an IP address; write one such as 10.0.0.7 or fd00::7"
        ) from None
    # A peer that connects to 0.0.0.0 reaches itself, and the launch would wait until its time-out.
    if address.is_unspecified or address.is_multicast:
        raise ValueError(f"{text} is not the address of one host; name one that others reach")
    return str(address)


HostAddress = Annotated[str, AfterValidator(_check_address)]


class HostSettings(FrozenModel):
    """Holds the settings of a host that engines may run on."""

    # fmt: off
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$",
        description="The `--name` of its agent; `local` is the supervisor's own host, which has "
        "no agent.")
    bind_address: HostAddress | None = Field(
        None,
        description="Address at which its processes listen; when unset, its address on the route "
        "to the supervisor.")
    advertise_address: HostAddress | None = Field(
        None, description="Address that other hosts connect to; `bind_address` when unset.")
    roles: Annotated[tuple[Role, ...], BeforeValidator(read_list)] | None = Field(
        None,
        description="Roles of the engines that it takes, such as `prefill,both`; all roles when "
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
