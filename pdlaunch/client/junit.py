"""JUnit XML of a smoke run, as CI systems read it."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from pdlaunch.client.smoke import Check


def write_junit(checks: Sequence[Check], path: Path) -> None:
    """Write one test case for each check."""
    suite = ET.Element(
        "testsuite",
        name="pdlaunch smoke",
        tests=str(len(checks)),
        failures=str(sum(check.failure is not None for check in checks)),
        time=f"{sum(check.seconds for check in checks):.3f}",
    )
    for check in checks:
        case = ET.SubElement(
            suite,
            "testcase",
            classname="pdlaunch.smoke",
            name=check.name,
            time=f"{check.seconds:.3f}",
        )
        if check.failure is not None:
            ET.SubElement(case, "failure", message=check.failure)
    path.parent.mkdir(parents=True, exist_ok=True)
    ET.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)
