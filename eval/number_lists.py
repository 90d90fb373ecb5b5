"""Lists of numbers as people write them: `64,128,256`, `100..6000:100`, `0..1:0.25`."""

from __future__ import annotations

import math

_MOST = 10_000


def parse_numbers(text: str, option: str, points: int) -> list[float]:
    """The numbers that `text` stands for, ascending, without repeats.

    Parts are separated by commas; each is a number or a range `first..last`, with `:step` behind it or spread evenly
    over `points` numbers. Both ends of a range always belong to it.

    Raises:
        ValueError: something else, naming `option`.
    """
    found: set[float] = set()
    for part in text.split(","):
        found |= set(_part(part.strip(), text, option, points))
    return sorted(found)


def parse_lengths(text: str, option: str = "--frames") -> list[int]:
    """Whole numbers of at least 1; a range without a step gives 10 of them."""
    numbers = parse_numbers(text, option, 10)
    whole = sorted({round(number) for number in numbers})
    ranged = ".." in text
    if whole[0] < 1 or (not ranged and whole != numbers):
        raise ValueError(f"{option} {text}: lengths are whole numbers of frames, at least 1")
    return whole


def parse_depths(text: str, option: str = "--depths") -> list[float]:
    """Fractions within 0..1; a range without a step gives 5 of them."""
    numbers = parse_numbers(text, option, 5)
    if numbers[0] < 0 or numbers[-1] > 1:
        raise ValueError(f"{option} {text}: depths lie between 0 (before the first frame) and 1 (behind the last)")
    return numbers


def _part(part: str, text: str, option: str, points: int) -> list[float]:
    span, colon, step_text = part.partition(":")
    low_text, dots, high_text = span.partition("..")
    try:
        low = float(low_text)
        high = float(high_text) if dots else low
        step = float(step_text) if colon else (high - low) / (points - 1)
        if not all(map(math.isfinite, (low, high, step))) or (colon and not dots):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"{option} {text}: write numbers such as 64,128 or a range such as first..last or first..last:step"
        ) from None
    if low == high and not colon:
        return [low]
    if low >= high or step <= 0:
        raise ValueError(f"{option} {text}: a range ascends, by a step of more than 0")
    count = math.floor((high - low) / step + 1e-9)
    if count > _MOST:
        raise ValueError(f"{option} {text}: these are more than {_MOST} numbers; use a larger step")
    # Multiples of the step, not sums, so that 0.1 + 0.2 stays 0.3.
    return [*(round(low + number * step, 6) for number in range(count + 1)), high]
