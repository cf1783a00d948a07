"""Gives commands the flags of ``serve``."""

import inspect
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from pdlaunch.config.field_types import Flag
from pdlaunch.config.models import ROUTER
from pdlaunch.config.settings import Setting, all_flags, all_settings, flag_name, variable_name
from pdlaunch.config.vllm_arguments import OURS, REFUSED, vllm_flag_name

# Endings of a file with settings, as opposed to a model
CONFIG_ENDINGS = (".yaml", ".yml", ".json")


# Settings, by path, whose flags the short help shows
_COMMON = frozenset(
    (
        *("model", "engine", "prefill.replicas", "decode.replicas", "both.replicas"),
        *("tensor_parallel_size", "max_model_len", "gpu_memory_utilization", "device"),
        *("served_model_name", "host", "port", "api_key"),
    )
)
_HELP_ALL = "--help-all"
_MANY = 20  # with fewer uncommon flags, help shows all
_KEPT_HYPHEN = "\u2011"


class ServeCommand(TyperCommand):
    """A command with the flags of ``serve``; its short help shows only the common flags."""

    is_whole = False

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the common flags, or all flags, under their headings."""
        panels: dict[str, list[tuple[str, str]]] = {}
        common = {flag.name for path, flag in all_flags().items() if path in _COMMON}
        shown = [(each, record) for each in self.get_params(ctx) if (record := _record(each, ctx))]
        of_panels = {each: getattr(each, "rich_help_panel", None) for each, _ in shown}
        names = {each: str(each.name).replace("_", "-") for each in of_panels}
        others = [each for each, panel in of_panels.items() if panel and names[each] not in common]
        hidden = [] if self.is_whole or len(others) < _MANY else others
        for parameter, record in shown:
            if parameter not in hidden:
                default = "Arguments" if parameter.param_type_name == "argument" else "Options"
                panels.setdefault(of_panels[parameter] or default, []).append(record)
        for name, records in panels.items():
            with formatter.section(name):
                formatter.write_dl(records)
        if hidden:
            formatter.write_paragraph()
            formatter.write_text(f"{_HELP_ALL} shows {len(hidden)} more flags.")
        formatter.buffer = [text.replace(_KEPT_HYPHEN, "-") for text in formatter.buffer]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if _HELP_ALL in args:
            self.is_whole, args = True, ["--help"]
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            # Compared by name: typer may have its own copy of click.
            if type(error).__name__ == "NoSuchOption":
                unknown: Any = error
                if instead := _advice(unknown.option_name, is_like=bool(unknown.possibilities)):
                    unknown.message, unknown.possibilities = f"{error}; {instead}", None
            raise


def _record(parameter: Any, ctx: Any) -> tuple[str, str] | None:
    """Return a parameter's help line, whose flags do not wrap at hyphens."""
    if (record := parameter.get_help_record(ctx)) is None:
        return None
    first, second = (re.sub(r"(?<=-)-|-(?=[\w-])", _KEPT_HYPHEN, text) for text in record)
    return first, second


def _advice(name: str, *, is_like: bool) -> str:
    """Return what to write instead of an unknown flag; empty if it ``is_like`` a known flag."""
    path = name.removeprefix("--").removeprefix("no-").replace("-", "_")
    if path in all_flags():
        return f"did you mean {flag_name(path)}?"
    if path in all_settings():
        return f"set {path} in the file, or the variable {variable_name(path)}"
    flag = vllm_flag_name(name).removeprefix("no-")
    if instead := OURS.get(flag):
        return f"this is a flag of vLLM: {instead}"
    if why_not := REFUSED.get(flag):
        return f"pdlaunch does not take this flag of vLLM: {why_not}"
    return "" if is_like else "write flags of vLLM into engine_args of the file"


_TARGET = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL|CONFIG",
        help="Model (as --model), or file of the deployment (.yaml, .yml or .json).",
    ),
]


def _with_flags(
    is_wanted: Callable[[Flag], bool], command: Callable[..., None]
) -> Callable[..., None]:
    """Give a typer command the flags for which ``is_wanted`` returns True.

    ``command`` has a keyword ``flags: dict[str, object]``: dotted config path -> value of each
    given flag, for ``config.sources.load_config``. It may have ``config: Path | None``: the file in
    the argument, which may name a model instead. Its other parameters are unchanged. The returned
    function has an attribute ``command_class``: the class that typer has to use for it.
    """
    declared_flags = {path: flag for path, flag in all_flags().items() if is_wanted(flag)}
    own = dict(inspect.signature(command, eval_str=True).parameters)
    del own["flags"]
    if "config" in own:
        own["config"] = own["config"].replace(annotation=_TARGET)
    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own.values()]

    def call(**values: Any) -> None:
        given = {path: _take(flag, values) for path, flag in declared_flags.items()}
        flags = {path: value for path, value in given.items() if value is not None}
        if "config" in values:
            values["config"] = _split_target(values["config"], flags)
        command(**values, flags=flags)

    for path, flag in declared_flags.items():
        parameters += _parameters(all_settings()[path], flag)
    # typer reads the signature, so no function has to list the flags as parameters.
    vars(call)["__signature__"] = inspect.Signature(parameters)
    vars(call)["command_class"] = ServeCommand
    call.__name__, call.__doc__ = command.__name__, command.__doc__
    return call


# Decorators that give a typer command the flags of ``serve`` or ``router``; see ``_with_flags``
with_serve_flags = partial(_with_flags, lambda flag: flag.panel != ROUTER)
with_router_flags = partial(_with_flags, lambda flag: flag.panel == ROUTER or flag.for_router)


def refuse_address(flags: Mapping[str, object]) -> None:
    """Raise typer's BadParameter for --host or --port of a deployment that a command starts."""
    if given := [flag_name(path) for path in ("host", "port") if path in flags]:
        why = "this command's deployment listens on a free port of 127.0.0.1"
        raise typer.BadParameter(f"{', '.join(given)}: {why}")


def _parameters(setting: Setting, flag: Flag) -> list[inspect.Parameter]:
    if setting.is_switch:
        return [_parameter(flag, flag.name, bool), _parameter(flag, f"no-{flag.name}", bool)]
    is_number = not setting.is_size
    kind = next((kind for kind in (int, float) if is_number and kind in setting.kinds), str)
    return [_parameter(flag, flag.name, kind)]


def _parameter(flag: Flag, name: str, kind: type) -> inspect.Parameter:
    option = typer.Option(
        f"--{name}",
        help=flag.help,
        metavar=None if kind is bool else flag.metavar,
        show_default=False,
        rich_help_panel=flag.panel,
        hidden=name != flag.name,
    )
    annotated: Any = Annotated  # as Any, because the type of the option is a value here
    how, kind = inspect.Parameter.KEYWORD_ONLY, annotated[kind | None, option]
    return inspect.Parameter(name.replace("-", "_"), how, default=None, annotation=kind)


def _split_target(target: str | None, flags: dict[str, object]) -> Path | None:
    """Return the argument if it is a file; the name of a model goes into ``flags`` instead."""
    if target is None:
        return None
    # Only the ending decides, so that files on the disk never change the meaning of a command.
    if target.lower().endswith(CONFIG_ENDINGS):
        return Path(target)
    if "model" in flags:
        both = f"{target} and --model {flags['model']}"
        raise typer.BadParameter(f"the model is given twice: {both}; leave one out")
    flags["model"] = target
    return None


def _take(flag: Flag, values: dict[str, Any]) -> Any:
    """Remove the flag's parameters from ``values`` and return its value, None if not given."""
    name = flag.name.replace("-", "_")
    value = values.pop(name)
    return False if values.pop(f"no_{name}", None) else value
