"""``pdlaunch explain``: show why a rule of check-config exists, and how to fix its findings."""

from __future__ import annotations

import sys
import textwrap
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pdlaunch.checks.rule import Rule
from pdlaunch.checks.run import all_rules, family
from pdlaunch.cli import EXIT_UNUSABLE
from pdlaunch.cli.flags import complete_rule
from pdlaunch.cli.output import safe
from pdlaunch.config.problems import nearest, shown_name


def explain(
    code: Annotated[
        str | None,
        typer.Argument(
            metavar="CODE",
            help="A rule such as PD204; all are listed without it.",
            autocompletion=complete_rule,
        ),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/rules.md.")] = False,
) -> None:
    """Show a rule, or list all of them."""
    rules = all_rules()
    if markdown:
        typer.echo(rules_markdown(rules), nl=False)
    elif code is None:
        _print_list(Console(), rules)
    elif code.upper() in rules:
        _print_rule(Console(), rules[code.upper()])
    else:
        match = nearest(code.upper().replace("O", "0"), rules)  # no code has the letter
        hint = f"; did you mean {match}?" if match else "; `pdlaunch explain` lists all"
        Console(file=sys.stderr).print(
            Text(f"error: there is no rule {safe(shown_name(code))}{hint}", style="red")
        )
        raise typer.Exit(EXIT_UNUSABLE)


def rules_markdown(rules: dict[str, Rule]) -> str:
    """Return the text of docs/rules.md."""
    lines = [
        "# Rules of `pdlaunch check-config`",
        "",
        "Made by `make rules` from `pdlaunch/checks`; `pdlaunch explain CODE` shows one rule.",
        "Errors keep `serve` from starting; with `--strict` warnings fail a check too.",
    ]
    title = ""
    for rule in rules.values():
        if family(rule) != title:
            title = family(rule)
            lines += ["", f"## {rule.code[:3]}xx: {title}"]
        lines += ["", f"### {rule.code} ({rule.severity})", ""]
        lines += [*_wrap(f"**{rule.title}** {rule.why}"), ""]
        lines += _wrap(f"- Fix: {rule.fix}") + _wrap(f"- Source: {rule.source}")
        if rule.needs:
            lines += _wrap(f"- Needs: {', '.join(rule.needs)}")
    return "\n".join(lines) + "\n"


def _wrap(text: str) -> list[str]:
    """Return the lines of a paragraph, or of an item of a list."""
    indent = "  " if text.startswith("- ") else ""
    return textwrap.wrap(
        text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _print_list(console: Console, rules: dict[str, Rule]) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("rule", "severity", "what is wrong"):
        table.add_column(heading, no_wrap=heading != "what is wrong")
    for rule in rules.values():
        table.add_row(rule.code, rule.severity, Text(rule.title))
    console.print(table)


def _print_rule(console: Console, rule: Rule) -> None:
    console.print(Text(f"{rule.code} ({rule.severity}, {family(rule).lower()})", style="bold"))
    console.print(Text(rule.title))
    sections = (("Why", rule.why), ("Fix", rule.fix), ("Source", rule.source))
    for heading, text in sections:
        if text:
            console.print(Text(f"\n{heading}", style="bold"))
            console.print(Text(text))
