"""Lists the commands. Each is imported only when it is called, so that help comes fast."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import typer

_UNUSABLE = "2 the input is unusable"


@dataclass(frozen=True, slots=True)
class Command:
    """Names a command and where it lives: ``module:attribute``, which is a function, or a
    ``typer.Typer`` where ``is_group``.
    """

    name: str
    target: str
    summary: str
    is_group: bool = False
    exit_codes: str = f"0 done, 1 failed, {_UNUSABLE}, 130 interrupted"

    def load(self) -> Any:
        module, attribute = self.target.split(":")
        return getattr(importlib.import_module(module), attribute)


COMMANDS = (
    Command(
        "serve",
        "pdlaunch.cli.serve:serve",
        "Start prefill and decode engines behind one router.",
        exit_codes=f"0 served and stopped, 1 failed, {_UNUSABLE}, 130 interrupted before it served",
    ),
    Command(
        "agent",
        "pdlaunch.cli.agent:agent",
        "Run engines on this host for a `pdlaunch serve` on another one.",
        exit_codes=f"0 told to leave, 1 refused or without a supervisor, {_UNUSABLE}",
    ),
    Command(
        "router",
        "pdlaunch.cli.router:router",
        "Route requests to engines that run already.",
        exit_codes=f"0 served and stopped, 1 failed, {_UNUSABLE}",
    ),
    Command(
        "check-config",
        "pdlaunch.cli.check_config:check_config",
        "Find what is wrong with a set-up before it runs.",
        exit_codes=(
            "0 no errors (with --strict: nor warnings), 1 findings that fail the check, "
            f"{_UNUSABLE}, 130 interrupted"
        ),
    ),
    Command(
        "doctor",
        "pdlaunch.cli.doctor:doctor",
        "Find what is wrong with engines of vLLM that run already.",
        exit_codes=(
            "0 no errors (with --strict: nor warnings), 1 findings that fail the check, "
            f"{_UNUSABLE}, 130 interrupted"
        ),
    ),
    Command(
        "probe",
        "pdlaunch.cli.probe:probe",
        "Describe this machine in JSON, for checks on another one.",
    ),
    Command(
        "explain",
        "pdlaunch.cli.explain:explain",
        "Show why a rule of check-config exists and how to fix its findings.",
    ),
    Command(
        "render",
        "pdlaunch.cli.render:app",
        "Write a deployment for Kubernetes or docker compose.",
        is_group=True,
    ),
    Command(
        "smoke",
        "pdlaunch.cli.smoke:smoke_command",
        "Start a deployment, check what it promises, stop it; for CI.",
    ),
    Command("status", "pdlaunch.cli.status:status", "Show what a deployment is doing."),
    Command("top", "pdlaunch.cli.top:top", "Watch a deployment in the terminal, as it changes."),
    Command(
        "sleep",
        "pdlaunch.cli.engines:sleep",
        "Have a deployment's engines give their device memory back.",
    ),
    Command("wake", "pdlaunch.cli.engines:wake", "Wake the engines of a deployment up."),
    Command(
        "restart", "pdlaunch.cli.engines:restart", "Have engines of a deployment started anew."
    ),
    Command("scale", "pdlaunch.cli.engines:scale", "Add or remove engines of a deployment."),
    Command("role", "pdlaunch.cli.engines:role", "Give an engine of a deployment another role."),
    Command("drain", "pdlaunch.cli.engines:drain", "Give engines of a deployment no new work."),
    Command("undrain", "pdlaunch.cli.engines:undrain", "Give drained engines work again."),
    Command(
        "trace",
        "pdlaunch.cli.trace:trace",
        "Show what became of a request, over all processes.",
    ),
    Command(
        "bench",
        "pdlaunch.cli.bench:app",
        "Measure a deployment, or one part of it beside what the machine allows.",
        is_group=True,
    ),
    Command(
        "config",
        "pdlaunch.cli.config_cmd:app",
        "Show the resolved configuration or its JSON schema.",
        is_group=True,
    ),
)

_NAME = "pdlaunch"
_COMPLETION_VARIABLE = "_PDLAUNCH_COMPLETE"


def build_app(arguments: Sequence[str], commands: Sequence[Command] = COMMANDS) -> typer.Typer:
    """Return the typer app for these arguments: the command that they name is imported, the others
    are only listed.
    """
    app = typer.Typer(
        name=_NAME,
        help="Launch disaggregated prefill/decode LLM serving with one command.",
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    # Importing one command takes up to a second; help lists the others by the table alone.
    words = _words_to_complete() if _COMPLETION_VARIABLE in os.environ else arguments
    called = next((word for word in words if not word.startswith("-")), None)
    for command in commands:
        loaded = command.load() if command.name == called else None
        if command.is_group:
            app.add_typer(
                loaded or typer.Typer(callback=_placeholder),
                name=command.name,
                help=command.summary,
            )
        else:
            kind = getattr(loaded, "command_class", None)
            app.command(
                command.name,
                help=inspect.getdoc(loaded) if loaded else command.summary,
                short_help=command.summary,
                epilog=f"Exit codes: {command.exit_codes}.",
                cls=kind,
            )(loaded or _placeholder)
    return app


def run() -> None:
    """Run the command that the arguments of this process name."""
    build_app(sys.argv[1:])(prog_name=_NAME)


def _words_to_complete() -> list[str]:
    """Return the words behind ``pdlaunch`` that a shell wants completed."""
    line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS", "")
    return line.split()[1:]


def _print_version(wanted: bool) -> None:
    if wanted:
        from pdlaunch import __version__

        typer.echo(f"pdlaunch {__version__}")
        raise typer.Exit


def _root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Show the version."
    ),
) -> None:
    pass


def _placeholder() -> None:
    """Stand in for a command that was not called; only its name and summary are shown."""
