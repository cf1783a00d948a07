"""Whatever comes in, the loader answers with a configuration or with problems that say where."""

import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdlaunch.config.problems import InvalidConfigError, Problem
from pdlaunch.config.settings import all_settings, variable_paths
from pdlaunch.config.sources import load_config

PATHS = sorted(all_settings())
SECTIONS = ["prefill", "decode", "kv_transfer", "limits", "env"]
NAMES = st.sampled_from(
    [
        *{name for path in PATHS for name in path.split(".")},
        *SECTIONS,
        "prefil",
        "x",
        "<<",
        "api_kee",
    ]
)
ODD = [
    "",
    "~",
    "null",
    "on",
    "1",
    "-1",
    "0x10",
    "1e400",
    ".nan",
    ".inf",
    "9" * 5000,
    "1:30",
    "2026-01-01",
    "4GiB",
    "!!int x",
]
SCALARS = st.one_of(
    st.text(max_size=20), st.sampled_from(ODD), st.integers().map(str), st.floats().map(str)
)
VARIABLES = st.one_of(
    st.sampled_from(sorted(variable_paths())),
    st.text(string.ascii_uppercase + "_\udc80", max_size=12).map("PDLAUNCH_".__add__),
)


def yaml_texts():
    """Text that is nearly a configuration."""
    flow = st.recursive(
        SCALARS,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
            st.lists(st.tuples(NAMES, inner), max_size=4).map(
                lambda items: "{" + ", ".join(f"{k}: {v}" for k, v in items) + "}"
            ),
        ),
        max_leaves=8,
    )
    return st.lists(st.tuples(NAMES, flow), max_size=6).map(
        lambda items: "\n".join(f"{k}: {v}" for k, v in items)
    )


def assert_answer(path, environ=None, flags=None):
    for problem in problems_of(path, environ or {}, flags or {}):
        check_problem(problem)


def problems_of(path, environ, flags) -> tuple[Problem, ...]:
    """None where it is a configuration; any other exception fails the test."""
    try:
        load_config(path, environ, flags)
    except InvalidConfigError as error:
        return error.problems
    return ()


def check_problem(problem: Problem):
    assert problem.message
    assert problem.where or problem.field
    str(problem).encode()
    assert len(str(problem)) < 3000


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "deploy.yaml"


fuzz = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@fuzz
@given(data=st.binary(max_size=300))
def test_any_bytes(path, data):
    path.write_bytes(data)
    assert_answer(path)


@fuzz
@given(text=yaml_texts())
def test_nearly_a_configuration(path, text):
    path.write_bytes(text.encode("utf-8", "replace"))
    assert_answer(path)


@fuzz
@given(environ=st.dictionaries(VARIABLES, st.text(max_size=30), max_size=4))
def test_any_variables(environ):
    assert_answer(None, environ)


@fuzz
@given(
    flags=st.dictionaries(
        st.one_of(st.sampled_from(PATHS), st.text(max_size=12)),
        st.one_of(st.text(max_size=20), st.integers(), st.floats(), st.booleans()),
        max_size=4,
    )
)
def test_any_flags(flags):
    assert_answer(None, {}, flags)


def test_a_deep_document_ends(path):
    for text in (
        "[" * 100_000,
        "{a: " * 20_000,
        "- " * 50_000,
        "a:\n" + "".join(f"{' ' * n}b:\n" for n in range(1, 700)),
    ):
        path.write_text(text)
        assert_answer(path)
