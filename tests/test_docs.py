"""Links between the pages of the documentation hold, headings included; the contract names tests
that exist.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")


def anchors(page: Path) -> set[str]:
    """The fragments that a forge makes of the headings of ``page``."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in LINK.findall(page.read_text()):
        target = (page.parent / path) if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_the_readme_leads_to_every_page() -> None:
    links = {
        path for path, _ in LINK.findall((ROOT / "README.md").read_text().split("\n## Read on")[1])
    }
    pages = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}
    assert pages <= links, pages - links


def test_the_contract_names_tests_that_exist() -> None:
    tests = ROOT / "tests"
    tables = (tests / "contract.md").read_text().partition("## Removed features")[0]
    rows = re.findall(r"^\|.*\|$", tables, re.MULTILINE)
    for path, name in re.findall(r"`([\w/*]+(?:\.py|/))(?:::(\w+))?`", "".join(rows)):
        found = [*tests.glob(path)]
        assert found, path
        assert not name or f"def {name}(" in found[0].read_text(), f"{path}::{name}"
