"""The page is there without a key, holds no data, and can be left out."""

from __future__ import annotations

import re
from importlib import resources

import msgspec
import pytest

from pdlaunch.router.app import PAGE_PATHS
from tests.router.conftest import SPEC, Stand, pair

FILES = resources.files("pdlaunch.router") / "static"


@pytest.mark.parametrize("path", PAGE_PATHS)
async def test_it_needs_no_key_and_tells_nothing(stand: Stand, path: str) -> None:
    await stand.start(pair(), spec=msgspec.structs.replace(SPEC, api_key="the-key"))
    async with stand.session.get(path) as response:
        text = await response.text()
        assert response.status == 200
        policy = response.headers["Content-Security-Policy"]
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        tag = response.headers["ETag"]
    assert "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'" in policy
    assert "unsafe" not in policy
    for told in ("prefill-0", "tiny", "the-key", stand.engines["decode-0"].url):
        assert told not in text
    async with stand.session.get(path, headers={"If-None-Match": tag}) as response:
        assert (response.status, await response.read()) == (304, b"")
    async with stand.session.get("/pdlaunch/status") as response:
        assert response.status == 401


def test_no_text_becomes_markup_and_nothing_comes_from_elsewhere() -> None:
    for file in FILES.iterdir():
        text = file.read_text()
        for forbidden in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
        ):
            assert forbidden not in text, f"{file.name}: {forbidden}"
        assert not re.search(r"\son\w+=|style=|javascript:", text), file.name
        elsewhere = re.findall(r"https?://[^\"'\s]+", text)
        assert set(elsewhere) <= {"http://www.w3.org/2000/svg"}, file.name
