"""Clients that come over TLS; certificates that change, or cannot be used."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from pathlib import Path

import aiohttp
import msgspec
import pytest
from cryptography.hazmat.primitives import serialization

from pdlaunch.errors import ConfigError
from pdlaunch.protocol.certificates import CertificateFiles, client_context, new_certificate
from pdlaunch.router.main import follow_certificate
from tests.router.conftest import SPEC, Stand, pair
from tests.router.fake_engine import until
from tests.router.test_life_of_a_request import completion

END = "-----END CERTIFICATE-----\n"


def write(folder: Path, pem: str | None = None) -> CertificateFiles:
    """Certificate and key as two files."""
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


async def test_all_of_the_api_is_there_over_tls(stand: Stand, tmp_path: Path) -> None:
    pem = new_certificate()
    await stand.start(pair(), spec=msgspec.structs.replace(SPEC, certificate=write(tmp_path, pem)))
    assert await post(stand, pem, Origin=stand.url) == 200
    assert await post(stand, pem, Origin="https://elsewhere.example") == 403
    connector = aiohttp.TCPConnector(ssl=client_context(pem))
    async with aiohttp.ClientSession(stand.url, connector=connector) as session:
        for path in ("/health", "/metrics", "/pdlaunch/", "/pdlaunch/main.js", "/pdlaunch/status"):
            async with session.get(path) as response:
                assert response.status == 200
    with pytest.raises(aiohttp.ClientConnectorCertificateError):
        await post(stand, new_certificate())


async def test_a_changed_certificate_is_used_and_a_wrong_one_is_not(
    stand: Stand, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = new_certificate(), new_certificate()
    files = write(tmp_path, first)
    await stand.start(pair(), spec=msgspec.structs.replace(SPEC, certificate=files))
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
