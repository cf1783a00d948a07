"""Starts the deployment that a command wants for itself, and shows the download of its model."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

from pdlaunch.cli.flags import to_command_line
from pdlaunch.config.model_files.find import Part, fetch_part
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.settings import flag_name
from pdlaunch.config.sizes import format_size
from pdlaunch.launch.client.deployment import Deployment, running_deployment
from pdlaunch.planning.models import fetch_weights, read_models

_LINE_EVERY_S = 5.0


class ShownDownloads:
    """Is a ``Fetch`` that prints its progress to ``console``."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, name: str, revision: str | None, part: Part) -> None:
        """Download a part of a model. Raises ConfigError."""
        said_at = -_LINE_EVERY_S
        with self._console.status(Text(f"looking for {name}")) as status:

            def report(done: int, total: int) -> None:
                nonlocal said_at
                line = f"downloading {name}: {format_size(done)} of {format_size(total)}"
                if self._console.is_terminal:
                    status.update(Text(line))
                elif (now := time.monotonic()) - said_at >= _LINE_EVERY_S:
                    said_at = now
                    self._console.print(Text(line))

            fetch_part(name, revision, part, report)


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
    downloads = ShownDownloads(Console(stderr=True))
    fetch_weights(config, read_models(config, downloads), downloads)
    # Keys go through the environment: `ps` shows arguments to everybody.
    arguments, secrets = to_command_line(flags)
    with running_deployment(
        [*([str(file)] if file else []), *arguments],
        environ={**os.environ, **secrets, **(environ or {})},
        log_dir=config.log_dir,
    ) as deployment:
        yield deployment
