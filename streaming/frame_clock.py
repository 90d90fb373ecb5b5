"""Chooses frames of a stream at a steady rate, as `Sampling` chooses those of a file, without knowing what follows."""

import math
from collections.abc import Iterator
from typing import Any

from ..processing.frame_sampling import TIME_TOLERANCE, Sampling


class FrameClock:
    """For each moment `begin + k / fps` the frame on screen: the last one shown by then.

    A moment is settled as soon as a frame comes that is shown at it or after it, so nothing is held back for longer
    than the stream takes to go on.

    Args:
        fps: frames per second to look at. ValueError where `Sampling` raises it.
    """

    def __init__(self, fps: float):
        self.fps = Sampling(fps=fps).fps
        self.restart()

    def restart(self) -> None:
        """Begin anew with the next frame, as after a break: the picture before it is not shown on."""
        self._begin: float | None = None
        self._number = 0
        self._shown: tuple[Any, float] | None = None
        self._step = 1 / self.fps

    @property
    def latest(self) -> float | None:
        """Seconds of the last frame that came; None before the first."""
        return None if self._shown is None else self._shown[1]

    def add(self, frame: Any, seconds: float) -> Iterator[tuple[Any, float]]:
        """Take the next frame; yields chosen `(frame, its seconds)`, some twice where the picture stood still.

        The iterator must be used up before the next frame is given.

        Raises:
            ValueError: `seconds` lies before the last frame, or is not finite.
        """
        if not math.isfinite(seconds):
            raise ValueError(f"a frame's time must be a number of seconds, not {seconds}")
        if self._shown is not None:
            if seconds < self._shown[1]:
                raise ValueError(f"frames must come in order: one of {seconds:g} s came after {self._shown[1]:g} s")
            self._step = seconds - self._shown[1] or self._step
            while self._moment() + TIME_TOLERANCE < seconds:
                self._number += 1
                yield self._shown
        else:
            self._begin = seconds
        self._shown = frame, seconds
        if self._moment() <= seconds:
            self._number += 1
            yield self._shown

    def finish(self, lasts: float | None = None) -> Iterator[tuple[Any, float]]:
        """The stream ends, or breaks off: yields the last frame for every moment at which it was still shown.

        Args:
            lasts: seconds the last frame is shown; None: as long as the one before it.
        """
        if self._shown is not None:
            end = self._shown[1] + (lasts or self._step)
            while self._moment() + TIME_TOLERANCE < end:
                self._number += 1
                yield self._shown
        self.restart()

    def _moment(self) -> float:
        return self._begin + self._number / self.fps
