"""The flags of ``serve``, which every command shares that takes a deployment's configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from pdlaunch.cli.completion import Complete, value_completion
from pdlaunch.cli.vllm_flags import ServeCommand
from pdlaunch.config.field_types import Flag
from pdlaunch.config.settings import Setting, all_flags, all_settings

ConfigArgument = Annotated[
    Path | None, typer.Argument(metavar="CONFIG", help="YAML file of the deployment.")
]


def with_serve_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a typer command the flags of ``serve``.

    ``command`` takes a keyword ``flags: dict[str, object]``: the flags that were given, by dotted
    config path, ready for ``config.sources.load_config``. Its other parameters stay as they are.
    ``command_class`` of what is returned is the class that typer is to make of it.
    """
    own = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for p in inspect.signature(command, eval_str=True).parameters.values()
        if p.name != "flags"
    ]

    def call(**values: Any) -> None:
        given = {path: _take(flag, values) for path, flag in all_flags().items()}
        command(**values, flags={path: value for path, value in given.items() if value is not None})

    declared = [_parameters(all_settings()[path], flag) for path, flag in all_flags().items()]
    # typer reads the signature, so flags are declared without a function that lists them.
    vars(call)["__signature__"] = inspect.Signature([*own, *(p for ps in declared for p in ps)])
    vars(call)["command_class"] = ServeCommand
    call.__name__ = command.__name__
    call.__doc__ = command.__doc__
    return call


def to_command_line(flags: Mapping[str, object]) -> tuple[list[str], dict[str, str]]:
    """Return arguments and environment of a ``serve`` with these flags (by dotted config path).

    Keys go into the environment, so that ``ps`` does not show them.
    """
    arguments: list[str] = []
    environ: dict[str, str] = {}
    for path, flag in all_flags().items():
        value, setting = flags.get(path), all_settings()[path]
        if value is None:
            continue
        if setting.is_secret:
            environ[setting.variables[0]] = str(value)
        elif setting.is_switch:
            arguments.append(f"--{flag.name}" if value else f"--no-{flag.name}")
        else:
            arguments += [f"--{flag.name}", str(value)]
    return arguments, environ


def _parameters(setting: Setting, flag: Flag) -> list[inspect.Parameter]:
    """Declare a flag as typer parameters.

    A switch has a hidden ``--no-`` form, which matters only against file and environment.
    """
    if setting.is_switch:
        return [_parameter(flag, flag.name, bool), _parameter(flag, f"no-{flag.name}", bool)]
    kind = next((kind for kind in (int, float) if kind in setting.kinds), str)
    kind = str if setting.is_size else kind
    return [_parameter(flag, flag.name, kind, value_completion(setting))]


def _parameter(
    flag: Flag, name: str, kind: type, complete: Complete | None = None
) -> inspect.Parameter:
    option = typer.Option(
        f"--{name}",
        help=flag.help,
        metavar=None if kind is bool else flag.metavar,
        show_default=False,
        rich_help_panel=flag.panel,
        hidden=name != flag.name,
        autocompletion=complete,
    )
    annotated: Any = Annotated  # typed by value, which a type checker takes for a type
    return inspect.Parameter(
        name.replace("-", "_"),
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=annotated[kind | None, option],
    )


def _take(flag: Flag, values: dict[str, Any]) -> Any:
    """Remove the flag's parameters from ``values`` and return its value, None if not given."""
    name = flag.name.replace("-", "_")
    value = values.pop(name)
    return False if values.pop(f"no_{name}", None) else value
