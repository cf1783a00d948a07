"""Gives commands the flags of ``serve``, which all share that take a deployment's configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_type_hints

import typer

from pdlaunch.cli.completion import CONFIG_ENDINGS, Complete, complete_target, value_completion
from pdlaunch.cli.serve_command import ServeCommand
from pdlaunch.config.field_types import Flag
from pdlaunch.config.models import ROUTER
from pdlaunch.config.settings import Setting, all_flags, all_settings, flag_name
from pdlaunch.config.sources import Argument

T = TypeVar("T")
_TARGET = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL|CONFIG",
        help="Model (as --model), or file of the deployment (.yaml, .yml or .json).",
        autocompletion=complete_target,
    ),
]


def with_serve_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a typer command the flags of ``serve``, as ``_with_flags`` says."""
    return _with_flags(command, lambda flag: flag.panel != ROUTER)


def with_router_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a typer command the flags of a router alone, as ``_with_flags`` says."""
    return _with_flags(command, lambda flag: flag.panel == ROUTER or flag.for_router)


def option(default: T, help: str, **more: Any) -> T:
    """Declare a field of a dataclass as an option of a command, for ``with_arguments``."""
    shown = {"show_default": default is not None} | more
    declared: Any = field(default=default, metadata={"option": typer.Option(help=help, **shown)})
    return cast(T, declared)


def with_arguments(kind: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return what gives a typer command an option for each field of a dataclass, which it takes as
    the keyword ``arguments``.
    """
    hints, annotated = get_type_hints(kind), cast(Any, Annotated)
    options = [
        inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=each.default,
            annotation=annotated[hints[each.name], each.metadata["option"]],
        )
        for each in fields(kind)
    ]

    def give(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters.values()

        def call(**values: Any) -> None:
            arguments = kind(**{each.name: values.pop(each.name) for each in options})
            command(**values, arguments=arguments)

        parameters = [*(each for each in own if each.name != "arguments"), *options]
        vars(call)["__signature__"] = inspect.Signature(parameters)
        call.__name__, call.__doc__ = command.__name__, command.__doc__
        return call

    return give


def _with_flags(
    command: Callable[..., None], is_wanted: Callable[[Flag], bool]
) -> Callable[..., None]:
    """Give a typer command the flags that are wanted.

    ``command`` takes a keyword ``flags: dict[str, object]``: the flags that were given, by dotted
    config path, ready for ``config.sources.load_config``. It may take ``config: Path | None``: the
    file of the argument, which may name a model instead. Its other parameters stay as they are.
    ``command_class`` of what is returned is the class that typer is to make of it.
    """
    declared_flags = {path: flag for path, flag in all_flags().items() if is_wanted(flag)}
    own = [
        p.replace(
            kind=inspect.Parameter.KEYWORD_ONLY,
            annotation=_TARGET if p.name == "config" else p.annotation,
        )
        for p in inspect.signature(command, eval_str=True).parameters.values()
        if p.name != "flags"
    ]

    def call(**values: Any) -> None:
        given = {path: _take(flag, values) for path, flag in declared_flags.items()}
        flags = {path: value for path, value in given.items() if value is not None}
        if "config" in values:
            values["config"] = _split_target(values["config"], flags)
        command(**values, flags=flags)

    declared = [_parameters(all_settings()[path], flag) for path, flag in declared_flags.items()]
    # typer reads the signature, so flags are declared without a function that lists them.
    vars(call)["__signature__"] = inspect.Signature([*own, *(p for ps in declared for p in ps)])
    vars(call)["command_class"] = ServeCommand
    call.__name__, call.__doc__ = command.__name__, command.__doc__
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
            arguments.append(flag_name(path, bool(value)))
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


def _split_target(target: str | None, flags: dict[str, object]) -> Path | None:
    """Return the argument as the file that it names; the name of a model goes into ``flags``."""
    if target is None:
        return None
    # The ending alone decides, so that nothing on the disk changes what a command means.
    if target.lower().endswith(CONFIG_ENDINGS):
        return Path(target)
    if "model" in flags:
        raise typer.BadParameter(
            f"the model is given twice: {target} and --model {flags['model']}; leave one out"
        )
    flags["model"] = Argument(target)
    return None


def _take(flag: Flag, values: dict[str, Any]) -> Any:
    """Remove the flag's parameters from ``values`` and return its value, None if not given."""
    name = flag.name.replace("-", "_")
    value = values.pop(name)
    return False if values.pop(f"no_{name}", None) else value
