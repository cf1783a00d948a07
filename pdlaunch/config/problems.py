"""Problems of a configuration, which are collected so that users see all of them at once."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from pdlaunch.errors import ConfigError

MAX_SHOWN_CHARACTERS = 80
MAX_PATH_CHARACTERS = 4096  # No system opens a longer path


@dataclass(frozen=True, slots=True)
class Problem:
    """Describes a mistake in the configuration, its place and its fix."""

    message: str
    field: str | None = None  # The dotted path in the configuration
    value: str | None = None  # The value for messages; never a secret
    fix: str | None = None
    where: str | None = None  # ``deploy.yaml:3:5``, ``PDLAUNCH_PORT`` or ``--port``

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        name = (self.where or "").removeprefix("--").lower().removeprefix("pdlaunch_")
        plain, field = re.sub(r"[-.]|__", "_", name), self.field or ""
        is_named = not field or self.where == field or plain == field.replace(".", "_")
        fix = f"; {self.fix}" if self.fix else ""
        return f"{place}{'' if is_named else f'{field}: '}{self.message}{fix}"


class InvalidConfigError(ConfigError):
    """A configuration cannot be used; ``problems`` has all problems, ordered by source."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        assert problems
        first = problems[0]
        super().__init__(
            "\n".join(map(str, problems)), field=first.field, value=first.value, fix=first.fix
        )
        self.problems = tuple(problems)


def shown(value: object) -> str:
    """Return a value for a message: quoted, escaped and short, whatever bytes it holds."""
    if (
        isinstance(value, int)
        and not isinstance(value, bool)
        and abs(value) > 10**MAX_SHOWN_CHARACTERS
    ):
        return "a very large number"
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[: MAX_SHOWN_CHARACTERS - 3]}..."


def shown_name(name: str, max_characters: int = MAX_SHOWN_CHARACTERS) -> str:
    """Return a name for a message: escaped and short, without quotes."""
    text = name if name and name.isprintable() else ascii(name)[1:-1] or "''"
    return text if len(text) <= max_characters else f"{text[: max_characters - 3]}..."


def shown_path(path: Path | str) -> str:
    """Return the path of a file for a message: escaped but whole, so people and tools find it."""
    return shown_name(str(path), MAX_PATH_CHARACTERS)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name most similar to ``name``; None if none is similar."""
    matches = get_close_matches(name[:MAX_SHOWN_CHARACTERS], list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None
