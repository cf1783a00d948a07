"""Whatever comes in, the loader answers with a configuration or with problems that say where."""

import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdlaunch.config.problems import InvalidConfigError
from pdlaunch.config.settings import all_settings, variable_paths
from pdlaunch.config.sources import load_config

PATHS = sorted(all_settings())
PARTS = {name for path in PATHS for name in path.split(".")}
NAMES = st.sampled_from(sorted({*PARTS, "prefil", "x", "<<", "api_kee"}))
ODD = ["", "~", "null", "on", "1", "-1", "0x10", "1e400", ".nan", ".inf", "9" * 5000, "1:30"]
ODD += ["2026-01-01", "4GiB", "!!int x", "*a", "&a 1"]
SCALARS = st.one_of(
    st.text(max_size=20), st.sampled_from(ODD), st.integers().map(str), st.floats().map(str)
)
VARIABLES = st.one_of(
    st.sampled_from(sorted(variable_paths())),
    st.text(string.ascii_uppercase + "_\udc80", max_size=12).map("PDLAUNCH_".__add__),
)


def pairs(value, max_size):
    return st.lists(st.tuples(NAMES, value).map(": ".join), max_size=max_size)


FLOW = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
        pairs(inner, 4).map(lambda items: f"{{{', '.join(items)}}}"),
    ),
    max_leaves=8,
)
NEARLY = pairs(FLOW, 6).map("\n".join)
"""Texts of files that are nearly configurations."""


def assert_answer(path, environ=None, flags=None):
    """Any exception but the one for the user fails the test."""
    try:
        load_config(path, environ or {}, flags or {})
    except InvalidConfigError as error:
        for problem in error.problems:
            assert problem.message
            assert problem.where or problem.field
            assert len(str(problem).encode()) < 3000


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "deploy.yaml"


fuzz = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@fuzz
@given(data=st.one_of(st.binary(max_size=300), NEARLY))
def test_any_file(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "replace"))
    assert_answer(path)


@fuzz
@given(environ=st.dictionaries(VARIABLES, st.text(max_size=30), max_size=4))
def test_any_variables(environ):
    assert_answer(None, environ)


def test_a_deep_document_ends(path):
    indented = "a:\n" + "".join(f"{' ' * n}b:\n" for n in range(1, 700))
    for text in ("[" * 100_000, "{a: " * 20_000, "- " * 50_000, indented):
        path.write_text(text)
        assert_answer(path)
