"""Machines of the cases."""

from dataclasses import replace

from pdlaunch.machine.facts import Machine
from tests.checks.contexts import CPU, GB200


def libraries(base: Machine, **changes: object) -> Machine:
    return replace(base, libraries=replace(base.libraries, **changes))


def limits(base: Machine = CPU, **changes: object) -> Machine:
    return replace(base, limits=replace(base.limits, **changes))


NO_IMEX = replace(
    GB200,
    gpus=tuple(replace(gpu, has_fabric_handles=False, supports_fabric=True) for gpu in GB200.gpus),
    num_imex_channels=0,
)
NO_FABRIC = replace(
    GB200,
    gpus=tuple(replace(gpu, has_fabric_handles=False, supports_fabric=False) for gpu in GB200.gpus),
    num_imex_channels=1,
)
MOONCAKE = libraries(CPU, mooncake=True, mooncake_version="0.3.13.post1")
ON_MOONCAKE = ("--kv-connector", "mooncake")
