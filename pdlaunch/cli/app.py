"""Lists the commands. A command is imported only when it is called, so that help is fast."""

import importlib
import inspect
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import typer

_DONE = "0 done, 1 failed, 2 unusable input, 130 interrupted"
_SERVED = "0 served and stopped, 1 failed, 2 unusable input, 130 interrupted before it served"
_CHECKED = (
    "0 no errors (with --strict: nor warnings), 1 findings that fail the check, 2 unusable input, "
    "130 interrupted"
)


class Command(NamedTuple):
    """A command. ``target`` is ``module:attribute`` in ``pdlaunch.cli``: a function, or a
    ``typer.Typer`` called ``app``.
    """

    name: str
    target: str
    summary: str
    exit_codes: str = _DONE
    examples: str = ""

    def load(self) -> Any:
        module, attribute = self.target.split(":")
        return getattr(importlib.import_module(f"pdlaunch.cli.{module}"), attribute)


COMMANDS = (
    Command(
        "serve",
        "serve:serve",
        "Start prefill and decode engines behind one router.",
        _SERVED,
        "pdlaunch serve\npdlaunch serve Qwen/Qwen3-0.6B --port 9000\n"
        "pdlaunch serve --engine vllm --decode 2 Qwen/Qwen3-8B\n"
        "pdlaunch serve deployment.yaml --dry-run",
    ),
    Command("agent", "joining:agent", "Run engines on this host for a launch on another one."),
    Command("router", "router:router", "Route requests to running engines.", _SERVED),
    Command("check-config", "check_config:check_config", "Find faults of a launch.", _CHECKED),
    Command("doctor", "doctor:doctor", "Find faults of running engines.", _CHECKED),
    Command("explain", "check_config:explain", "Show why a rule exists, and its fix."),
    Command("render", "render:app", "Write a deployment for Kubernetes."),
    Command("status", "status:status", "Show what a deployment is doing."),
    Command("top", "status:top", "Watch a deployment in the terminal, as it changes."),
    Command("sleep", "engines:sleep", "Put engines to sleep, to free their device memory."),
    Command("wake", "engines:wake", "Wake up the engines of a deployment."),
    Command("restart", "engines:restart", "Restart engines of a deployment."),
    Command("scale", "engines:scale", "Add or remove engines of a deployment."),
    Command("role", "engines:role", "Give an engine of a deployment another role."),
    Command("drain", "engines:drain", "Give engines of a deployment no new work."),
    Command("undrain", "engines:undrain", "Give drained engines work again."),
    Command("trace", "trace:trace", "Show how a request went through all processes."),
    Command("bench", "bench:app", "Measure a deployment, or pulls of KV blocks alone."),
    Command(
        "verdict",
        "verdict:verdict",
        "Measure whether disaggregation pays on this machine.",
        examples="pdlaunch verdict deploy.yaml --gpus 4 --slo ttft=2000,itl=50 --trace trace.jsonl",
    ),
)

_NAME = "pdlaunch"


def build_app(arguments: Sequence[str], commands: Sequence[Command] = COMMANDS) -> typer.Typer:
    """Return the typer app for these arguments. Imports only the command that they name."""
    app = typer.Typer(
        name=_NAME,
        help="Launch disaggregated prefill/decode LLM serving with one command.",
        no_args_is_help=True,
        add_completion=False,
        # rich truncates the names of long flags on terminals with fewer than 96 columns.
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    # Importing a command takes up to a second; help takes the other commands from the table.
    called = next((word for word in arguments if not word.startswith("-")), None)
    for command in commands:
        name, summary = command.name, command.summary
        loaded = command.load() if name == called else None
        if command.target.endswith(":app"):
            group = loaded or typer.Typer(callback=_placeholder)
            app.add_typer(group, name=name, help=summary)
            continue
        # click keeps the lines of a paragraph that begins with \b.
        examples = f"\b\nExamples:\n{command.examples}\n\n" if command.examples else ""
        app.command(
            name,
            help=inspect.getdoc(loaded) if loaded else summary,
            short_help=summary,
            epilog=f"{examples}Exit codes: {command.exit_codes}.",
            cls=getattr(loaded, "command_class", None),
        )(loaded or _placeholder)
    return app


def run() -> None:
    """Run the command in the arguments of this process."""
    build_app(sys.argv[1:])(prog_name=_NAME)


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
    """Stand in for a command that was not called; help shows its name and summary."""
