import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.config.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("4GiB", 4 * 1024**3),
        ("4Gi", 4 * 1024**3),
        ("512 MiB", 512 * 1024**2),
        ("1.5KiB", 1536),
        ("32GB", 32 * 10**9),
        ("0.5kB", 500),
        ("1tb", 10**12),
        (" 300 ", 300),
        (300, 300),
        # Too long for a float.
        ("9007199254740993", 2**53 + 1),
        ("0.000000001GB", 1),
    ],
)
def test_what_a_size_means(text: object, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize(
    ("text", "both"),
    [("2G", "2GiB (powers of 1024) or 2GB"), ("1.5k", "1.5KiB (powers of 1024) or 1.5kB")],
)
def test_a_unit_that_tools_disagree_about_is_refused_with_both_readings(
    text: str, both: str
) -> None:
    with pytest.raises(ValueError, match="may mean") as refused:
        parse_size(text)
    assert both in str(refused.value)


@given(st.integers(0, 2**60))
def test_a_formatted_size_is_read_as_nearly_the_same(num_bytes: int) -> None:
    # Three digits, and the part of a byte that is cut off.
    assert parse_size(format_size(num_bytes)) == pytest.approx(num_bytes, abs=0.005 * num_bytes + 1)
