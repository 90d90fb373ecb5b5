"""Does the time that an answer names agree with where its evidence lies?"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .relevance import Relevance

_NUMBER = r"\d+(?:\.\d+)?"
_CLOCK = re.compile(
    rf"(?:(\d+):)?(\d{{1,2}}):(\d{{2}}(?:\.\d+)?)|({_NUMBER})\s*(?:seconds?|secs?|s)\b|second\s+({_NUMBER})"
)
_MINUTES = re.compile(rf"({_NUMBER})\s*(?:minutes?|mins?|m)\b")
_PARTS = {"half": 2, "third": 3, "quarter": 4, "fifth": 5}
_ORDINALS = {"first": 0, "second": 1, "third": 2, "fourth": 3, "last": -1, "final": -1}
_SPOKEN = {"beginning": (0, 1 / 3), "start": (0, 1 / 3), "middle": (1 / 3, 2 / 3), "end": (2 / 3, 1)}
_OPTION = re.compile(r"\(([A-Z])\)\s*([^()]+)")


@dataclass(frozen=True)
class TimeCheck:
    """A named time beside the curve.

    Attributes:
        named: first and last second of what the answer names. peak: second that speaks most for the answer.
        agrees: whether the peak lies inside, give or take the tolerance.
        share: of all evidence for the answer (positive values), the part inside, same tolerance; 0..1.
        expected_share: what an even curve would have inside.
    """

    named: tuple[float, float]
    peak: float
    agrees: bool
    share: float
    expected_share: float

    def __str__(self) -> str:
        verdict = "agrees with" if self.agrees else "contradicts"
        low, high = self.named
        return (
            f"the peak at {self.peak:.1f} s {verdict} the time named, {low:.1f} to {high:.1f} s, "
            f"which holds {self.share:.0%} of the evidence ({self.expected_share:.0%} if it were spread evenly)"
        )


def check_time(found: Relevance, tolerance: float = 1.0) -> TimeCheck | None:
    """Compare the time named in the answer with the curve; None where the answer names none that we can read.

    Read are clock times (`1:05`, `00:01:05`), seconds and minutes (`12 s`, `second 12`, `2 minutes`), two of them as a
    span, ordinal parts (`third quarter`, or `third` after a question about quarters), `beginning`, `middle` and `end`,
    and the letter of an option of the question that says one of these.

    Args:
        tolerance: seconds by which the peak may lie outside of what is named.
    """
    named = named_span(found.question, found.answer, found.duration)
    if named is None:
        return None
    inside = (found.times >= named[0] - tolerance) & (found.times <= named[1] + tolerance)
    evidence = found.attribution.clip(min=0)
    total = evidence.sum()
    return TimeCheck(
        named=named,
        peak=found.peak,
        agrees=named[0] - tolerance <= found.peak <= named[1] + tolerance,
        share=float(evidence[inside].sum() / total) if total > 0 else 0.0,
        expected_share=float(inside.mean()),
    )


def named_span(question: str, answer: str, duration: float) -> tuple[float, float] | None:
    """First and last second of the time that `answer` names in a video of `duration` seconds, or None."""
    options = dict(_OPTION.findall(question))
    letter = answer.strip().strip("().").upper()
    text = options.get(letter, answer).lower()
    moments = sorted(_moments(text))
    if moments:
        return moments[0], moments[-1]
    words = re.findall("[a-z]+", text)
    asked = re.findall("[a-z]+", _OPTION.sub("", question).lower())
    for number, word in enumerate(words):
        if word not in _ORDINALS:
            continue
        following = words[number + 1] if number + 1 < len(words) else ""
        part = following.removesuffix("s") if following.removesuffix("s") in _PARTS else None
        if part is None:
            part = next((w.removesuffix("s") for w in asked if w.removesuffix("s") in ("half", "quarter")), None)
        if part is not None:
            place = _ORDINALS[word] % _PARTS[part]
            return duration * place / _PARTS[part], duration * (place + 1) / _PARTS[part]
    for word in words:
        if word in _SPOKEN:
            low, high = _SPOKEN[word]
            return duration * low, duration * high
    return None


def _moments(text: str) -> list[float]:
    found = [60 * float(minutes) for minutes in _MINUTES.findall(text)]
    for hours, minutes, seconds, plain, after in _CLOCK.findall(text):
        if seconds:
            found.append(3600 * int(hours or 0) + 60 * int(minutes) + float(seconds))
        else:
            found.append(float(plain or after))
    return found
