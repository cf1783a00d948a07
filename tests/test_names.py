"""Names say what is what: ``_s`` a duration, ``_at`` an instant, a class one thing."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator

from tests.test_layers import sources

CLOCKS = {"clock", "_clock", "monotonic", "now", "perf_counter", "process_time", "time"}


def name_of(node: ast.expr) -> str:
    """Return the last part of a dotted name; empty for other expressions."""
    return str(getattr(node, "attr", getattr(node, "id", "")))


def is_read(node: ast.expr) -> bool:
    """Tell whether an expression asks a clock."""
    if not isinstance(node, ast.Call) or node.args:
        return False
    return name_of(node.func) in CLOCKS


def is_instant(node: ast.expr) -> bool:
    """Tell whether an expression is an instant: a clock's, or one so much later."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return is_read(node.left) != is_read(node.right)
    return is_read(node)


def wrong_names(text: str) -> Iterator[str]:
    """Yield the names of durations that are given an instant, and of instants that are given the
    time between two.
    """
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        value = node.value
        is_duration = (
            isinstance(value, ast.BinOp)
            and isinstance(value.op, ast.Sub)
            and is_read(value.left)
            and name_of(value.right).endswith("_at")
        )
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            name = name_of(target)
            if (name.endswith("_s") and is_instant(value)) or (
                name.endswith("_at") and is_duration
            ):
                yield f"line {node.lineno}: {name}"


def test_durations_and_instants_are_told_apart() -> None:
    found = {str(path): [*wrong_names(path.read_text())] for path in sources()}
    assert {path: names for path, names in found.items() if names} == {}


def test_wrong_names_are_found() -> None:
    text = """
begin_s = time.perf_counter()
self.deadline_s: float = self._clock() + timeout_s
took_at = clock() - begin_at
left_s = end_at - clock()
end_at = clock() + left_s
oldest_at = clock() - WINDOW_S
took_s = clock() - begin_at
"""
    assert [*wrong_names(text)] == ["line 2: begin_s", "line 3: deadline_s", "line 4: took_at"]


def test_no_two_classes_have_the_same_name() -> None:
    """Of public ones: one thing has one name, and one name means one thing."""
    places: defaultdict[str, list[str]] = defaultdict(list)
    for path in sources():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(path))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
