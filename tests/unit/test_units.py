"""Sizes are parsed at the edge, and what is not one is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualblade.errors import ConfigError
from dualblade.units import GIB, MIB, format_size, parse_size, round_up


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("512MiB", 512 * MIB), ("2GiB", 2 * GIB), ("1.5 G", 3 * GIB // 2), ("4096", 4096), (7, 7)],
)
def test_sizes(text: str | int, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "many", "-1MiB", "1XiB", "MiB", -1])
def test_what_is_not_a_size_is_refused(text: str | int) -> None:
    with pytest.raises(ConfigError, match="size"):
        parse_size(text)


@given(st.integers(0, 1 << 50))
def test_a_printed_size_is_read_back_within_its_digits(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes)) == pytest.approx(size_bytes, rel=0.006)


@given(st.integers(0, 1 << 50), st.integers(1, 1 << 30))
def test_round_up(value: int, multiple: int) -> None:
    rounded = round_up(value, multiple)
    assert rounded % multiple == 0
    assert 0 <= rounded - value < multiple
