"""``pdlaunch trace`` shows the spans of requests, process by process, as bars over their time."""

import sys

import msgspec
import typer
from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pdlaunch.cli.options import ApiKeyOption, UrlOption
from pdlaunch.cli.output import Format, counted, ending_at_errors
from pdlaunch.cli.status import amount
from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.api import Choice, read_requests, read_trace, reading_api
from pdlaunch.observe.logs import escape_controls
from pdlaunch.observe.spans import Attribute
from pdlaunch.protocol.ids import HttpRequestId
from pdlaunch.protocol.status import RequestTrace, SpanView

_STYLES = {"queue": "yellow", "lease": "yellow", "read": "cyan", "pull": "cyan"}


def trace(
    request_id: str | None = typer.Argument(
        None, metavar="ID", help="Id of a request, from router.log; by default the last request."
    ),
    slowest: int | None = typer.Option(
        None, min=1, max=1000, help="The slowest requests.", metavar="N"
    ),
    failed: int | None = typer.Option(
        None, min=1, max=1000, help="The last requests that failed or were refused.", metavar="N"
    ),
    output: Format = typer.Option("table", "--format", help="`json` prints one object per line."),
    url: UrlOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Show a request in all processes: where it waited, what was computed and pulled, and where
    its time went.
    """
    if sum(given is not None for given in (request_id, slowest, failed)) > 1:
        raise typer.BadParameter("choose one of ID, --slowest N and --failed N")
    choice: Choice = "slowest" if slowest else "failed" if failed else "last"
    with ending_at_errors():
        api = reading_api(url, api_key)
        ids = [HttpRequestId(request_id)] if request_id is not None else []
        if request_id is None:
            ids = [one.id for one in read_requests(api, choice, slowest or failed or 1)]
        if not ids:
            why = "no request has failed" if failed else "the router has served no request yet"
            raise PdlaunchError(why)
        traces = [read_trace(api, one) for one in ids]
    console = Console(highlight=False)
    for each in traces:
        if output == "json":
            sys.stdout.write(msgspec.json.encode(each).decode() + "\n")
        else:
            _print_trace(console, each)


def _print_trace(console: Console, trace: RequestTrace) -> None:
    """Print the line of a request as in router.log, then its spans, process by process."""
    line = escape_controls(f"{trace.id}  {trace.line}")
    console.print(Text(line, style="bold"), soft_wrap=not console.is_terminal)
    by_process: dict[str, list[SpanView]] = {}
    for span in trace.spans:
        by_process.setdefault(span.process, []).append(span)
    told = {process.partition("/")[0] for process in by_process}
    for engine in (trace.prefill, trace.decode):
        if engine is not None and engine not in told:
            by_process[engine] = []
    for process, spans in by_process.items():
        console.print(Text(escape_controls(process), style="bold cyan", overflow="ellipsis"))
        if not spans:
            console.print("  unknown: this engine reports no spans", style="dim")
        else:
            console.print(_span_table(spans, trace.total_ms or 0.0))
    if trace.dropped_spans:
        console.print(f"{trace.dropped_spans} more spans were dropped", style="dim")


def _span_table(spans: list[SpanView], total_ms: float) -> Table:
    """Return a row for each span: its name, its place in the request's time, its duration."""
    table = Table.grid(padding=(0, 1, 0, 0), expand=True)
    table.add_column(ratio=4, no_wrap=True, overflow="ellipsis")
    table.add_column(ratio=4)
    table.add_column(justify="right", no_wrap=True, min_width=12)
    for span in spans:
        failed = "error" in span.attributes or span.attributes.get("ok") is False
        style = "red" if failed else _STYLES.get(span.name, "green")
        duration_ms = span.end_ms - span.start_ms
        table.add_row(
            Text(escape_controls(f"  {span.name}{_details(span.attributes)}")),
            Bar(max(total_ms, span.end_ms), span.start_ms, span.end_ms, color=style),
            # An instant has no duration; its time is shown instead.
            f"{duration_ms:.1f} ms" if duration_ms else f"@{span.start_ms:.1f} ms",
        )
    return table


def _details(attributes: dict[str, Attribute]) -> str:
    """Return the attributes to show beside the name of a span."""
    parts: list[str] = []
    if "verified" in attributes:
        parts.append("verified" if attributes["verified"] else "unverified")
    for key, value in attributes.items():
        if key == "bytes" and isinstance(value, int | float):
            parts.append(amount(value, "B"))
        elif key == "gb_s" and isinstance(value, int | float):
            parts.append(f"{value:.1f} GB/s")
        elif key in ("tokens", "blocks", "prompts") and isinstance(value, int):
            parts.append(counted(value, key.removesuffix("s")))
        elif key.endswith("_tokens") and value:
            parts.append(f"{value} {key.removesuffix('_tokens')}")
        elif key in ("error", "reason"):
            parts.append(str(value))
    return " " + ", ".join(parts) if parts else ""
