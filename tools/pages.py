"""Prints the pages of the documentation that are made from the code: docs/rules.md by ``python -m
tools.pages rules``, docs/settings.md by ``python -m tools.pages settings``.
"""

from __future__ import annotations

import sys
import textwrap

from pdlaunch.checks.run import all_rules, family
from pdlaunch.config.engine_settings import EngineSettings
from pdlaunch.config.roles import ROLES
from pdlaunch.config.settings import Setting, all_settings

_SETTINGS_HEAD = """\
# Settings

Every setting of a deployment, its default, and the flag and variables that give it. Made by `make
settings` from the fields in `pdlaunch/config`; `pdlaunch check-config --format json` prints the
values of one deployment.

Flags beat variables, variables beat the YAML file, the file beats the defaults. In the file a dot
is a level: `limits.max_connections` is `limits: {max_connections: 4096}`."""
_GROUPS = {
    "Engines": """\
These stand at the top level and hold for all engines. The sections `prefill`, `decode` and
`both` may override each of them for one role: `decode: {block_size: 32}`,
`PDLAUNCH_DECODE__BLOCK_SIZE`.""",
    "Roles": "How many engines a role has.",
    "`kv_transfer`": "How KV blocks get from prefill to decode: [connectors.md](connectors.md).",
    "`routing`": "What a router prefers when it chooses engines: [routing.md](routing.md).",
    "`limits`": "What a router or an engine takes before it refuses requests.",
    "Deployment": "The router and the launch as a whole.",
}
_TABLE_HEAD = (
    "| setting | value | default | what it does | flag and variables |",
    f"|{'---|' * 5}",
)


def settings_page() -> str:
    """Return the text of docs/settings.md: every setting, in groups."""
    groups: dict[str, list[str]] = {title: [] for title in _GROUPS}
    for path, setting in all_settings().items():
        first, _, rest = path.partition(".")
        if first in EngineSettings.model_fields:
            groups["Engines"].append(_row(setting))
        elif first not in ROLES:
            groups[f"`{first}`" if rest else "Deployment"].append(_row(setting))
        # Overrides are not listed but for those with a flag.
        elif setting.flag or rest.partition(".")[0] not in EngineSettings.model_fields:
            groups["Roles"].append(_row(setting))
    lines = [_SETTINGS_HEAD]
    for title, rows in groups.items():
        lines += ["", f"## {title}", "", _GROUPS[title], "", *_TABLE_HEAD, *rows]
    return "\n".join(lines) + "\n"


def _row(setting: Setting) -> str:
    names = [f"`--{setting.flag.name}`"] if setting.flag else []
    names += [f"`{name}`" for name in setting.variables]
    default = f"`{setting.default}`" if setting.default else ""
    cells = (f"`{setting.path}`", f"`{setting.form}`", default, setting.description)
    line = " | ".join(cell.replace("|", r"\|") for cell in (*cells, " ".join(names)))
    return f"| {line} |"


def rules_page() -> str:
    """Return the text of docs/rules.md."""
    lines = [
        "# Rules of `pdlaunch check-config`",
        "",
        "Made by `make rules` from `pdlaunch/checks`; `pdlaunch explain CODE` shows one rule.",
        "Errors keep `serve` from starting; with `--strict` warnings fail a check too.",
    ]
    title = ""
    for rule in all_rules().values():
        if family(rule) != title:
            title = family(rule)
            lines += ["", f"## {rule.code[:3]}xx: {title}"]
        lines += ["", f"### {rule.code} ({rule.severity})", ""]
        lines += [*_wrap(f"**{rule.title}** {rule.why}"), ""]
        lines += _wrap(f"- Fix: {rule.fix}") if rule.fix else []
        lines += _wrap(f"- Source: {rule.source}")
        if rule.needs:
            lines += _wrap(f"- Needs: {', '.join(rule.needs)}")
    return "\n".join(lines) + "\n"


def _wrap(text: str) -> list[str]:
    """Return the lines of a paragraph, or of an item of a list."""
    indent = "  " if text.startswith("- ") else ""
    return textwrap.wrap(
        text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


if __name__ == "__main__":
    sys.stdout.write({"rules": rules_page, "settings": settings_page}[sys.argv[1]]())
