"""What `enable_cumem_allocator` and `enable_sleep_mode` come to for an engine."""

from __future__ import annotations

from dataclasses import dataclass

from pdlaunch.config.models import EngineSettings
from pdlaunch.errors import ConfigError


@dataclass(frozen=True, slots=True)
class MemoryOptions:
    """Derived once; every room that allocates reads this, never the raw settings."""

    cumem_allocator: bool
    sleep_mode: bool
    reason: str | None = None
    """Why the allocator is on though nobody set it."""


def contradicts(settings: EngineSettings) -> bool:
    """Sleep mode is on, and the allocator that it needs is off by name."""
    return settings.enable_sleep_mode and settings.enable_cumem_allocator is False


def memory_options(settings: EngineSettings) -> MemoryOptions:
    """The memory options of an engine; sleep mode turns the CuMem allocator on when it was not set.

    Raises ConfigError when sleep mode is on and the allocator off by name.
    """
    if contradicts(settings):
        raise ConfigError(
            (
                "enable_sleep_mode needs the CuMem allocator, which enable_cumem_allocator: false "
                "switches off"
            ),
            field="enable_cumem_allocator",
            value=False,
            fix="remove enable_cumem_allocator, or switch enable_sleep_mode off",
        )
    if settings.enable_sleep_mode and settings.enable_cumem_allocator is None:
        return MemoryOptions(
            True,
            True,
            "enable_sleep_mode frees and restores memory of the CuMem allocator: it is turned on",
        )
    return MemoryOptions(settings.enable_cumem_allocator is True, settings.enable_sleep_mode)
