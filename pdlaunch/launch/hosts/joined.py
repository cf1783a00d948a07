"""Reads what an agent tells of its host when it joins."""

from __future__ import annotations

from pdlaunch.launch.hosts.agent_messages import Join
from pdlaunch.machine.machine_file import decode_machine
from pdlaunch.planning.hosts import ResolvedHost


def joined_host(join: Join) -> ResolvedHost:
    """Return the host of an agent. Raises ConfigError for a machine that cannot be read."""
    found = decode_machine(join.machine, join.name)
    return ResolvedHost(
        join.name,
        found.machine,
        found.environ,
        join.address,
        join.address,
        executables=join.executables,
    )
