"""Lists the arms for a number of devices, each with its configuration for ``serve``."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import SecretStr

from pdlaunch.api import check
from pdlaunch.bench.verdict.queueing import Arm
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import ROLES
from pdlaunch.config.sources import LoadedConfig
from pdlaunch.errors import ConfigError

# Settings of the user's deployment that measured arms do without
_APART = (
    *("api_keys", "admin_api_key", "engine_api_key", "ssl_certfile", "ssl_keyfile", "log_dir"),
    "autopilot",  # It would change the arm.
)


def all_arms(num_devices: int) -> Iterator[Arm]:
    """Yield the arms that use all devices, small engines first."""
    size = 1
    while size <= num_devices:
        if num_devices % size == 0:
            num_engines = num_devices // size
            yield Arm(size, num_both=num_engines)
            for num_prefill in range(1, num_engines):
                yield Arm(size, num_prefill=num_prefill, num_decode=num_engines - num_prefill)
        size *= 2


def settings_of(
    arm: Arm, config: LaunchConfig, *, on_cpu: bool, mode: Literal["json", "python"] = "python"
) -> dict[str, Any]:
    """Return the given settings of a configuration, with the engines of the arm."""
    given = config.model_dump(mode=mode, exclude_unset=True)
    replicas = {"both": arm.num_both, "prefill": arm.num_prefill, "decode": arm.num_decode}
    for role in ROLES:
        section = {
            name: value
            for name, value in given.get(role, {}).items()
            if name not in ("tensor_parallel_size", "port")
        }
        given[role] = section | {"replicas": replicas[role]}
    given["tensor_parallel_size"] = arm.tp_size
    if on_cpu:
        # A device is a core: the only engine of an arm must not get more.
        given.setdefault("num_threads", 1)
    return given


def config_to_measure(arm: Arm, loaded: LoadedConfig, *, on_cpu: bool) -> LoadedConfig:
    """Return the configuration with which the arm is measured, on a free port of this machine."""
    given = settings_of(arm, loaded.config, on_cpu=on_cpu)
    if given.get("api_keys") and not given.get("api_key"):
        # Keys in api_keys are hashes, so clients need another key.
        given["api_key"] = SecretStr(secrets.token_urlsafe())
    kept = {name: value for name, value in given.items() if name not in _APART}
    kept["port"] = 0
    return LoadedConfig(LaunchConfig.model_validate(kept), loaded.origins)


def usable_arms(
    loaded: LoadedConfig, num_devices: int, *, on_cpu: bool
) -> tuple[list[Arm], dict[str, str]]:
    """Return the arms that the rules of check-config accept here, and why they refuse others."""
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
