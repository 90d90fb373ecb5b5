"""Lists of numbers: both ends of a range belong to it, and what is wrong is named."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from video_ma2mba.cli.niah import parse_depths, parse_lengths


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("64", [64]),
        ("128,64,128", [64, 128]),
        ("100..400:100", [100, 200, 300, 400]),
        ("100..350:100", [100, 200, 300, 350]),
        ("7..7:1,3", None),
        ("1..3", [1, 2, 3]),
        ("10..100", [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]),
        ("5, 10..20:5", [5, 10, 15, 20]),
    ],
)
def test_lengths(text: str, numbers: list[int] | None):
    if numbers is None:
        with pytest.raises(ValueError, match="ascends"):
            parse_lengths(text)
    else:
        assert parse_lengths(text) == numbers


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0..1", [0, 0.25, 0.5, 0.75, 1]),
        ("0..1:0.1", [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]),
        ("0..1:0.4", [0, 0.4, 0.8, 1]),
        ("0.5", [0.5]),
    ],
)
def test_depths(text: str, numbers: list[float]):
    assert parse_depths(text) == numbers


@pytest.mark.parametrize("text", ["", "x", "1..", "..2", "5..1", "5..9:0", "5..9:-1", "5:2", "0", "-3", "2.5", "nan",
                                  "1..inf", "1..99999999:1"])  # fmt: skip
def test_bad_lengths(text: str):
    with pytest.raises(ValueError, match="--frames"):
        parse_lengths(text)


@pytest.mark.parametrize("text", ["-0.1", "1.5", "0..2", "1..0"])
def test_bad_depths(text: str):
    with pytest.raises(ValueError, match="--depths"):
        parse_depths(text)


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 500))
def test_both_ends_are_in_and_numbers_ascend(low: int, span: int, step: int):
    found = parse_lengths(f"{low}..{low + span}:{step}")
    assert found[0] == low and found[-1] == low + span
    assert all(one < two for one, two in pairwise(found))
