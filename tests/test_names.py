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
    return isinstance(node, ast.Call) and not node.args and name_of(node.func) in CLOCKS


def is_instant(node: ast.expr) -> bool:
    """Tell whether an expression is an instant: a clock's, or one so much later."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return is_read(node.left) != is_read(node.right)
    return is_read(node)


def is_duration(node: ast.expr) -> bool:
    """Tell whether an expression is the time since an instant."""
    return (
        isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Sub)
        and is_read(node.left)
        and name_of(node.right).endswith("_at")
    )


def wrong_names(tree: ast.Module) -> Iterator[str]:
    """Yield the names of durations that are given instants, and the other way round."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            name = name_of(target)
            if (name.endswith("_s") and is_instant(node.value)) or (
                name.endswith("_at") and is_duration(node.value)
            ):
                yield f"line {node.lineno}: {name}"


def test_durations_and_instants_are_told_apart_and_no_two_classes_share_a_name() -> None:
    wrong: list[str] = []
    places: defaultdict[str, list[str]] = defaultdict(list)
    for path in sources():
        tree = ast.parse(path.read_text())
        wrong += [f"{path}, {name}" for name in wrong_names(tree)]
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(path))
    assert wrong == []
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_wrong_names_are_found() -> None:
    text = """
began_s = time.perf_counter()
self.end_s: float = self._clock() + timeout_s
took_at = clock() - begin_at
left_s = end_at - clock()
end_at = clock() + left_s
oldest_at = clock() - WINDOW_S
took_s = clock() - begin_at
"""
    found = [*wrong_names(ast.parse(text))]
    assert found == ["line 2: began_s", "line 3: end_s", "line 4: took_at"]
