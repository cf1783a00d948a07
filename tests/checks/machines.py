"""Machines of the cases."""

from dataclasses import replace

from pdlaunch.platform.facts import Machine
from tests.checks.contexts import CPU


def libraries(base: Machine, **changes: object) -> Machine:
    return replace(base, libraries=replace(base.libraries, **changes))


def limits(base: Machine = CPU, **changes: object) -> Machine:
    return replace(base, limits=replace(base.limits, **changes))


MOONCAKE = libraries(CPU, mooncake=True, mooncake_version="0.3.13.post1")
ON_MOONCAKE = ("--kv-connector", "mooncake")
