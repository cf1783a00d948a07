"""Defines the class of commands that take the flags of ``serve``, and says what to do instead of a
flag of ``vllm serve`` that pdlaunch does not have.

Flags of the same name and meaning need no entry. Source: the flags of vLLM 0.32
(``vllm/engine/arg_utils.py``, ``vllm/entrypoints/launchers/cli_args.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from typer.core import TyperCommand

from pdlaunch.config.settings import all_flags, all_settings, flag_name, variable_name

_RICH_FROM_COLUMNS = 96
_BOTH_ROLES = "use --tensor-parallel-size, or --prefill-tp and --decode-tp"
_MANY_ENGINES = "--prefill N and --decode N start several engines behind one router"
_OWN_FILES = "the files of the model itself are used"
_FOR_VLLM = "with engine: vllm it goes into engine_args of the file"
_UNQUANTIZED = f"weights are served unquantized, a .gguf file too; {_FOR_VLLM}"

INSTEAD = {
    "-tp": _BOTH_ROLES,
    "--tp": _BOTH_ROLES,
    "-dp": _MANY_ENGINES,
    "--data-parallel-size": _MANY_ENGINES,
    "--kv-cache-memory-bytes": "use --kv-cache-memory",
    "--num-gpu-blocks-override": "use --kv-cache-memory",
    "--kv-offloading-size": "use --kv-offload-memory, for each rank",
    "--kv-transfer-config": "pdlaunch wires prefill and decode itself; --kv-connector chooses the "
    "connector, the section kv_transfer of the file has its settings",
    "--shutdown-timeout": "use --drain-timeout",
    "--allowed-origins": "use --cors-origins",
    "--max-num-queued-reqs": "set limits.max_queued_requests in the file",
    "--config": "give the YAML file as the argument: pdlaunch serve FILE.yaml",
    "--download-dir": "set the variable HF_HOME",
    "--hf-token": "set the variable HF_TOKEN",
    "--device-ids": "set the variable CUDA_VISIBLE_DEVICES",
    "--seed": "send `seed` with a request",
    "--enable-chunked-prefill": "long prompts are always computed in parts; "
    "--max-num-batched-tokens sets how much one step takes",
    "--disable-log-requests": "requests are not logged; use --log-level",
    "--uvicorn-log-level": "use --log-level",
    "--tokenizer": _OWN_FILES,
    "--tokenizer-revision": _OWN_FILES,
    "--hf-config-path": _OWN_FILES,
    "--chat-template": _OWN_FILES,
    "--trust-remote-code": f"code that comes with a model is never run; {_FOR_VLLM}",
    "--quantization": _UNQUANTIZED,
    "-q": _UNQUANTIZED,
    "--ssl-keyfile": "a proxy in front of the router has to end TLS",
    "--ssl-certfile": "a proxy in front of the router has to end TLS",
}
"""Flags of vLLM that have another name here, with the way to the same end."""


class ServeCommand(TyperCommand):
    """Is a command with the flags of ``serve``: many, some of them long, some known by the names
    that vLLM gives them.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:
        # In fewer columns rich cuts the names of flags off.
        if Console().width < _RICH_FROM_COLUMNS:
            self.rich_markup_mode = None
        super().format_help(ctx, formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write help without rich, under the same headings."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                panel = getattr(parameter, "rich_help_panel", None)
                default = "Arguments" if parameter.param_type_name == "argument" else "Options"
                panels.setdefault(panel or default, []).append(record)
        for name, records in panels.items():
            with formatter.section(name):
                formatter.write_dl(records)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            # By its name: typer brings a click of its own, or uses the installed one.
            if type(error).__name__ == "NoSuchOption":
                _explain(error, given)
            raise


def _explain(error: Any, arguments: Sequence[str]) -> None:
    """Add to a NoSuchOption what to do instead, where the option is one of vLLM's."""
    for argument in arguments:
        name = argument.partition("=")[0]
        # Of -tp the parser names -t alone.
        wanted = name if name.startswith("--") else name[:2]
        instead = advice(name) if wanted == error.option_name else None
        if instead is not None:
            error.message = f"No such option: {name}; {instead}"
            error.possibilities = None
            return


def advice(name: str) -> str | None:
    """Say what to do instead of vLLM's flag ``name``; None where nothing is known of it."""
    if name.startswith("--no-"):
        name = f"--{name.removeprefix('--no-')}"
    path = name.removeprefix("--").replace("-", "_")
    if path in all_flags():
        return f"did you mean {flag_name(path)}?"
    if path in all_settings():
        return f"set {path} in the file, or the variable {variable_name(path)}"
    return INSTEAD.get(name)
