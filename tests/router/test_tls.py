"""Clients that come over TLS; certificates that change, or cannot be used."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from cryptography.hazmat.primitives import serialization

from pdlaunch.errors import ConfigError
from pdlaunch.http import connections
from pdlaunch.http.connections import HANDSHAKE_TIMEOUT_S, REFUSAL_S
from pdlaunch.protocol.certificates import CertificateFiles, client_context, new_certificate
from pdlaunch.router.main import follow_certificate
from tests.http.loop_clock import pass_time
from tests.router.conftest import Stand
from tests.router.fake_engine import until
from tests.router.test_life_of_a_request import completion

END = "-----END CERTIFICATE-----\n"


def write(folder: Path, pem: str | None = None) -> CertificateFiles:
    certificate, _, key = (pem or new_certificate()).partition(END)
    (folder / "cert.pem").write_text(certificate + END)
    (folder / "key.pem").write_text(key)
    return CertificateFiles(str(folder / "cert.pem"), str(folder / "key.pem"))


async def post(stand: Stand, certificate: str, **headers: str) -> int:
    """A request of a client that trusts this certificate; a new connection each."""
    connector = aiohttp.TCPConnector(ssl=client_context(certificate))
    async with (
        aiohttp.ClientSession(stand.url, connector=connector) as session,
        session.post("/v1/completions", json=completion(), headers=headers) as response,
    ):
        return response.status


async def test_its_own_page_and_no_other_is_let_in(stand: Stand, tmp_path: Path) -> None:
    pem = new_certificate()
    await stand.start_pair(certificate=write(tmp_path, pem))
    assert await post(stand, pem, Origin=stand.url) == 200
    assert await post(stand, pem, Origin="https://elsewhere.example") == 403


@contextlib.asynccontextmanager
async def strangers(
    port: int, number: int, tls: ssl.SSLContext | None = None
) -> AsyncIterator[list[asyncio.StreamReader]]:
    """Connections of which no request comes; without ``tls`` not even a handshake."""
    made = [await asyncio.open_connection("127.0.0.1", port, ssl=tls) for _ in range(number)]
    try:
        yield [reader for reader, _ in made]
    finally:
        for _, writer in made:
            writer.transport.abort()


async def closed(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(ConnectionError):
        assert await reader.read() == b""


@pytest.mark.parametrize("handshakes", [False, True])
async def test_strangers_who_say_nothing_give_way_to_clients(
    stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handshakes: bool
) -> None:
    monkeypatch.setattr(connections, "HANDSHAKE_TIMEOUT_S", 3600)
    pem = new_certificate()
    await stand.start_pair(certificate=write(tmp_path, pem), max_connections=8)
    async with strangers(stand.port, 12, client_context(pem) if handshakes else None) as readers:
        await closed(readers[0])
        assert await post(stand, pem) == 200
        assert not readers[-1].at_eof(), "those that came first go first"


async def test_a_stranger_who_finds_no_room_is_closed(
    stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HANDSHAKE_TIMEOUT_S", 3600)
    pem = new_certificate()
    engines = await stand.start_pair(certificate=write(tmp_path, pem), max_connections=2)
    engines[0].hold_prefill = True
    works = [asyncio.ensure_future(post(stand, pem)) for _ in range(2)]
    await until(lambda: len(engines[0].seen) == 2)
    async with strangers(stand.port, 1) as (reader,):
        assert await post(stand, pem) == 503
        pass_time(REFUSAL_S)
        await closed(reader)
    engines[0].go.set()
    assert await asyncio.gather(*works) == [200, 200]


async def test_handshakes_that_do_not_end_or_fail_leave_nothing(
    stand: Stand, tmp_path: Path
) -> None:
    await stand.start_pair(certificate=write(tmp_path))
    async with strangers(stand.port, 2) as readers:
        await until(lambda: len(stand.runner._open) == 2)
        pass_time(HANDSHAKE_TIMEOUT_S)
        for reader in readers:
            await closed(reader)
    with pytest.raises(aiohttp.ClientConnectorCertificateError):
        await post(stand, new_certificate())
    await until(lambda: not stand.runner._open)


async def test_a_changed_certificate_is_used_and_a_wrong_one_is_not(
    stand: Stand, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = new_certificate(), new_certificate()
    files = write(tmp_path, first)
    await stand.start_pair(certificate=files)
    following = asyncio.ensure_future(follow_certificate(files, stand.tls, poll_s=0.0))
    write(tmp_path, "no certificate")
    await until(lambda: "the earlier certificate stays" in caplog.text)
    assert await post(stand, first) == 200
    write(tmp_path, second)
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(aiohttp.ClientConnectorCertificateError):
                assert await post(stand, second) == 200
                break
    with pytest.raises(aiohttp.ClientConnectorCertificateError):
        await post(stand, first)
    following.cancel()


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("cert.pem", None, "/cert.pem cannot be read: No such file"),
        ("key.pem", None, "/key.pem cannot be read: No such file"),
        ("cert.pem", "nothing", "no PEM certificate, or no key is in .*cert.pem and .*key.pem"),
        ("key.pem", "another", "another private key is in"),
        ("key.pem", "encrypted", "the private key has a password"),
    ],
)
def test_what_cannot_be_used_is_named(
    tmp_path: Path, name: str, text: str | None, words: str
) -> None:
    files = write(tmp_path)
    assert isinstance(files.context(), ssl.SSLContext)
    if text is None:
        (tmp_path / name).unlink()
    elif text == "another":
        (tmp_path / name).write_text(new_certificate().partition(END)[2])
    elif text == "encrypted":
        key = serialization.load_pem_private_key((tmp_path / name).read_bytes(), None)
        pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        locked = key.private_bytes(*pem, serialization.BestAvailableEncryption(b"password"))
        (tmp_path / name).write_bytes(locked)
    else:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=words):
        files.context()
