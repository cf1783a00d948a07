"""Commands for the engines of a running deployment, such as ``sleep``, ``restart``, ``scale``."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated, Literal

import typer

from pdlaunch.cli.options import KeyOption, UrlOption
from pdlaunch.cli.output import counted, ending_at_errors, print_line, say
from pdlaunch.config.roles import ROLES, Role
from pdlaunch.launch.client import api

GIB = 1024**3
_GOES_ON = "the change continues; `pdlaunch status` shows the engines"


class Tag(StrEnum):
    """A pool that can wake up alone. An enum, because typer accepts no list of a ``Literal``."""

    WEIGHTS = "weights"
    KV_CACHE = "kv_cache"


EngineOption = Annotated[
    list[str] | None,
    typer.Option("--engine", help="Only this engine; may be repeated.", metavar="NAME"),
]
NamesArgument = Annotated[
    list[str],
    typer.Argument(
        help="An engine, or one of its processes: decode-0, decode-0/rank-1.", metavar="NAME"
    ),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Show which engines would start and stop; do nothing.")
]
DrainOption = Annotated[
    float | None,
    typer.Option(
        "--drain-timeout",
        min=0,
        max=800,
        help="How long requests may run on at an engine that stops, before they continue at "
        "another engine; by default drain_timeout_s of the launch.",
        metavar="SECONDS",
    ),
]


def sleep(
    url: UrlOption = None,
    level: int = typer.Option(
        1,
        min=1,
        max=2,
        help="1 keeps weights in host memory; 2 (native engines) loads them again at wake-up.",
    ),
    mode: Literal["wait", "refuse"] = typer.Option(
        "wait", help="Wait for running requests and leased KV blocks, or refuse to sleep."
    ),
    engine: EngineOption = None,
    admin_api_key: KeyOption = None,
) -> None:
    """Put engines to sleep, to free device memory. Needs enable_sleep_mode."""
    with _commanding(url, admin_api_key) as admin:
        outcomes = api.command_engines(admin, "/sleep", engine or (), level=level, mode=mode)
    _show_memory("given back", outcomes)


def wake(
    url: UrlOption = None,
    tag: list[Tag] | None = typer.Option(None, "--tag", help="Only this pool; may be repeated."),
    engine: EngineOption = None,
    admin_api_key: KeyOption = None,
) -> None:
    """Wake up sleeping engines: they allocate their device memory again and serve."""
    with _commanding(url, admin_api_key) as admin:
        outcomes = api.command_engines(admin, "/wake_up", engine or (), tags=tag or [])
    _show_memory("taken", outcomes)


def restart(name: NamesArgument, url: UrlOption = None, admin_api_key: KeyOption = None) -> None:
    """Restart engines one by one, each after its running requests have ended."""
    failed = False
    with _commanding(url, admin_api_key) as admin:
        # One after the other, so that other engines of a role serve meanwhile.
        for each in dict.fromkeys(name):
            (outcome,) = api.command_engines(admin, "/pdlaunch/restart", [each])
            _show_line(outcome, "serves again")
            failed |= outcome.error is not None
    raise typer.Exit(int(failed))


def drain(
    name: NamesArgument,
    url: UrlOption = None,
    timeout: float = typer.Option(
        600.0,
        min=0,
        max=850,
        help="How long to wait for running requests; they run on in any case. 0: do not wait.",
        metavar="SECONDS",
    ),
    admin_api_key: KeyOption = None,
) -> None:
    """Give engines no new work, and wait until no request runs there. Requests are not moved to
    other engines. An engine stays drained until `pdlaunch undrain`, also after a restart.
    """
    names = " ".join(name)
    said = f"{names}: no new work until `pdlaunch undrain {names}`"
    with _commanding(url, admin_api_key, said) as admin:
        outcomes = api.command_engines(admin, "/pdlaunch/drain", name, timeout_s=f"{timeout:g}")
    for each in outcomes:
        left = f"{each.running} still at work after {timeout:g} s" if each.running else ""
        _show_line(each, f"gets no new work; {left or 'nothing runs there'}")
    raise typer.Exit(int(any(each.error or (timeout and each.running) for each in outcomes)))


def undrain(name: NamesArgument, url: UrlOption = None, admin_api_key: KeyOption = None) -> None:
    """Give engines work again after `pdlaunch drain`."""
    with _commanding(url, admin_api_key) as admin:
        outcomes = api.command_engines(admin, "/pdlaunch/undrain", name)
    for outcome in outcomes:
        _show_line(outcome, "gets work again")
    raise typer.Exit(int(any(outcome.error for outcome in outcomes)))


def scale(
    wanted: list[str] = typer.Argument(
        ...,
        help="Engines of a role: prefill=2 decode=1. Other roles keep their engines.",
        metavar="ROLE=NUMBER",
    ),
    url: UrlOption = None,
    dry_run: DryRunOption = False,
    drain_timeout: DrainOption = None,
    admin_api_key: KeyOption = None,
) -> None:
    """Add and remove engines of a running launch. New engines get requests once their pairs are
    proven. Engines that are removed get no new requests and finish the running ones.
    """
    replicas: dict[str, int] = {}
    for text in wanted:
        role, _, number = text.partition("=")
        if role not in ROLES or not number.isdecimal() or role in replicas:
            form = f"write ROLE=NUMBER, each role of {', '.join(ROLES)} at most once"
            raise typer.BadParameter(f"{text[:80]!a}: {form}", param_hint="ROLE=NUMBER")
        replicas[role] = int(number)
    fields = {"replicas": replicas, "dry_run": dry_run, "drain_timeout_s": drain_timeout}
    _command_launch(url, admin_api_key, "scale", fields)


def role(
    name: str = typer.Argument(..., help="The engine: decode-1.", metavar="NAME"),
    role: Role = typer.Argument(..., help="The new role.", metavar="ROLE"),
    url: UrlOption = None,
    dry_run: DryRunOption = False,
    drain_timeout: DrainOption = None,
    admin_api_key: KeyOption = None,
) -> None:
    """Give an engine of a running launch another role. It finishes its requests and stops; then an
    engine of the new role starts on its host, under a new name.
    """
    fields = {"engine": name, "role": role, "dry_run": dry_run, "drain_timeout_s": drain_timeout}
    _command_launch(url, admin_api_key, "role", fields)


@contextmanager
def _commanding(
    url: str | None, admin_api_key: str | None, on_interrupt: str = ""
) -> Iterator[api.Api]:
    """Yield the admin API. Errors end the command; Ctrl-C prints ``on_interrupt``."""
    try:
        with ending_at_errors():
            yield api.admin_api(url, admin_api_key)
    except KeyboardInterrupt:
        if on_interrupt:
            say(on_interrupt)
        raise


def _show_line(outcome: api.EngineOutcome, done: str) -> None:
    line = f"{outcome.engine}: {outcome.error}" if outcome.error else f"{outcome.engine} {done}"
    print_line(line, "red" if outcome.error else "")
    for note in outcome.notes:
        print_line(f"  {note}", "yellow")


def _show_memory(what: str, outcomes: Sequence[api.EngineOutcome]) -> None:
    for each in outcomes:
        state = "sleeps" if each.is_sleeping else "is awake"
        _show_line(each, f"{state}: {each.num_bytes / GIB:.2f} GiB {what}")
    raise typer.Exit(int(any(each.error for each in outcomes)))


def _command_launch(
    url: str | None, admin_api_key: str | None, name: str, fields: Mapping[str, object]
) -> None:
    """Send a command; print a line for each engine that starts or stops, and the new totals."""
    dry_run = fields.get("dry_run", False)
    with _commanding(url, admin_api_key, "" if dry_run else _GOES_ON) as admin:
        outcome = api.command_launch(admin, name, **fields)
    if (change := outcome.change) is not None:
        for engine in change.starts:
            devices = " ".join(engine.devices)
            threads = counted(engine.num_threads, "thread")
            print_line(f"{engine.name} starts on {engine.host}: {devices}, {threads}")
        for name, number in change.stops.items():
            print_line(f"{name} stops: {number} running")
        if change.stops:
            first = "before others start" if change.stops_first else "last"
            left = f"their running requests get up to {change.drain_s:g} s"
            print_line(f"Engines stop {first}; {left}, then continue at other engines.")
        counts = ", ".join(f"{number} {role}" for role, number in change.replicas.items() if number)
        verb = "would be" if dry_run or outcome.error else "is"
        print_line(f"The launch {verb} {counts}.")
    for note in outcome.notes:
        print_line(f"warning: {note}", "yellow")
    if outcome.error:
        print_line(outcome.error, "red")
        raise typer.Exit(1)
