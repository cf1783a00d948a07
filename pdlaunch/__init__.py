"""pdlaunch launches disaggregated prefill/decode LLM serving with one command, or from Python.

::

    import pdlaunch

    config = pdlaunch.load_config("deploy.yaml", {"prefill.replicas": 2})
    report = pdlaunch.check(config)
    if report.is_ok():
        with pdlaunch.Launch(config) as launch:
            print(launch.url)

The names in ``__all__`` are the public API; everything else is private and may change. They are
imported when they are first used, so that ``import pdlaunch`` stays cheap.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pdlaunch.api import Launch, check, load_config, plan
    from pdlaunch.checks.run import Report
    from pdlaunch.config.sources import LoadedConfig
    from pdlaunch.errors import ConfigError, PdlaunchError, StartupError
    from pdlaunch.planning.plan import Plan

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "Launch",
    "LoadedConfig",
    "PdlaunchError",
    "Plan",
    "Report",
    "StartupError",
    "__version__",
    "check",
    "load_config",
    "plan",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("pdlaunch.api"), name)


def __dir__() -> list[str]:
    return __all__
