"""Lists of engines that change while a router runs: a file, a name in DNS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pdlaunch.errors import ConfigError
from pdlaunch.router import membership_sources
from pdlaunch.router.membership_sources import (
    dns_source,
    file_source,
    follow,
    read_engines_file,
)
from pdlaunch.router.watched_engine import Member
from tests.router.alone_router import Alone
from tests.router.conftest import working


@pytest.fixture
async def alone(tmp_path: Path) -> AsyncIterator[Alone]:
    alone = Alone(tmp_path, urls=(f"unix:{tmp_path}", "http://127.0.0.0/29:1-9"))
    await alone.open()
    yield alone
    await alone.close()


def listing(alone: Alone, *names: str) -> str:
    lines = [
        f"- {{name: {name}, role: {name.partition('-')[0]}, url: '{alone.url(name)}'}}\n"
        for name in names
    ]
    return f"engines:\n{''.join(lines)}"


async def test_the_file_s_engines_come_and_go_and_bad_content_changes_nothing(
    alone: Alone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("prefill-0", "decode-0", "decode-1"):
        await alone.start(name)
    file = tmp_path / "engines.yaml"
    file.write_text(listing(alone, "prefill-0", "decode-0"))
    following = asyncio.ensure_future(
        follow(file_source(file, "vllm"), "file", alone.watch, 5.0, poll_s=0.01)
    )
    try:
        await alone.until(lambda: alone.ready == {"prefill-0", "decode-0"})
        file.write_text("engines: [{role: prefill}]")
        await alone.until(lambda: "the engines stay as they are" in caplog.text)
        assert alone.ready == {"prefill-0", "decode-0"}

        file.write_text(listing(alone, "prefill-0", "decode-1"))
        await alone.until(lambda: alone.ready == {"prefill-0", "decode-1"})
        elsewhere = listing(alone, "prefill-0", "decode-1").replace("decode-1.sock", "../x.sock")
        file.write_text(elsewhere + "- {name: decode-2, role: decode, url: 'http://10.9.9.9:1'}\n")
        await alone.until(lambda: "write the whole path" in caplog.text)

        file.write_text(
            listing(alone, "prefill-0", "decode-1")
            + "- {name: decode-2, role: decode, url: 'http://10.9.9.9:1'}\n"
        )
        await alone.until(lambda: "decode-2 is left out: engine_urls does not" in caplog.text)
        assert alone.ready == {"prefill-0", "decode-1"}
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def test_a_new_engine_waits_for_another_s_work_only_where_it_needs_its_name_or_url(
    alone: Alone, tmp_path: Path
) -> None:
    for name in ("prefill-0", "decode-0", "decode-1"):
        await alone.start(name)
    file = tmp_path / "engines.yaml"
    file.write_text(listing(alone, "prefill-0", "decode-0"))
    following = asyncio.ensure_future(
        follow(file_source(file, "vllm"), "file", alone.watch, 3600.0, poll_s=0.01)
    )
    try:
        await alone.until(lambda: alone.ready == {"prefill-0", "decode-0"})
        with working(alone.engine("decode-0")):
            file.write_text(listing(alone, "prefill-0", "decode-1"))
            await alone.until(lambda: alone.ready == {"prefill-0", "decode-1"})
            assert alone.engine("decode-0").state == "draining"
        await alone.until(lambda: "decode-0" not in alone.watch._watched)
        with working(alone.engine("decode-1")):
            renamed = listing(alone, "prefill-0", "decode-1").replace("name: decode-1", "name: d")
            file.write_text(renamed + listing(alone, "decode-0").removeprefix("engines:\n"))
            await alone.until(lambda: alone.ready == {"prefill-0", "decode-0"})
            assert "d" not in alone.watch._watched
        await alone.until(lambda: alone.ready == {"prefill-0", "decode-0", "d"})
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "and nothing else"),
        ("engines: []\nport: 3", "and nothing else"),
        ("engines: {a: b}", "nothing else"),
        ("engines: [{role: prefill}]", "url: Field required"),
        ("engines: [{role: prefill, url: 'http://u:secret@h:1'}]", "api_key_env"),
        ("engines: [{role: prefill, url: 'http://h:1', api_key: secret}]", "api_key"),
        ("engines: ['prefill=http://h:1', 'prefill=http://h:1/']", "the url http://h:1"),
        ("engines: [", "expected the node content"),
        ("engines:\n- role: prefill\n  key: of secret: 1", ":3:17: bad YAML: mapping values"),
        ("engines: [*secret]", ":1:11: bad YAML: aliases are not supported"),
        ("a" * 300_000, "larger than"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "engines.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_engines_file(file)
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)


async def test_a_name_stands_for_an_engine_at_each_of_its_addresses(
    alone: Alone, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: set[str] | None = {"127.0.0.1", "127.0.0.2", "127.9.9.9"}

    async def look_up(host: str, port: int) -> list[tuple[Any, int, tuple[Any, ...]]]:
        assert (host, port) == ("prefill.svc", 7)
        if found is None:
            raise OSError("no such name")
        return [(None, 0, (ip, port)) for ip in found]

    monkeypatch.setattr(membership_sources, "look_up", look_up)

    member = Member("prefill", "prefill", "dns+http://prefill.svc:7", "vllm", "key")
    following = asyncio.ensure_future(
        follow(dns_source(member), "dns:prefill", alone.watch, 5.0, poll_s=0.01)
    )

    def urls() -> set[str]:
        return {engine.url for engine in alone.pool.engines}

    try:
        await alone.until(lambda: urls() == {"http://127.0.0.1:7", "http://127.0.0.2:7"})
        await alone.until(lambda: "does not allow http://127.9.9.9:7" in caplog.text)
        assert {alone.watch.key_of(engine) for engine in alone.pool.engines} == {"key"}
        found = {"127.0.0.2", "127.0.0.3"}
        await alone.until(lambda: urls() == {"http://127.0.0.2:7", "http://127.0.0.3:7"})
        found = None
        await alone.until(lambda: "no such name" in caplog.text)
        assert urls() == {"http://127.0.0.2:7", "http://127.0.0.3:7"}
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
