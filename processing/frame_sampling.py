"""Decides which frames of a video are looked at, from the times at which its frames are shown."""

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

MAX_FPS = 1000.0
MAX_SAMPLES = 2**22
"""Frames that may be taken from one video (48 days at 1 a second): damaged time stamps may claim any duration."""
TIME_TOLERANCE = 1e-3
"""Seconds by which a frame may be late and still count as shown at a sampling moment.

Several containers (Matroska, FLV) round times to milliseconds: without it, sampling at the video's own rate would give
some frames twice and others not at all.
"""
_CLOCK = re.compile(r"(?:(\d+):)?(\d+):(\d{1,2}(?:\.\d*)?)")


def seconds_of(value: Any, name: str) -> float | None:
    """Seconds from a number, a number in a text, or a clock time such as 1:30 or 0:01:02.5; None for nothing.

    Args:
        name: what the value is called, for the message.

    Raises:
        ValueError: it is none of these.
    """
    if value is None or value == "":
        return None
    if match := _CLOCK.fullmatch(str(value).strip()):
        hours, minutes, rest = match.groups()
        return int(hours or 0) * 3600 + int(minutes) * 60 + float(rest)
    try:
        if not isinstance(value, bool):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{name}={value!r} is no time: write seconds, m:ss or h:mm:ss")


@dataclass(frozen=True)
class Sampling:
    """What to sample; times in seconds from the first frame.

    Args:
        fps: frames per second to look at (ignored when `num_frames` is given).
        num_frames: look at this many frames spread evenly over the whole, first and last included; a video with
            fewer frames gives each of them once.
        start, end: part of the video to look at, `start <= t < end`; None is the beginning, the end. Clock times
            such as "1:30" are turned into seconds.
        max_frames: upper limit; where `fps` would give more, this many frames spread evenly are looked at instead.

    Raises:
        ValueError: a value is out of range.
    """

    fps: float | None = 1.0
    num_frames: int | None = None
    start: float | None = None
    end: float | None = None
    max_frames: int | None = None

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, seconds_of(value, name))
        if self.num_frames is None:
            if self.fps is None:
                raise ValueError("give either fps or num_frames")
            if not 0 < self.fps <= MAX_FPS:  # also refuses NaN
                raise ValueError(f"fps must be more than 0 and at most {MAX_FPS:g}, not {self.fps}")
        for name in ("num_frames", "max_frames"):
            value = getattr(self, name)
            if value is not None and (value != int(value) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, not {value}")
        for name in ("start", "end"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a time in seconds of at least 0, not {value}")
        if self.end is not None and (self.start or 0.0) >= self.end:
            raise ValueError(f"start ({self.start or 0:g} s) must come before end ({self.end:g} s)")

    def choose(self, times: np.ndarray, duration: float, name: str) -> np.ndarray:
        """Indices of the frames to look at: for each sampling moment t the frame on screen, the last with time <= t.

        Args:
            times: float64 `(N,)`, seconds at which each frame is first shown, ascending, `times[0] == 0`.
            duration: seconds until the last frame ends.
            name: the video's name for error messages.

        Returns:
            int64, non-decreasing (a frame that stays on screen for longer is seen again).

        Raises:
            ValueError: `start` lies beyond the end of the video.
        """
        begin = self.start or 0.0
        finish = duration if self.end is None else min(self.end, duration)
        if begin >= duration:
            raise ValueError(f"{name}: start ({begin:g} s) is beyond the end of the video ({duration:.3f} s)")

        def on_screen(moments: ArrayLike) -> np.ndarray:
            return np.maximum(np.searchsorted(times, np.asarray(moments) + TIME_TOLERANCE, side="right") - 1, 0)

        limit = self.max_frames
        if self.num_frames is not None:
            most = self.num_frames if limit is None else min(limit, self.num_frames)
            first = int(on_screen(begin))
            last = max(first, int(on_screen(finish - 2 * TIME_TOLERANCE)))
            if last - first < most:
                return np.arange(first, last + 1)
            return on_screen(np.linspace(begin, max(begin, times[last]), most))
        assert self.fps is not None, "seen to in __post_init__"
        count = max(1, math.ceil((finish - begin - TIME_TOLERANCE) * self.fps))
        if min(count, limit or count) > MAX_SAMPLES:
            raise ValueError(
                f"{name}: {self.fps:g} frames a second of {finish - begin:.0f} s are too many ({count}); "
                "lower fps, or set end or max_frames"
            )
        if limit is not None and count > limit:
            return on_screen(np.linspace(begin, begin + (count - 1) / self.fps, limit))
        return on_screen(begin + np.arange(count) / self.fps)
