"""A launch with two API keys and a certificate: no client starves, all features work."""

import asyncio
import datetime
import hashlib
import ipaddress
import os
import re
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pdlaunch.launch.client.api import read_status, read_trace, reading_api
from pdlaunch.protocol.ids import HttpRequestId
from tests.e2e.client import Api, Deployment, running_deployment
from tests.e2e.conftest import clean_environ
from tests.e2e.waiting import await_true

KEYS = {name: f"key-of-{name}" for name in "ab"}
NUM_LONG, NUM_SHORT = 80, 5
LOG_STEP_S = 1e-3  # the log cuts times off


def certificate_of_loopback() -> bytes:
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    for extension in (names, x509.BasicConstraints(ca=True, path_length=0)):
        builder = builder.add_extension(extension, critical=True)
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    key_pem = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    return builder.sign(key, hashes.SHA256()).public_bytes(pem) + key_pem


@pytest.fixture(scope="module")
def guarded(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("guarded")
    certificate = folder / "cert.pem"
    certificate.write_bytes(certificate_of_loopback())
    digests = {name: hashlib.sha256(key.encode()).hexdigest() for name, key in KEYS.items()}
    entries = ", ".join(f"{{name: {name}, sha256: {digests[name]}}}" for name in KEYS)
    (folder / "deploy.yaml").write_text(
        f"model: {llama}\ndtype: float32\nkv_cache_memory: 16MiB\nssl_certfile: {certificate}\n"
        f"log_level: debug\napi_keys: [{entries}]\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(certificate))
        arguments = [str(folder / "deploy.yaml")]
        with running_deployment(arguments, environ=clean_environ(), is_tls=True) as deployment:
            yield deployment


async def ask(session: aiohttp.ClientSession, name: str, number: int, num_tokens: int) -> None:
    # The first tokens differ, so no prompt hits the prefix cache.
    body = {"prompt": [3 + number] * num_tokens, "max_tokens": 4, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {KEYS[name]}", "X-Request-Id": f"{name}-{number}"}
    async with session.post("/v1/completions", json=body, headers=headers) as response:
        assert response.status == 200, await response.text()


def waiting(deployment: Deployment) -> bool:
    page = Api(deployment.url).get("/metrics")[1]
    line = next(each for each in page.splitlines() if 'key_prompts_waiting{key="a"}' in each)
    return float(line.split()[-1]) > NUM_LONG / 2


async def flood(deployment: Deployment) -> None:
    connector = aiohttp.TCPConnector(limit=0, ssl=ssl.create_default_context())
    async with aiohttp.ClientSession(deployment.url, connector=connector) as session:
        works = [asyncio.ensure_future(ask(session, "a", n, 1500)) for n in range(NUM_LONG)]
        await asyncio.to_thread(await_true, lambda: waiting(deployment), "prompts of a wait")
        for number in range(NUM_SHORT):
            await ask(session, "b", NUM_LONG + number, 70)
        assert not all(work.done() for work in works)
        await asyncio.gather(*works)


def length_s(deployment: Deployment, request_id: str, name: str) -> float:
    """How long a request's only span of this name lasted, on the clock of its own record."""
    trace = read_trace(reading_api(deployment.url, None), HttpRequestId(request_id))
    ((start_ms, end_ms),) = [(s.start_ms, s.end_ms) for s in trace.spans if s.name == name]
    return (end_ms - start_ms) / 1e3


def given_to_prefill(deployment: Deployment) -> list[tuple[str, float]]:
    """Prompts in the order in which prefill got them, and when, by the clock of one log."""
    log = (deployment.log_dir / "router.log").read_text()
    line = re.compile(r"^(\S+)Z DEBUG .*\[(\S+)\] route of prefill: prefill-0->", re.MULTILINE)
    return [
        (name, datetime.datetime.fromisoformat(at).timestamp()) for at, name in line.findall(log)
    ]


def test_a_short_prompt_is_delayed_by_one_long_prompt_of_another_key(guarded: Deployment) -> None:
    asyncio.run(flood(guarded))
    given = given_to_prefill(guarded)
    long = [(name, at) for name, at in given if name.startswith("a-")]
    ends = {name: at + length_s(guarded, name, "prefill at prefill-0") for name, at in long}
    assert (len(ends), len(given)) == (NUM_LONG, NUM_LONG + NUM_SHORT)
    for place, (name, at) in enumerate(given):
        if name not in ends:
            begin = at + LOG_STEP_S - length_s(guarded, name, "wait for turn")
            assert sum(ends.get(before, 0.0) > begin for before, _ in given[:place]) <= 1


def test_views_and_benchmarks_work_and_no_key_is_shown(guarded: Deployment) -> None:
    assert {each.state for each in read_status(reading_api(guarded.url, None)).engines} == {"ready"}
    assert Api(guarded.url).get("/pdlaunch/status")[0] == 401
    with_key = Api(guarded.url, KEYS["a"])
    assert read_status(with_key).state == "ok"
    command = [sys.executable, "-m", "pdlaunch", "bench", "serve", "--url", guarded.url]
    command += ["--input-tokens", "8", "--num-requests", "2", "--max-token-id", "120"]
    subprocess.run(command, check=True, env={**os.environ, "PDLAUNCH_API_KEY": KEYS["b"]})
    logs = [path.read_text(errors="replace") for path in guarded.log_dir.iterdir()]
    for text in (*logs, guarded.output(), with_key.get("/metrics")[1]):
        assert not any(key in text for key in KEYS.values())
    assert "https://" in guarded.output()
    for process in guarded.processes().values():
        assert not any(key in " ".join(process.cmdline()) for key in KEYS.values())
