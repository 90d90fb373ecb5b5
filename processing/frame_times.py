"""What is read between the frames of a video: time stamps, and the cues of subtitles, as tokens of text.

    [0:00] FRAME FRAME FRAME FRAME [0:04] FRAME "The sign says K." FRAME ...

What stands in front of a frame depends on its time and on that of the frame before it, on nothing else: a video may be
read in any pieces, as a file or as a stream, and the same tokens come. Legend: T tokens of a frame.
"""

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

TIME_MODES = ("none", "text", "learned")
TIMES_EVERY = 4.0
"""Seconds between two time stamps, unless a checkpoint says otherwise."""
SUBTITLE_TOKENS = 32768
"""Tokens of subtitles that are read of one video, unless a call says otherwise: two to three hours of speech."""

NO_TIMES = (
    "this checkpoint never learnt times (its frame_times is 'none'): ask without them, or ask `where` for the seconds "
    "that speak for an answer"
)
_UNITS = (("h", 24), ("m", 60), ("s", 60))
TIME_TOKENS = tuple(
    [f"<|{number} {unit}|>" for unit, base in _UNITS for number in range(base)] + [f"<|.{n} s|>" for n in range(1, 10)]
)
"""Tokens of learned time stamps: hours (of a day or more, as digits of base 24), minutes, seconds, and tenths."""

Texts = list[tuple[int, list[int]]]
"""Token ids, each with the number of the frame that it stands in front of; ascending."""

_CLOCK = r"(?:(\d+):)?(\d{1,2}):(\d{2}(?:\.\d+)?)"
_SPAN = re.compile(rf"(?:(.*\S)\s+)?\[{_CLOCK}-{_CLOCK}\]", re.S)
_NAMED = re.compile(
    rf"(?<![\w:.])(?:{_CLOCK}(?![\w:])|(?:(\d+)\s*(?:h|hours?)\s*)?(?:(\d+)\s*(?:m|min|minutes?)\s*)?"
    r"(\d+(?:\.\d+)?)\s*(?:s|sec|secs|seconds?)\b)"
)
_RANGE = re.compile(r"(?<![\w:.])(\d+(?:\.\d+)?)(?=\s*(?:-|–|to|and)\s*\d+(?:\.\d+)?\s*(?:s|sec|secs|seconds?)\b)")
TIMES_REQUEST = "Give the times."
"""Follows a question whose answer is to end in the span of video that shows it."""


@dataclass(frozen=True)
class Cue:
    """What is said from `start` to `end`, in seconds from the video's first frame."""

    start: float
    end: float
    text: str


def check_frame_times(mode: str, every: float) -> None:
    """ValueError unless `mode` is one of `TIME_MODES` and stamps are more than 0 seconds apart."""
    if mode not in TIME_MODES or not every > 0:
        raise ValueError(
            f"frame_times={mode!r}, frame_times_every={every}: use one of {', '.join(TIME_MODES)}, and more than 0 "
            "seconds"
        )


def clock(seconds: float) -> str:
    """`0:07`, `12:30`, `1:02:03`; with tenths where there are any: `0:07.5`."""
    whole, tenth = divmod(round(float(seconds) * 10), 10)
    hours, rest = divmod(whole, 3600)
    text = f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
    return f"{text}.{tenth}" if tenth else text


def time_tokens(seconds: float) -> list[str]:
    """What `clock` writes, of `TIME_TOKENS`: `<|1 h|><|2 m|><|3 s|>`; hours and tenths only where there are any."""
    whole, tenth = divmod(round(float(seconds) * 10), 10)
    hours, rest = divmod(whole, 3600)
    digits: list[int] = []
    while hours:
        hours, digit = divmod(hours, 24)
        digits.insert(0, digit)
    named = [f"<|{digit} h|>" for digit in digits]
    return [*named, f"<|{rest // 60} m|>", f"<|{rest % 60} s|>", *([f"<|.{tenth} s|>"] if tenth else [])]


def span_text(start: float, end: float) -> str:
    """A span as answers give it: `[0:07-0:12]`."""
    return f"[{clock(start)}-{clock(end)}]"


def parse_span(answer: str) -> tuple[str, float, float] | None:
    """What an answer says and the span that it ends in, in seconds; None where it does not end in one.

    Only the very form of `span_text` counts, and an end that does not lie before the start.
    """
    found = _SPAN.fullmatch(answer.strip())
    if found is None:
        return None
    start, end = (_seconds(*found.group(*places)) for places in ((2, 3, 4), (5, 6, 7)))
    return (found[1] or "", start, end) if start is not None and end is not None and start <= end else None


def _seconds(hours: str | None, minutes: str, seconds: str) -> float | None:
    """None where minutes or seconds are 60 or more."""
    if float(seconds) >= 60 or (hours is not None and int(minutes) >= 60):
        return None
    return round(int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds), 3)


def as_clocks(question: str) -> str:
    """A question whose moments (`80 s`, `1 min 20 s`, `00:01:20`) are written as time stamps are: `1:20`."""

    def rewritten(found: re.Match[str]) -> str:
        if found[2] is not None:
            seconds = _seconds(*found.group(1, 2, 3))
        else:
            seconds = int(found[4] or 0) * 3600 + int(found[5] or 0) * 60 + float(found[6])
        return found[0] if seconds is None else clock(seconds)

    return _NAMED.sub(rewritten, _RANGE.sub(lambda found: clock(float(found[1])), question))


@dataclass(frozen=True)
class FrameText:
    """Turns times of frames into what is read between them.

    Args:
        encode: token ids of a text.
        every: seconds between time stamps; None: there are none.
        cues: in the order of their starts.
        begin, end: seconds of the part of the video that is read; cues outside of it are not told.
        stamp: token ids of a moment; None: those of `[clock]`.
    """

    encode: Callable[[str], list[int]]
    every: float | None = None
    cues: tuple[Cue, ...] = ()
    begin: float = 0.0
    end: float = math.inf
    stamp: Callable[[float], list[int]] | None = None

    def texts(self, times: Sequence[float] | np.ndarray, previous: float | None = None) -> Texts:
        """What stands in front of frames shown at `times`.

        Args:
            previous: time of the frame before them; None where reading begins.
        """
        found: Texts = []
        for place, moment in enumerate(map(float, times)):
            ids = self._cues(previous, moment)
            if self.stamps_at(moment, previous):
                ids += self.encode(f"[{clock(moment)}]") if self.stamp is None else self.stamp(moment)
            if ids:
                found.append((place, ids))
            previous = moment
        return found

    def ending(self, previous: float) -> list[int]:
        """What stands behind the last frame, shown at `previous`."""
        return self._cues(previous, math.inf)

    def stamps_at(self, moment: float, previous: float | None) -> bool:
        """Whether a time stamp stands in front of a frame: the first of all, and the first of every interval."""
        if self.every is None or previous is None:
            return self.every is not None
        return self._interval(moment) != self._interval(previous)

    def row(self, times: Sequence[float] | np.ndarray, video_token: int, tokens_per_frame: int) -> list[int]:
        """All that stands for a video whose frames are shown at `times`: texts, and `video_token` T times a frame."""
        ids: list[int] = []
        texts = dict(self.texts(times))
        for place in range(len(times)):
            ids += texts.get(place, [])
            ids += [video_token] * tokens_per_frame
        return ids + (self.ending(float(times[-1])) if len(times) else [])

    def _interval(self, moment: float) -> int:
        assert self.every is not None, "there are no time stamps"
        return math.floor(round(moment, 1) / self.every + 1e-9)

    def _cues(self, previous: float | None, moment: float) -> list[int]:
        """Tokens of the cues that begin behind the frame before and not behind this one; at the beginning of a reading
        also of what is being said. What was read up to `begin` by an earlier reading is not told again."""
        after = -math.inf if previous is None else previous
        ids: list[int] = []
        for cue in self.cues[bisect_right(self.cues, after, key=lambda cue: cue.start) :]:
            if cue.start > moment or cue.start >= self.end:
                break
            if cue.start >= self.begin or (previous is None and cue.end > self.begin):
                ids += self.stamp(cue.start) if self.stamp is not None else []
                stamp = "" if self.every is None or self.stamp is not None else f"[{clock(cue.start)}] "
                ids += self.encode(f'{stamp}"{cue.text}"')
        return ids

    def part_of(self, cues: Sequence[Cue]) -> list[Cue]:
        """Those of `cues` that are told while this part of the video is read."""
        return [cue for cue in cues if cue.start < self.end and (cue.start >= self.begin or cue.end > self.begin)]


def spread_cues(cues: Sequence[Cue], sizes: Sequence[int], budget: int) -> list[Cue]:
    """As many cues as fit into `budget` tokens, every so many-th of the whole, so that no part of the video is silent.

    Args:
        sizes: tokens of each cue.
    """
    step = 1
    while step <= len(cues) and sum(sizes[::step]) > budget:
        step += 1
    return list(cues[::step]) if step <= len(cues) else []


@dataclass(frozen=True)
class TimedChunk:
    """A chunk of frames with what is read between them; see `FrameChunk`. A place may lie behind the last frame."""

    pixels: np.ndarray
    timestamps: np.ndarray
    texts: Texts

    def __len__(self) -> int:
        return len(self.pixels)


class TimedReader:
    """A reader whose chunks tell what is read between their frames; in all else the reader that it is made of.

    Attributes:
        untimed: that reader. text: gives what is told.
        after: time of the frame with which an earlier reading stopped that this one continues; None: it begins.
        subtitles: what is known of the subtitles, for a state's metadata; None where there are none.
    """

    def __init__(self, reader: Any, text: FrameText, subtitles: dict[str, Any] | None = None) -> None:
        self.untimed, self.text, self.subtitles = reader, text, subtitles
        self.after: float | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "untimed":  # asked for before there is any reader, by pickle
            raise AttributeError(name)
        return getattr(self.untimed, name)

    def __enter__(self) -> "TimedReader":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.untimed.close()

    def resampled(self, **changes: Any) -> "TimedReader":
        """As in `FrameReader`; cues are those of the new part."""
        other = self.untimed.resampled(**changes)
        return TimedReader(other, within(self.text, other.sampling), self.subtitles)

    def chunks(
        self, n: int = 32, skip: int = 0, turn: tuple[int, int] = (0, 1), **settings: Any
    ) -> Iterator[TimedChunk]:
        """As in `FrameReader`, with texts; those behind the last frame come with a chunk that has none, or with that
        frame's chunk where readers take turns."""
        previous = self.after
        if turn != (0, 1):
            yield from self._turns(n, skip, turn, settings)
            return
        for chunk in self.untimed.chunks(n, skip=skip, **settings):
            yield TimedChunk(chunk.pixels, chunk.timestamps, self.text.texts(chunk.timestamps, previous))
            previous = float(chunk.timestamps[-1])
        ending = [] if previous is None else self.text.ending(previous)
        if ending:
            size = self.untimed.size or (1, 1)
            yield TimedChunk(np.empty((0, *size, 3), np.uint8), np.empty(0), [(0, ending)])

    def _turns(self, n: int, skip: int, turn: tuple[int, int], settings: dict[str, Any]) -> Iterator[TimedChunk]:
        """This turn's chunks. The frames before them are another's: their times are those at which they were due."""
        times, place = self.untimed.frame_times, skip + turn[0] * n
        for chunk in self.untimed.chunks(n, skip=skip, turn=turn, **settings):
            texts = self.text.texts(chunk.timestamps, float(times[place - 1]) if place else self.after)
            if place + len(chunk) >= len(times):
                ending = self.text.ending(float(chunk.timestamps[-1]))
                texts += [(len(chunk), ending)] if ending else []
            yield TimedChunk(chunk.pixels, chunk.timestamps, texts)
            place += turn[1] * n


def within(text: FrameText, sampling: Any) -> FrameText:
    """The text for the part of a video that a `Sampling` looks at."""
    begin, end = sampling.start or 0.0, math.inf if sampling.end is None else sampling.end
    return replace(text, begin=begin, end=end)
