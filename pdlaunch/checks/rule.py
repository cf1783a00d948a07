"""Defines a rule: a row with a fault, its place, its reason and its fix.

::

    error("PD108", "block_size is not allowed by the attention backend of the device.",
        "Paged attention kernels on CUDA read the KV cache in tiles of 16 tokens.",
        over=on_cuda, when=lambda each: each.settings.block_size % 16, at="block_size",
        message="block_size {0.settings.block_size} is not a multiple of 16, as CUDA needs",
        fix="Use a multiple of 16.", source="FlashAttention.", needs=("gpus",)),

``when`` is called with each item of ``over``, or with the whole context. It returns True for the
row's ``message``, in which ``{0}`` is the item (``{0}`` and ``{1}``: the two items of a pair);
another message; or one or several ``Found``. ``at`` is a setting (if the role overrides it, the
role's own setting is shown), a variable (``$UCX_TLS``), or any other name.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from pdlaunch.checks.context import Context, Need
from pdlaunch.machine.facts import Fact
from pdlaunch.planning.role_engines import RoleEngines

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)

_FACTS: frozenset[str] = frozenset(get_args(Fact))


@dataclass(frozen=True, slots=True)
class Found:
    """One finding of a rule; an empty field has the value in the rule's row."""

    message: str = ""
    at: str = ""
    fix: str | None = ""


# The result of ``when``: a false value for no finding, True, a message, or findings
Outcome = Found | Iterable[Found | str] | str | int | None


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding of a check, with all its texts."""

    rule: str
    severity: Severity
    # Dotted path of the setting to change, or the name of a variable, folder or package
    where: str
    message: str
    fix: str
    origin: str = ""
    """Where the setting was given: ``deploy.yaml:3:5``, ``--port``, ``PDLAUNCH_PORT``.

    Empty for defaults and facts of the machine.
    """


@dataclass(frozen=True, slots=True)
class Rule:
    """One way in which a deployment can fail."""

    code: str
    severity: Severity
    title: str  # a sentence that states the fault
    why: str
    fix: str  # empty: nothing to fix
    source: str  # where this is known from
    when: Callable[[Any], Outcome]
    over: Callable[[Context], Iterable[Any]] = lambda context: (context,)
    at: str = ""
    message: str = ""
    # Facts that the rule needs; if one is unknown, the rule is listed as not checked
    needs: tuple[Need, ...] = ()
    # The rule applies to engines of vLLM too. Rules of the family PD6 apply only to those.
    on_vllm: bool = False

    @property
    def is_of_machine(self) -> bool:
        """Return True if the rule needs facts of a machine; it then judges each host alone."""
        return not _FACTS.isdisjoint(self.needs)

    def missing(self, context: Context) -> tuple[Need, ...]:
        """Return the unknown facts that the rule needs."""
        return tuple(need for need in self.needs if need in context.missing)

    def apply(self, context: Context) -> list[Finding]:
        if self.missing(context):
            return []
        # A setting of the top level is found once for each role. Keep the first finding.
        return list(dict.fromkeys(self._find(context)))

    def _find(self, context: Context) -> Iterator[Finding]:
        for item in self.over(context):
            for each in _found(self.when(item)):
                where = _place(context, item, each.at or self.at)
                items = item if isinstance(item, tuple) else (item,)
                yield Finding(
                    self.code,
                    self.severity,
                    where,
                    each.message or self.message.format(*items),
                    each.fix or self.fix,
                    context.origins.get(where, ""),
                )


def _found(outcome: Outcome) -> Iterable[Found]:
    match outcome:
        case None | int() | str():
            text = outcome if isinstance(outcome, str) else ""
            return (Found(text),) if outcome else ()
        case Found():
            return (outcome,)
        case _:
            return (Found(each) if isinstance(each, str) else each for each in outcome)


def _place(context: Context, item: object, at: str) -> str:
    match item:
        case RoleEngines():
            is_variable = at.startswith("$")
            return context.where_variable(item, at[1:]) if is_variable else item.where(at)
        case (RoleEngines() as prefill, RoleEngines() as decode):
            return differing_place(prefill, decode, at)
        case (RoleEngines() as engines, _):
            return _place(context, engines, at)
        case _:
            return at


def differing_place(prefill: RoleEngines, decode: RoleEngines, name: str) -> str:
    """Return the path of the setting that makes the two roles differ."""
    return decode.where(name) if name in decode.overrides else prefill.where(name)


def _rule(severity: Severity, code: str, title: str, why: str, **row: Any) -> Rule:
    return Rule(code, severity, title, why, **row)


error = partial(_rule, "error")
warning = partial(_rule, "warning")
info = partial(_rule, "info")
