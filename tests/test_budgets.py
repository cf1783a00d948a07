"""The house stays as small as docs/architecture.md says: lines and classes of each room."""

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from tests.test_layers import ROOT, imports_of, tree_of

PACKAGE = ROOT / "pdlaunch"
TOTAL_LINES = 47_000  # without what came later and was given lines of its own:
LATER = {
    "the verdict": (
        2_000,
        ("bench/verdict", "cli/verdict.py", "cli/html_report.py", "protocol/bottleneck.py"),
    ),
    "answers by grammars": (900, ("engine/grammar.py", "engine/server/structured.py")),
}
TOTAL_CLASSES = 598
TOTAL_MODULES = 222
SINGLE_IMPORTER_MODULES = 40
COMMENT_SHARE = 0.025
TEST_LINES = 45_000
HAND_WRITTEN_PAGES = 12
WORDS = 25_000
GENERATED_PAGES = {"rules.md", "settings.md"}


@cache
def lines_of(path: Path) -> tuple[str, ...]:
    return tuple(path.read_text().splitlines())


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def num_classes(path: Path) -> int:
    return sum(isinstance(node, ast.ClassDef) for node in ast.walk(tree_of(path)))


def rooms() -> dict[str, tuple[list[Path], int, int]]:
    """Room of the table -> its files, the most lines, the most classes."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    table = {}
    for names, lines, classes in re.findall(
        r"^\| (`[^|]+`) \| [^|]+ \| ([\d,]+) \| (\d+) \|$", page, re.MULTILINE
    ):
        files: list[Path] = []
        for name in re.findall(r"`([^`]+)`", names):
            place = PACKAGE / name
            files += sorted(place.rglob("*.py")) if place.is_dir() else [place]
        table[names] = (files, int(lines.replace(",", "")), int(classes))
    return table


@pytest.mark.parametrize("room", rooms())
def test_a_room_keeps_to_its_budget(room: str) -> None:
    files, most_lines, most_classes = rooms()[room]
    assert sum(len(lines_of(path)) for path in files) <= most_lines
    assert sum(num_classes(path) for path in files) <= most_classes


def test_every_module_stands_in_the_table() -> None:
    counted = {path for files, *_ in rooms().values() for path in files}
    assert set(modules()) - counted <= {PACKAGE / "__init__.py", PACKAGE / "__main__.py"}


def test_the_package_as_a_whole() -> None:
    files = modules()
    lines = {path: len(lines_of(path)) for path in files}
    for feature, (most, places) in LATER.items():
        own = [path for path in lines if any(path.is_relative_to(PACKAGE / at) for at in places)]
        assert 0 < sum(map(lines.pop, own)) <= most, feature
    assert sum(lines.values()) <= TOTAL_LINES
    assert sum(num_classes(path) for path in files) <= TOTAL_CLASSES
    assert sum(path.stem != "__init__" for path in files) <= TOTAL_MODULES
    assert len(lines_of(PACKAGE / "bench/verdict/queueing.py")) <= 200  # as promised


def test_few_modules_have_a_single_importer() -> None:
    importers: Counter[str] = Counter()
    for path in modules():
        importers.update(
            {
                ".".join(name.split(".")[:length])
                for _, name in imports_of(path)
                for length in range(2, name.count(".") + 2)
            }
        )
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in modules()
        if path.stem not in {"__init__", "__main__"}
    }
    assert sum(importers[name] == 1 for name in names) <= SINGLE_IMPORTER_MODULES


def test_comments_say_why() -> None:
    lines = [line.strip() for path in modules() for line in lines_of(path) if line.strip()]
    assert sum(line.startswith("#") for line in lines) >= COMMENT_SHARE * len(lines)


def test_the_tests_and_the_docs_stay_small() -> None:
    tests = sum(len(lines_of(path)) for path in (ROOT / "tests").rglob("*.py"))
    assert tests <= TEST_LINES
    pages = [path for path in (ROOT / "docs").rglob("*.md") if path.name not in GENERATED_PAGES]
    assert len(pages) <= HAND_WRITTEN_PAGES
    others = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
    words = sum(len(path.read_text().split()) for path in (*pages, *others))
    assert words <= WORDS
