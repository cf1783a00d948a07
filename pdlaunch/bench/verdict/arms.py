"""Lists the arms for a number of devices, each with its configuration for ``serve``."""

import secrets
from collections.abc import Iterator
from typing import Any, Literal

import msgspec
from pydantic import SecretStr

from pdlaunch.api import check
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import ROLES
from pdlaunch.config.sources import LoadedConfig
from pdlaunch.errors import ConfigError

# Settings of the user's deployment that are removed for measurements
_APART = (
    *("api_keys", "admin_api_key", "engine_api_key", "ssl_certfile", "ssl_keyfile", "log_dir"),
    "autopilot",  # because it would change the arm
)


class Arm(msgspec.Struct, frozen=True):
    """A deployment to compare: aggregated engines, or prefill and decode engines."""

    tp_size: int
    num_both: int = 0
    num_prefill: int = 0
    num_decode: int = 0

    @property
    def kind(self) -> str:
        return "aggregated" if self.num_both else "split"

    @property
    def num_devices(self) -> int:
        return self.tp_size * (self.num_both + self.num_prefill + self.num_decode)

    @property
    def name(self) -> str:
        if self.num_both:
            return f"{self.num_both} x TP{self.tp_size}"
        size = f" TP{self.tp_size}" if self.tp_size > 1 else ""
        return f"{self.num_prefill}P{self.num_decode}D{size}"


def all_arms(num_devices: int) -> Iterator[Arm]:
    """Yield the arms that use all devices, small engines first."""
    for size in (size for size in range(1, num_devices + 1) if num_devices % size == 0):
        num_engines = num_devices // size
        yield Arm(size, num_both=num_engines)
        for num_prefill in range(1, num_engines):
            yield Arm(size, num_prefill=num_prefill, num_decode=num_engines - num_prefill)


def settings_of(
    arm: Arm, config: LaunchConfig, *, on_cpu: bool, mode: Literal["json", "python"] = "python"
) -> dict[str, Any]:
    """Return the given settings of a configuration, with the engines of the arm."""
    given = config.model_dump(mode=mode, exclude_unset=True)
    replicas = {"both": arm.num_both, "prefill": arm.num_prefill, "decode": arm.num_decode}
    for role in ROLES:
        given[role] = given.get(role, {}) | {"replicas": replicas[role]}
        for name in ("tensor_parallel_size", "port"):
            given[role].pop(name, None)
    given["tensor_parallel_size"] = arm.tp_size
    if on_cpu:
        # A device is a core here, so an engine gets one thread even if it is alone.
        given.setdefault("num_threads", 1)
    return given


def config_to_measure(arm: Arm, loaded: LoadedConfig, *, on_cpu: bool) -> LoadedConfig:
    """Return the configuration with which the arm is measured, on a free port of this machine."""
    given = settings_of(arm, loaded.config, on_cpu=on_cpu)
    if given.get("api_keys") and not given.get("api_key"):
        # api_keys has only hashes of keys, so the benchmark's clients need a new key.
        given["api_key"] = SecretStr(secrets.token_urlsafe())
    kept = {name: value for name, value in given.items() if name not in _APART}
    kept["port"] = 0
    return LoadedConfig(LaunchConfig.model_validate(kept), loaded.origins)


def usable_arms(
    loaded: LoadedConfig, num_devices: int, *, on_cpu: bool
) -> tuple[list[Arm], dict[str, str]]:
    """Return the arms that check-config accepts on this machine, and refused arms with reasons."""
    usable, refused = [], {}
    for arm in all_arms(num_devices):
        try:
            errors = check(config_to_measure(arm, loaded, on_cpu=on_cpu)).errors
        except ConfigError as error:
            refused[arm.name] = str(error)
            continue
        if errors:
            refused[arm.name] = errors[0].message.rstrip(".")
        else:
            usable.append(arm)
    return usable, refused
