"""Defines the class of commands that take the flags of ``serve``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from typer.core import TyperCommand

from pdlaunch.cli.vllm_flags import advice

_RICH_FROM_COLUMNS = 96


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
