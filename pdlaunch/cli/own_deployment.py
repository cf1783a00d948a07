"""Starts the deployment that a command wants for itself, and shows the download of its model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import typer

from pdlaunch.cli.flags import to_command_line
from pdlaunch.config.model_files.download import fetch_part
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.settings import flag_name
from pdlaunch.launch.client.deployment import Deployment, running_deployment
from pdlaunch.planning.models import fetch_weights, read_models


def refuse_address(flags: Mapping[str, object]) -> None:
    """Raise typer's BadParameter for flags that would change nothing."""
    given = [flag_name(path) for path in ("host", "port") if path in flags]
    if given:
        raise typer.BadParameter(
            f"{', '.join(given)}: what is started here listens on a free port of 127.0.0.1"
        )


@contextmanager
def own_deployment(
    file: Path | None,
    flags: Mapping[str, object],
    config: LaunchConfig,
    environ: Mapping[str, str] | None = None,
) -> Iterator[Deployment]:
    """Run ``serve FILE`` with these flags until the block ends.

    ``config`` is the configuration that they give, ``environ`` holds further variables. Raises
    ConfigError and StartupError.
    """
    # Here, where its progress is seen, and no time-out of the start runs.
    fetch_weights(config, read_models(config, fetch_part), fetch_part)
    # Keys go through the environment: `ps` shows arguments to everybody.
    arguments, secrets = to_command_line(flags)
    with running_deployment(
        [*([str(file)] if file else []), *arguments],
        environ={**os.environ, **secrets, **(environ or {})},
        log_dir=config.log_dir,
    ) as deployment:
        yield deployment
