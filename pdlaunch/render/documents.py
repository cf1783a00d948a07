"""Writes objects as YAML for people and for git: no aliases, texts of several lines as blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _write_text)


def to_yaml(documents: Sequence[Any]) -> str:
    """Return the documents, which a line of ``---`` separates."""
    return yaml.dump_all(
        documents, Dumper=_Dumper, sort_keys=False, width=100, explicit_start=len(documents) > 1
    )
