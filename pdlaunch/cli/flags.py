"""The flags of ``serve``, defined once; every command that takes a deployment's configuration
shares them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from pdlaunch.config.fields import is_secret
from pdlaunch.config.names import FLAG_PATHS, VARIABLE_PREFIX

ConfigArgument = Annotated[
    Path | None, typer.Argument(metavar="CONFIG", help="YAML file of the deployment.")
]


@dataclass(frozen=True, slots=True)
class _Flag:
    name: str
    """As in ``config.names.FLAG_PATHS``, which says what it sets; ``LaunchConfig`` checks the
    value.
    """
    kind: type
    help: str
    metavar: str | None = None
    panel: str = "Engines"

    @property
    def parameter(self) -> str:
        return self.name.replace("-", "_")

    def declare(self) -> list[inspect.Parameter]:
        """As typer parameters; a switch has a hidden ``--no-`` form, which only matters against
        file and environment.
        """
        if self.kind is bool:
            return [self._parameter(self.name), self._parameter(f"no-{self.name}", hidden=True)]
        return [self._parameter(self.name)]

    def take(self, values: dict[str, Any]) -> Any:
        """Remove its parameters from ``values``; None when it was not given."""
        value = values.pop(self.parameter)
        return False if self.kind is bool and values.pop(f"no_{self.parameter}") else value

    def _parameter(self, name: str, *, hidden: bool = False) -> inspect.Parameter:
        option = typer.Option(
            f"--{name}",
            help=self.help,
            metavar=self.metavar,
            show_default=False,
            rich_help_panel=self.panel,
            hidden=hidden,
        )
        annotated: Any = Annotated  # typed by value, which a type checker takes for a type
        return inspect.Parameter(
            name.replace("-", "_"),
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=annotated[self.kind | None, option],
        )


_FLAGS = (
    _Flag("model", str, "Alias, directory in Hugging Face layout, or .gguf file (smollm2)."),
    _Flag("prefill", int, "Number of prefill engines (1).", "N"),
    _Flag("decode", int, "Number of decode engines (1).", "N"),
    _Flag("prefill-tp", int, "Ranks of a prefill engine (1).", "N"),
    _Flag("decode-tp", int, "Ranks of a decode engine (1).", "N"),
    _Flag("device", str, "auto, cpu or cuda (auto).", "NAME"),
    _Flag("dtype", str, "auto, float32, bfloat16 or float16 (auto).", "NAME"),
    _Flag("max-model-len", int, "Longest prompt plus output (the model's).", "N"),
    _Flag("block-size", int, "Tokens in a KV block (16).", "N"),
    _Flag("kv-cache-memory", str, "KV cache of one rank, such as 4GiB (1GiB on a CPU).", "SIZE"),
    _Flag(
        "kv-offload-memory",
        str,
        "Host memory of one rank for KV blocks, such as 32GiB (none).",
        "SIZE",
    ),
    _Flag("kv-connector", str, "nixl, mooncake or file (nixl).", "NAME"),
    _Flag("kv-file-directory", str, "Shared folder of the file connector.", "DIR"),
    _Flag("enable-cumem-allocator", bool, "Allocate weights and KV cache from CuMem pools."),
    _Flag("enable-sleep-mode", bool, "Sleep and wake engines; turns the CuMem allocator on."),
    _Flag("enforce-eager", bool, "Run decode steps on a GPU without CUDA graphs."),
    _Flag(
        "async-scheduling",
        bool,
        "Prepare a GPU's next step while one runs (on); --no-async-scheduling.",
    ),
    _Flag("host", str, "Address of the router (127.0.0.1).", panel="Deployment"),
    _Flag("port", int, "Port of the router, 0 for a free one (8000).", panel="Deployment"),
    _Flag(
        "api-key",
        str,
        "Key that clients must send; PDLAUNCH_API_KEY keeps it out of ps.",
        "KEY",
        "Deployment",
    ),
    _Flag(
        "admin-api-key",
        str,
        "Key that opens commands over HTTP; or PDLAUNCH_ADMIN_API_KEY.",
        "KEY",
        "Deployment",
    ),
    _Flag(
        "engine-api-key",
        str,
        "Key that opens the engines; or PDLAUNCH_ENGINE_API_KEY.",
        "KEY",
        "Deployment",
    ),
    _Flag(
        "allowed-hosts",
        str,
        "More names of this deployment in URLs, with commas; * for any.",
        "NAMES",
        "Deployment",
    ),
    _Flag(
        "cors-origins",
        str,
        "Origins of web pages that may use it, with commas; * for any.",
        "URLS",
        "Deployment",
    ),
    _Flag("log-dir", str, "Folder of the log files (a new one a launch).", "DIR", "Deployment"),
    _Flag("startup-timeout", float, "Seconds from command to ready (600).", "S", "Deployment"),
    _Flag(
        "drain-timeout",
        float,
        "Seconds that running requests get at the end (30).",
        "S",
        "Deployment",
    ),
    _Flag("log-level", str, "debug, info, warning or error (info).", "NAME", "Deployment"),
)


def with_serve_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a typer command the flags of ``serve``.

    ``command`` takes a keyword ``flags: dict[str, object]``: the flags that were given, by dotted
    config path, ready for ``config.sources.load_config``. Its other parameters stay as they are.
    """
    own = [
        p
        for p in inspect.signature(command, eval_str=True).parameters.values()
        if p.name != "flags"
    ]

    def call(**values: Any) -> None:
        given = {FLAG_PATHS[flag.name]: flag.take(values) for flag in _FLAGS}
        command(**values, flags={path: value for path, value in given.items() if value is not None})

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + [
        p for flag in _FLAGS for p in flag.declare()
    ]
    vars(call)["__signature__"] = inspect.Signature(parameters)
    call.__name__ = command.__name__
    call.__doc__ = command.__doc__
    return call


def to_command_line(flags: Mapping[str, object]) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment of a ``serve`` with these flags (by dotted config path); keys stay
    out of ``ps``.
    """
    arguments: list[str] = []
    environ: dict[str, str] = {}
    for flag in _FLAGS:
        value = flags.get(FLAG_PATHS[flag.name])
        if value is None:
            continue
        if is_secret(FLAG_PATHS[flag.name]):
            environ[f"{VARIABLE_PREFIX}{flag.parameter.upper()}"] = str(value)
        elif flag.kind is bool:
            arguments.append(f"--{flag.name}" if value else f"--no-{flag.name}")
        else:
            arguments += [f"--{flag.name}", str(value)]
    return arguments, environ
