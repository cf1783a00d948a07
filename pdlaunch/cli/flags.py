"""The flags of ``serve``, defined once; every command that takes a deployment's configuration shares them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

ConfigArgument = Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="YAML file of the deployment.")]


@dataclass(frozen=True, slots=True)
class _Flag:
    option: str
    path: str
    """Dotted path in the config file; ``LaunchConfig`` checks the value."""
    kind: type
    help: str
    metavar: str | None = None
    panel: str = "Engines"

    @property
    def parameter(self) -> str:
        return self.option.removeprefix("--").replace("-", "_")

    def declare(self) -> inspect.Parameter:
        declaration = self.option if self.kind is not bool else f"{self.option}/--no-{self.option.removeprefix('--')}"
        option = typer.Option(declaration, help=self.help, metavar=self.metavar, show_default=False, rich_help_panel=self.panel)
        return inspect.Parameter(
            self.parameter, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[self.kind | None, option]
        )


_FLAGS = (
    _Flag("--model", "model", str, "Alias, directory in Hugging Face layout, or .gguf file [smollm2]."),
    _Flag("--prefill", "prefill.replicas", int, "Number of prefill engines [1].", "N"),
    _Flag("--decode", "decode.replicas", int, "Number of decode engines [1].", "N"),
    _Flag("--prefill-tp", "prefill.tensor_parallel_size", int, "Ranks of a prefill engine [1].", "N"),
    _Flag("--decode-tp", "decode.tensor_parallel_size", int, "Ranks of a decode engine [1].", "N"),
    _Flag("--device", "device", str, "Where the engines run [auto].", "auto|cpu|cuda"),
    _Flag("--dtype", "dtype", str, "Precision of weights and KV cache [auto].", "auto|float32|bfloat16|float16"),
    _Flag("--max-model-len", "max_model_len", int, "Longest prompt plus output [the model's].", "TOKENS"),
    _Flag("--block-size", "block_size", int, "Tokens in a KV block [16].", "TOKENS"),
    _Flag("--kv-cache-memory", "kv_cache_memory", str, "KV cache of one rank, such as 4GiB [1GiB on a CPU].", "SIZE"),
    _Flag("--kv-connector", "kv_transfer.connector", str, "What moves KV blocks [nixl].", "NAME"),
    _Flag("--enable-cumem-allocator", "enable_cumem_allocator", bool, "Allocate weights and KV cache from CuMem pools."),
    _Flag("--enable-sleep-mode", "enable_sleep_mode", bool, "Sleep and wake engines; turns the CuMem allocator on."),
    _Flag("--host", "host", str, "Address of the router [127.0.0.1].", panel="Deployment"),
    _Flag("--port", "port", int, "Port of the router, 0 for a free one [8000].", panel="Deployment"),
    _Flag("--api-key", "api_key", str, "Key that clients must send; PDLAUNCH_API_KEY keeps it out of ps.", "KEY", "Deployment"),
    _Flag("--log-dir", "log_dir", str, "Folder of the log files [a new one a launch].", "DIR", "Deployment"),
    _Flag("--startup-timeout", "startup_timeout_s", float, "Longest time from command to ready [600].", "SECONDS", "Deployment"),
    _Flag("--drain-timeout", "drain_timeout_s", float, "What running requests get at the end [30].", "SECONDS", "Deployment"),
    _Flag("--log-level", "log_level", str, "What the log files hold [info].", "debug|info|warning|error", "Deployment"),
)


def with_serve_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a typer command the flags of ``serve``.

    ``command`` takes a keyword ``flags: dict[str, object]``: the flags that were given, by dotted config path, ready for
    ``config.sources.load_config``. Its other parameters stay as they are.
    """
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "flags"]

    def call(**values: Any) -> None:
        given = {flag.path: values.pop(flag.parameter) for flag in _FLAGS}
        command(**values, flags={path: value for path, value in given.items() if value is not None})

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + [flag.declare() for flag in _FLAGS]
    vars(call)["__signature__"] = inspect.Signature(parameters)
    call.__name__ = command.__name__
    call.__doc__ = command.__doc__
    return call
