"""Shows the download of a model: bytes on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.text import Text

from pdlaunch.config.model_files.find import Part, fetch_part
from pdlaunch.config.sizes import format_size

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
