"""``pdlaunch trace`` shows what became of requests."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer
from rich.console import Console
from rich.text import Text

from pdlaunch.cli import EXIT_FAILED
from pdlaunch.cli.engines import UrlOption
from pdlaunch.cli.output import print_errors
from pdlaunch.cli.perfetto import trace_events
from pdlaunch.cli.waterfall import print_trace
from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.requests import find_ids, read_trace, reading_api
from pdlaunch.protocol.ids import HttpRequestId
from pdlaunch.protocol.requests import RequestTrace

TraceFormat = Literal["waterfall", "perfetto", "json"]


def trace(
    request_id: Annotated[
        str | None, typer.Argument(metavar="ID", help="Id of a request, as router.log has it.")
    ] = None,
    last: Annotated[bool, typer.Option("--last", help="The last request; the default.")] = False,
    slowest: Annotated[
        int | None, typer.Option(min=1, max=1000, help="The slowest ones.", metavar="N")
    ] = None,
    failed: Annotated[
        bool, typer.Option("--failed", help="The last one that failed or was refused.")
    ] = False,
    form: Annotated[
        TraceFormat,
        typer.Option(
            "--format",
            help="`perfetto` writes a file for ui.perfetto.dev, `json` one object a line.",
        ),
    ] = "waterfall",
    output: Annotated[
        Path | None,
        typer.Option(help="File for `perfetto`.", metavar="FILE", dir_okay=False),
    ] = None,
    url: UrlOption = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="The clients' key; not needed for your own launch on this machine.",
            envvar="PDLAUNCH_API_KEY",
            metavar="KEY",
        ),
    ] = None,
) -> None:
    """Show what became of a request, over all processes: where it waited, what was computed and
    pulled, and where its time went.
    """
    chosen = [request_id is not None, last, slowest is not None, failed]
    if sum(chosen) > 1:
        raise typer.BadParameter("choose one of ID, --last, --slowest and --failed")
    if output is not None and form != "perfetto":
        raise typer.BadParameter("--output is for --format perfetto; redirect the others")
    try:
        api = reading_api(url, api_key)
        if request_id is not None:
            ids = [HttpRequestId(request_id)]
        else:
            choice: Literal["slowest", "failed", "last"] = (
                "slowest" if slowest else "failed" if failed else "last"
            )
            ids = find_ids(api, choice, slowest or 1)
        if not ids:
            raise PdlaunchError(
                "no request has failed" if failed else "the router has served no request yet"
            )
        traces = [read_trace(api, one) for one in ids]
        _show(traces, form, output)
    except (PdlaunchError, OSError) as error:
        print_errors([error if isinstance(error, PdlaunchError) else str(error)])
        raise typer.Exit(EXIT_FAILED) from None


def _show(traces: Sequence[RequestTrace], form: TraceFormat, output: Path | None) -> None:
    if form == "json":
        for trace in traces:
            sys.stdout.write(msgspec.json.encode(trace).decode() + "\n")
    elif form == "perfetto":
        name = re.sub(r"[^\w.-]", "_", traces[0].id)[:80]
        file = output or Path(f"pdlaunch-trace-{name}.json")
        try:
            file.write_bytes(msgspec.json.encode(trace_events(traces)))
        except OSError as error:
            why = error.strerror or str(error)
            raise PdlaunchError(f"--output {file} cannot be written: {why}") from error
        Console().print(Text(f"{file}: open it at https://ui.perfetto.dev"), soft_wrap=True)
    else:
        console = Console(highlight=False)
        for number, trace in enumerate(traces):
            if number:
                console.print()
            print_trace(console, trace)
