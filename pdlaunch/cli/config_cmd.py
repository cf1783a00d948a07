"""``pdlaunch config``: print the JSON schema, the docs' reference, or the resolved values."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pdlaunch.cli import EXIT_UNUSABLE
from pdlaunch.cli.flags import ServeCommand, with_serve_flags
from pdlaunch.cli.machines import AssumeOption, judged_machine
from pdlaunch.cli.output import FormatOption, safe
from pdlaunch.config.engine_settings import EngineSettings
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import ROLES
from pdlaunch.config.settings import Setting, all_settings
from pdlaunch.config.sources import ShownValue, changed_values, load_config, shown_values
from pdlaunch.errors import ConfigError
from pdlaunch.planning.effective import effective_settings
from pdlaunch.planning.hosts import planned_hosts
from pdlaunch.planning.resolve import resolve_on

_REFERENCE_HEAD = """\
# Settings

Every setting of a deployment, its default, and the flag and variables that give it. Made by `make
settings` from the fields in `pdlaunch/config`; `pdlaunch config show` prints the values of one
deployment and where each came from.

Flags beat variables, variables beat the YAML file, the file beats the defaults. In the file a dot
is a level: `limits.max_connections` is `limits: {max_connections: 4096}`."""
_GROUPS = {
    "Engines": """\
These stand at the top level and hold for all engines. The sections `prefill`, `decode` and
`both` may override each of them for one role: `decode: {block_size: 32}`,
`PDLAUNCH_DECODE__BLOCK_SIZE`.""",
    "Roles": "How many engines a role has.",
    "`kv_transfer`": "How KV blocks get from prefill to decode: [connectors.md](connectors.md).",
    "`routing`": "What a router prefers when it chooses engines: [routing.md](routing.md).",
    "`limits`": "What a router or an engine takes before it refuses requests.",
    "`tracing`": "What becomes visible of requests: [operating.md](operating.md).",
    "Deployment": "The router and the launch as a whole.",
}
_TABLE_HEAD = (
    "| setting | value | default | what it does | flag and variables |",
    f"|{'---|' * 5}",
)

app = typer.Typer(no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})


@app.command("schema")
def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print docs/settings.md instead.")
    ] = False,
) -> None:
    """Print the JSON schema of the configuration file; editors check YAML with it."""
    if markdown:
        typer.echo(settings_markdown(), nl=False)
        return
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **LaunchConfig.model_json_schema(),
        "title": "pdlaunch configuration",
    }
    typer.echo(json.dumps(document, indent=2))


@app.command("show", cls=ServeCommand)
@with_serve_flags
def show(
    config: Path | None = None,
    output: FormatOption = "table",
    changed: Annotated[
        bool, typer.Option("--changed", help="Print only what differs from the defaults.")
    ] = False,
    assume: AssumeOption = None,
    *,
    flags: dict[str, object],
) -> None:
    """Print every setting, its value, and where it comes from: flag, environment, file, default or
    derived.
    """
    try:
        loaded = load_config(config, os.environ, flags)
        judged = judged_machine(assume, loaded.config)
        hosts = planned_hosts(loaded.config, judged.machine, judged.environ)
    except ConfigError as error:
        Console(file=sys.stderr, soft_wrap=True).print(
            Text(f"error: {safe(str(error))}", style="red")
        )
        raise typer.Exit(EXIT_UNUSABLE) from None
    if changed:
        values = changed_values(loaded)
    else:
        resolved = resolve_on(loaded.config, hosts, judged.environ)
        by_path = {item.path: item for item in shown_values(loaded)}
        by_path |= {item.path: item for item in effective_settings(resolved)}
        values = list(by_path.values())
    if output == "json":
        typer.echo(json.dumps({item.path: _entry(item) for item in values}, indent=2))
    else:
        _print_table(Console(), values)


def settings_markdown() -> str:
    """Return the text of docs/settings.md: every setting, in groups."""
    groups: dict[str, list[str]] = {title: [] for title in _GROUPS}
    for path, setting in all_settings().items():
        first, _, rest = path.partition(".")
        if first in EngineSettings.model_fields:
            groups["Engines"].append(_row(setting))
        elif first not in ROLES:
            groups[f"`{first}`" if rest else "Deployment"].append(_row(setting))
        # Overrides are not listed but for those with a flag.
        elif setting.flag or rest.partition(".")[0] not in EngineSettings.model_fields:
            groups["Roles"].append(_row(setting))
    lines = [_REFERENCE_HEAD]
    for title, rows in groups.items():
        lines += ["", f"## {title}", "", _GROUPS[title], "", *_TABLE_HEAD, *rows]
    return "\n".join(lines) + "\n"


def _row(setting: Setting) -> str:
    names = [f"`--{setting.flag.name}`"] if setting.flag else []
    names += [f"`{name}`" for name in setting.variables]
    default = f"`{setting.default}`" if setting.default else ""
    cells = (
        f"`{setting.path}`",
        f"`{setting.form}`",
        default,
        setting.description,
        " ".join(names),
    )
    line = " | ".join(cell.replace("|", r"\|") for cell in cells)
    return f"| {line} |"


def _entry(item: ShownValue) -> dict[str, object]:
    return {"value": item.value, "origin": item.origin.kind, "detail": item.origin.detail}


def _print_table(console: Console, values: list[ShownValue]) -> None:
    if not values:
        console.print("every setting has its default")
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("setting", "value", "origin"):
        table.add_column(heading, overflow="fold")
    for item in values:
        origin = (
            f"{item.origin.kind} ({item.origin.detail})" if item.origin.detail else item.origin.kind
        )
        style = "dim" if item.origin.kind == "default" else ""
        table.add_row(
            item.path,
            Text(safe(json.dumps(item.value, ensure_ascii=False))),
            Text(safe(origin)),
            style=style,
        )
    console.print(table)
