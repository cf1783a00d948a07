"""``pdlaunch status`` shows once what a deployment is doing."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.text import Text

from pdlaunch.cli.figures import (
    duration,
    engine_cells,
    head_lines,
    pair_cells,
    time_of_day,
    troubles,
)
from pdlaunch.cli.options import ApiKeyOption, UrlArgument
from pdlaunch.cli.output import FormatOption, print_errors, print_json, print_table
from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.admin import read_status, reading_api
from pdlaunch.observe.logs import escape_controls
from pdlaunch.protocol.status import DeploymentStatus

NUM_EVENTS = 10

_ENGINES = {name: name for name in ("engine", "role", "host", "state", "load", "running")}
_ENGINES |= {"waiting": "waiting", "kv": "KV", "host_kv": "host\nKV", "device": "device\nhits"}
_ENGINES |= {"host_hits": "host\nhits", "remote": "pulled", "rate": "pulls/s"}
_PAIRS = {"pair": "pair", "path": "path", "measured": "measured", "speed": "speed"}
_PAIRS |= {"rate": "now", "moved": "moved", "pulls": "pulls"}


def status(
    url: UrlArgument = None, api_key: ApiKeyOption = None, output: FormatOption = "table"
) -> None:
    """Show engines with their load and caches, pairs with their speed, rates and events."""
    try:
        found = read_status(reading_api(url, api_key))
    except PdlaunchError as error:
        print_errors([error])
        raise typer.Exit(1) from None
    if output == "json":
        print_json(found)
    else:
        print_status(found, Console())


def print_status(found: DeploymentStatus, console: Console) -> None:
    """Print all that a deployment says of itself, for people."""

    def line(text: str, style: str = "") -> None:
        console.print(Text(text, style=style), soft_wrap=True)

    for text in head_lines(found):
        line(text)
    print_table([engine_cells(engine) for engine in found.engines], _ENGINES, console)
    for gone in found.gone:
        line(f"{escape_controls(gone.name)} has been gone for {duration(gone.gone_s)}", "red")
    if found.pairs:
        print_table([pair_cells(pair) for pair in found.pairs], _PAIRS, console)
    if found.num_pairs > len(found.pairs):
        line(f"… and {found.num_pairs - len(found.pairs)} more pairs")
    for text in troubles(found):
        line(text, "red")
    for event in found.events[-NUM_EVENTS:]:
        text = f"{time_of_day(event.at)} {event.name or 'launch'}: {event.text}"
        line(escape_controls(text), "red" if event.is_bad else "dim")
