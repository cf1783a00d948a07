"""``pdlaunch explain``: show why a rule of check-config exists, and how to fix its findings."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.text import Text

from pdlaunch.checks.run import all_rules, family
from pdlaunch.cli import EXIT_UNUSABLE
from pdlaunch.cli.output import print_errors
from pdlaunch.config.problems import nearest, shown_name


def explain(
    code: str | None = typer.Argument(
        None, metavar="CODE", help="A rule such as PD204; all are listed without it."
    ),
) -> None:
    """Show a rule, or list all of them."""
    rules, console = all_rules(), Console()
    if code is None:
        for rule in rules.values():
            console.print(Text(f"{rule.code} {rule.severity:<8}{rule.title}"))
    elif found := rules.get(code.upper()):
        head = f"{found.code} ({found.severity}, {family(found).lower()})"
        console.print(Text(head, style="bold"), Text(found.title), sep="\n")
        for heading, text in (("Why", found.why), ("Fix", found.fix), ("Source", found.source)):
            if text:
                console.print(Text(f"\n{heading}", style="bold"), Text(text), sep="\n")
    else:
        match = nearest(code.upper().replace("O", "0"), rules)  # no code has the letter
        hint = f"; did you mean {match}?" if match else "; `pdlaunch explain` lists all"
        print_errors([f"there is no rule {shown_name(code)}{hint}"])
        raise typer.Exit(EXIT_UNUSABLE)
