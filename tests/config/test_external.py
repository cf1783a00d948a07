from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.config.external import read_engine_url
from pdlaunch.config.problems import InvalidConfigError
from pdlaunch.config.sources import load_config


@pytest.mark.parametrize(
    "url",
    [
        *("", "10.0.0.7:8000", "ftp://10.0.0.7:8000", "http://:8000", "http://10.0.0.7:port"),
        *("http://10.0.0.7:99999", "http://user@10.0.0.7:8000", "http://10.0.0.7:8000/v1"),
        *("http://10.0.0.7:8000?x=1", "http://10.0.0.7:8000#x", "http://10.0.0.7:8000\\@evil"),
        *("http://10.0.0.7:8000\n", "http://[fe80::1%25eth0]:8000", "http://engines..svc:8000"),
        *(f"http://{'e' * 64}.svc:8000", "dns+http://d.svc:80", "unix:", "unix:run/x.sock"),
        *("unix:/run//x.sock", "unix:/run/engines/../docker.sock"),
        "http://allowed:8000@10.0.0.7:8000",
    ],
)
def test_what_is_no_url_of_an_engine(url: str) -> None:
    with pytest.raises(ValueError, match=r"write|not a URL|api_key_env"):
        read_engine_url(url)


@given(st.text(max_size=30))
def test_any_text_is_a_url_or_is_refused(text: str) -> None:
    for url in (text, f"http://{text}", f"unix:/{text}"):
        try:
            read = read_engine_url(url)
        except ValueError:
            continue
        assert read_engine_url(read) == read


def test_engines_are_named_by_role_and_number_where_they_have_no_name(tmp_path: Path) -> None:
    file = tmp_path / "router.yaml"
    file.write_text(
        "engines:\n"
        "- {role: prefill, url: 'http://10.0.0.1:8000/', api_key_env: KEY}\n"
        "- decode=unix:/run/d.sock\n"
        "- {role: decode, name: decode-0, url: 'http://decode.svc:80'}\n"
    )
    engines = load_config(file, {}, {}).config.engines
    assert [(engine.name, engine.role, engine.url) for engine in engines] == [
        ("prefill-0", "prefill", "http://10.0.0.1:8000"),
        ("decode-1", "decode", "unix:/run/d.sock"),
        ("decode-0", "decode", "http://decode.svc:80"),
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
        ("{role: prefill, url: 'http://a:1/x'}", "is not the URL of an engine"),
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
