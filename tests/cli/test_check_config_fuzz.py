"""Whatever bytes come: an exit code of 0, 1 or 2 and a message, never a traceback."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdlaunch.config.settings import all_flags
from tests.command_line import invoke
from tests.config.test_fuzz import NEARLY

VALUES = st.one_of(
    st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20),
    st.integers().map(str),
)
FLAGS = st.lists(
    st.tuples(st.sampled_from(sorted(flag.name for flag in all_flags().values())), VALUES).map(
        lambda pair: [f"--{pair[0]}", pair[1]]
    ),
    max_size=3,
)
COMMANDS = (
    ["check-config", "--port", "0"],
    ["check-config", "--format", "json"],
    ["config", "show"],
)

few = settings(max_examples=60, deadline=None)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "deploy.yaml"


def run(arguments, environ=None):
    result = invoke(arguments, env=environ)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert result.exit_code in (0, 1, 2)
    # At the start of a line: the word itself may be what was asked for.
    assert not any(line.startswith("Traceback (most recent") for line in result.output.splitlines())
    if result.exit_code == 2:
        assert result.stderr.strip()
    return result


@few
@given(
    data=st.one_of(
        st.binary(max_size=100), NEARLY.map(lambda text: text.encode("utf-8", "replace"))
    )
)
def test_any_file(path, data):
    path.write_bytes(data)
    for command in COMMANDS:
        result = run([*command, str(path)])
        if "json" in command:
            assert json.loads(result.stdout)["ok"] is (result.exit_code == 0)


@few
@given(flags=FLAGS)
def test_any_flags(flags):
    for command in COMMANDS:
        run([*command, *(word for flag in flags for word in flag)])


@few
@given(
    value=st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=30),
    name=st.sampled_from(["MODEL", "HOST", "API_KEY", "ENV__X"]),
)
def test_any_variable(value, name):
    run(["check-config", "--port", "0"], {f"PDLAUNCH_{name}": value})


@few
@given(code=st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20))
def test_any_code(code):
    run(["explain", "--", code])
