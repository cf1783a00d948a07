"""URLs of engines that run already, and the list of those that a router may be told of."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.config.external import is_allowed, read_engine_url
from pdlaunch.config.problems import InvalidConfigError
from pdlaunch.config.sources import load_config


@pytest.mark.parametrize(
    ("url", "entry"),
    [
        ("http://10.0.0.7:8000", "http://10.0.0.0/24:8000-8100"),
        ("http://10.0.0.7:8100", "http://10.0.0.0/24:8000-8100"),
        ("http://10.0.0.7", "http://10.0.0.7"),
        ("http://10.0.0.7:80", "http://10.0.0.7"),
        ("https://10.0.0.7", "https://10.0.0.7"),
        ("http://[fd00::7]:8000", "http://[fd00::]/64:8000"),
        ("http://[::ffff:10.0.0.7]:8000", "http://10.0.0.0/24:8000"),
        ("http://Engine-1.SVC.:8000", "http://engine-1.svc:8000"),
        ("http://a.prefill.svc:8000", "http://*.svc:8000"),
        ("unix:/run/engines/a.sock", "unix:/run/engines"),
        ("unix:/run/engines/a.sock", "unix:/run/engines/"),
        ("unix:/run/a.sock", "unix:/run/a.sock"),
    ],
)
def test_what_an_entry_allows(url: str, entry: str) -> None:
    assert is_allowed(url, ["http://192.0.2.1:1", entry])


@pytest.mark.parametrize(
    ("url", "entry"),
    [
        ("http://10.0.1.7:8000", "http://10.0.0.0/24:8000-8100"),
        ("http://10.0.0.7:8101", "http://10.0.0.0/24:8000-8100"),
        ("http://10.0.0.7:7999", "http://10.0.0.0/24:8000-8100"),
        ("https://10.0.0.7:8000", "http://10.0.0.0/24:8000"),
        ("http://10.0.0.7:8000", "http://10.0.0.7"),
        ("http://[::ffff:169.254.169.254]:80", "http://[fd00::]/8:80"),
        # A name may resolve to anything: it is covered by names alone.
        ("http://internal:8000", "http://0.0.0.0/0:8000"),
        ("http://167772167:8000", "http://10.0.0.7:8000"),
        ("http://0x0a000007:8000", "http://10.0.0.7:8000"),
        ("http://svc:8000", "http://*.svc:8000"),
        ("http://evilsvc:8000", "http://*.svc:8000"),
        ("http://engine-1.svc.evil:8000", "http://engine-1.svc:8000"),
        ("unix:/run/engines-of-others/a.sock", "unix:/run/engines"),
        ("unix:/run/docker.sock", "unix:/run/engines"),
        ("unix:/run/a.sock", "http://0.0.0.0/0:0-65535"),
    ],
)
def test_what_an_entry_does_not_allow(url: str, entry: str) -> None:
    assert not is_allowed(url, [entry])


@pytest.mark.parametrize(
    "url",
    [
        *("", "10.0.0.7:8000", "ftp://10.0.0.7:8000", "http://:8000", "http://10.0.0.7:port"),
        *("http://10.0.0.7:99999", "http://user@10.0.0.7:8000", "http://10.0.0.7:8000/v1"),
        *("http://10.0.0.7:8000?x=1", "http://10.0.0.7:8000#x", "http://10.0.0.7:8000\\@evil"),
        *("http://10.0.0.7:8000\n", "http://[fe80::1%25eth0]:8000", "http://engines..svc:8000"),
        *(f"dns+http://{'e' * 64}.svc:8000", "unix:run/x.sock", "unix:/run//x.sock", "unix:"),
        *("http://allowed:8000@10.0.0.7:8000", "unix:/run/engines/../docker.sock"),
    ],
)
def test_what_is_no_url_of_an_engine(url: str) -> None:
    with pytest.raises(ValueError, match=r"write|no URL|api_key_env"):
        read_engine_url(url)


@given(st.text(max_size=30))
def test_any_text_is_a_url_or_is_refused(text: str) -> None:
    for url in (text, f"http://{text}", f"unix:/{text}"):
        try:
            address = read_engine_url(url)
        except ValueError:
            continue
        assert read_engine_url(str(address)) == address


@pytest.mark.parametrize(
    "entry",
    [
        *("*", "http://*", "10.0.0.0/24", "http://10.0.0.0/33:1", "http://a:9-1", "unix:run"),
        *("http://a:70000", "http://a/24:1", "http://a:1/v1", "ftp://a"),
    ],
)
def test_an_entry_that_allows_nothing_is_refused(entry: str) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        load_config(None, {}, {"engine_urls": entry})
    assert caught.value.field == "engine_urls"


def test_engines_are_named_by_role_and_number_where_they_have_no_name(tmp_path: Path) -> None:
    file = tmp_path / "router.yaml"
    file.write_text(
        "engines:\n"
        "- {role: prefill, url: 'http://10.0.0.1:8000/', api_key_env: KEY}\n"
        "- decode=unix:/run/d.sock\n"
        "- {role: decode, name: decode-0, url: 'dns+http://decode.svc:80', kind: vllm}\n"
    )
    engines = load_config(file, {}, {}).config.engines
    assert [(engine.name, engine.role, engine.url) for engine in engines] == [
        ("prefill-0", "prefill", "http://10.0.0.1:8000"),
        ("decode-1", "decode", "unix:/run/d.sock"),
        ("decode-0", "decode", "dns+http://decode.svc:80"),
    ]
    assert engines[0].api_key_env == "KEY"
    (given,) = load_config(None, {"PDLAUNCH_ENGINES": "decode=http://a:1"}, {}).config.engines
    assert (given.name, given.role, given.url) == ("decode-0", "decode", "http://a:1")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("{role: prefill}", "field required"),
        ("{role: other, url: 'http://a:1'}", "'prefill', 'decode' or 'both'"),
        ("{role: prefill, url: 'http://a:1', colour: red}", "has no field colour"),
        ("{role: prefill, url: 'http://a:1', name: 'a b'}", "should match pattern"),
        ("{role: prefill, url: 'http://a:1/x'}", "is no URL of an engine"),
        ("http://a:1", "prefill=URL, decode=URL or both=URL"),
    ],
)
def test_a_wrong_engine_is_named_with_its_line(tmp_path: Path, item: str, message: str) -> None:
    file = tmp_path / "router.yaml"
    file.write_text(f"engines:\n- {item}\n")
    with pytest.raises(InvalidConfigError) as caught:
        load_config(file, {}, {})
    assert message in str(caught.value)
    assert "router.yaml:2:" in str(caught.value)
    assert "engines" in str(caught.value)


def test_two_engines_at_one_url_are_refused() -> None:
    with pytest.raises(InvalidConfigError, match="two engines have the url http://a:1"):
        load_config(None, {}, {"engines": "prefill=http://a:1, decode=http://a:1/"})
