import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.machine.host import format_cpu_list, parse_cpu_list


@pytest.mark.parametrize(
    ("text", "cores"),
    [("", ()), ("0\n", (0,)), ("0-3,8", (0, 1, 2, 3, 8)), (" 5 , 1-2", (1, 2, 5))],
)
def test_lists_of_linux(text, cores):
    assert parse_cpu_list(text) == cores


@pytest.mark.parametrize("text", ["a", "3-1", "-1", "1-", "0-999999", "1,,2", "٣"])
def test_what_is_no_list(text):
    with pytest.raises(ValueError, match="is no list of cores"):
        parse_cpu_list(text)


@given(st.sets(st.integers(0, 300)))
def test_lists_are_read_back(cores):
    assert parse_cpu_list(format_cpu_list(cores)) == tuple(sorted(cores))
