"""Implements the public Python API. All names are available from ``import pdlaunch``."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

from pydantic import SecretStr

from pdlaunch.checks.probed import probe_launch
from pdlaunch.checks.run import Report, run_checks
from pdlaunch.config import sources
from pdlaunch.config.model_files.download import fetch_part
from pdlaunch.config.settings import VARIABLE_PREFIX, variable_paths
from pdlaunch.config.sources import OTHER_VARIABLES, LoadedConfig
from pdlaunch.errors import ConfigError, PdlaunchError
from pdlaunch.errors import StartupError as StartupError
from pdlaunch.launch.client.deployment import Deployment, running_deployment
from pdlaunch.launch.engines import kind_of, plan_processes
from pdlaunch.machine.probe import probe_machine
from pdlaunch.planning.models import fetch_weights, read_models
from pdlaunch.planning.plan import Plan, planned_hosts
from pdlaunch.planning.resolve import ResolvedLaunch, resolve_on

# Extra time for the steps of a launch before and after its own ``startup_timeout_s``
_START_MARGIN_S = 60.0


def load_config(
    path: str | os.PathLike[str] | None = None, settings: Mapping[str, object] | None = None
) -> LoadedConfig:
    """Merge a file, this process's ``PDLAUNCH_*`` variables and ``settings`` into a configuration.

    ``settings`` maps dotted paths to values: ``{"prefill.replicas": 2}``. It overrides variables,
    which override the file. Raises ConfigError, whose text lists the problems of all sources.
    """
    file = None if path is None else Path(path)
    return sources.load_config(file, os.environ, dict(settings or {}))


def check(config: LoadedConfig) -> Report:
    """Check a configuration on this machine, as ``pdlaunch check-config`` does.

    Starts nothing. ``Report.is_ok()`` returns True if it can be launched. Each of
    ``Report.findings`` has a rule's code, a severity, a message and a fix.
    """
    resolved = resolve_here(config)
    rules = kind_of(resolved).rules()
    return run_checks(resolved, config.origins, probe_launch(resolved), rules=rules)


def plan(config: LoadedConfig) -> Plan:
    """Plan every process that a launch on this machine starts, with its command and environment.

    Starts nothing. ``Plan.shown()`` masks secrets in environments. Raises ConfigError if the
    configuration cannot be started here, or if ``check`` finds errors.
    """
    resolved = resolve_here(config)
    resolved.require_startable()
    rules = kind_of(resolved).rules()
    probes = probe_launch(resolved, with_ports=False)
    errors = run_checks(resolved, config.origins, probes, rules=rules).errors
    if errors:
        found = "; ".join(f"{error.rule} {error.where}: {error.message}" for error in errors)
        raise ConfigError(found, field=errors[0].where, fix=errors[0].fix)
    return plan_processes(resolved)


class Launch:
    """Runs a deployment on this machine during a ``with`` block.

    ::

        with pdlaunch.Launch(pdlaunch.load_config("deploy.yaml")) as launch:
            client = OpenAI(base_url=f"{launch.url}/v1", api_key="unused")

    The deployment serves when the block begins. All its processes have ended when the block ends,
    or when this process dies. Without ``port`` in the configuration, the router listens on a free
    port. Log files are kept if ``log_dir`` is set.
    """

    def __init__(self, config: LoadedConfig) -> None:
        self._config = config
        self._exit = contextlib.ExitStack()
        self._deployment: Deployment | None = None

    def __enter__(self) -> Self:
        """Start the deployment and wait until it serves.

        Raises StartupError, with the output of ``pdlaunch serve``, if the start fails, and
        ConfigError if a model of a hub cannot be downloaded.
        """
        config, has_port = self._config.config, "port" in self._config.origins
        running = launched(self._config, config.host, config.port if has_port else None)
        self._deployment = self._exit.enter_context(running)
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()
        self._deployment = None

    @property
    def url(self) -> str:
        """Return the base URL of the OpenAI API, without ``/v1``: ``http://127.0.0.1:8000``."""
        return self._running().url

    def output(self) -> str:
        """Return the output of ``pdlaunch serve`` so far."""
        return self._running().output()

    def _running(self) -> Deployment:
        if self._deployment is None:
            raise PdlaunchError("the deployment runs only inside the `with` block of its Launch")
        return self._deployment


def resolve_here(config: LoadedConfig) -> ResolvedLaunch:
    """Resolve a configuration on this machine."""
    models = read_models(config.config, fetch_part)
    hosts = planned_hosts(config.config, probe_machine(), os.environ)
    return resolve_on(config.config, hosts, os.environ, models)


@contextlib.contextmanager
def launched(
    loaded: LoadedConfig, host: str = "127.0.0.1", port: int | None = None
) -> Iterator[Deployment]:
    """Run ``pdlaunch serve`` with this configuration at an address; ``port`` None: a free port.
    Raises StartupError and ConfigError.
    """
    config = loaded.config
    # Download here, where the user sees the progress, and before the time-out of the start begins.
    fetch_weights(config, read_models(config, fetch_part), fetch_part)
    # Pass only the settings that were given; the child fills in the defaults.
    given = config.model_dump(exclude_unset=True)
    masked = config.model_dump(mode="json", exclude_unset=True)
    # Keys are passed as variables; the file has all other settings, so drop their variables.
    variables = {path: name for name, path in variable_paths().items()}
    keys = {path: value for path, value in given.items() if isinstance(value, SecretStr)}
    environ = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(VARIABLE_PREFIX) or name in OTHER_VARIABLES
    }
    with tempfile.TemporaryDirectory(prefix="pdlaunch-api-") as folder:
        # JSON is valid YAML. Only this user can read the folder.
        file = Path(folder) / "deploy.json"
        # The certificate does not name 127.0.0.1.
        apart = {*keys, "ssl_certfile", "ssl_keyfile"}
        file.write_text(json.dumps({path: masked[path] for path in given if path not in apart}))
        environ |= {variables[path]: key.get_secret_value() for path, key in keys.items()}
        with running_deployment(
            [str(file)],
            environ=environ,
            log_dir=config.log_dir,
            host=host,
            port=port,
            timeout_s=config.startup_timeout_s + _START_MARGIN_S,
        ) as deployment:
            yield deployment
