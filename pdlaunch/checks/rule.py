"""Defines a rule: a function over a ``Context`` that yields what it finds.

::

    @rule("PD109", "warning", fix="...", source="...")
    def too_many_threads(context: Context) -> Iterator[Found]:
        '''One sentence that states what is wrong.

        Why it matters.
        '''
        if context...:
            yield Found("num_threads", "...")

The decorated name is the ``Rule``; ``registry.all_rules`` finds it in its family's file.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from pdlaunch.checks.context import Context, Need
from pdlaunch.machine.facts import Fact

Severity = Literal["error", "warning", "info"]

_FACTS: frozenset[str] = frozenset(get_args(Fact))


@dataclass(frozen=True, slots=True)
class Found:
    """Says one thing that a rule has found."""

    where: str
    """Dotted path of the setting to change, or the name of what is at fault (a variable, a folder,
    a package).
    """
    message: str
    """Says what is wrong here, with the values."""
    fix: str | None = None
    """Says what to do here; None takes the rule's own text."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Holds one finding of a check, ready to be shown."""

    rule: str
    severity: Severity
    where: str
    message: str
    fix: str
    origin: str = ""
    """The place that the setting comes from: ``deploy.yaml:3:5``, ``--port``, ``PDLAUNCH_PORT``.

    Empty for defaults and facts of the machine.
    """


@dataclass(frozen=True, slots=True)
class Rule:
    """Knows one way in which a set-up breaks."""

    code: str
    severity: Severity
    title: str
    """One sentence that states what is wrong."""
    why: str
    fix: str
    source: str
    """The source of the knowledge."""
    needs: tuple[Need, ...]
    """Facts without which the rule cannot say anything; it is then listed as not checked."""
    on_vllm: bool
    """It holds for engines of vLLM, too. Those of the family PD6 are about such engines alone."""
    check: Callable[[Context], Iterable[Found]]

    @property
    def is_of_machine(self) -> bool:
        """Return whether it needs facts of a machine: of several hosts it judges each with the
        engines there.
        """
        return not _FACTS.isdisjoint(self.needs)


def rule(
    code: str,
    severity: Severity,
    *,
    fix: str,
    source: str,
    needs: tuple[Need, ...] = (),
    on_vllm: bool = False,
) -> Callable[[Callable[[Context], Iterable[Found]]], Rule]:
    """Make a rule of a function; its docstring says what is wrong, and why it matters."""

    def make(check: Callable[[Context], Iterable[Found]]) -> Rule:
        title, _, why = inspect.cleandoc(check.__doc__ or "").partition("\n\n")
        return Rule(
            code,
            severity,
            " ".join(title.split()),
            " ".join(why.split()),
            fix,
            source,
            needs,
            on_vllm,
            check,
        )

    return make
