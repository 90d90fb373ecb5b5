"""What is said in a world, as subtitles, and a world's frames with their times, as a reader gives them.

A voice names a sign, which is never shown, and says of a shape which colour it has: half of the time the picture says
otherwise. Both are decided by the world's seed, in a stream of random numbers of their own, so that what is shown is
the same with and without them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..processing.frame_sampling import Sampling
from ..processing.frame_times import Cue
from .world import CARD_SYMBOLS, COLOURS, World, pick, whole

if TYPE_CHECKING:  # it loads torch, which the settings of a world do without
    from ..processing.video_reader import FrameChunk

CUE_SECONDS = 2
SIGN_CUES = ("The sign is {}.", "Remember the sign {}.")


@dataclass(frozen=True)
class Speech:
    """`sign`: named aloud. `claim`: a shape and the colour that the voice gives it; None: no shape comes alone."""

    sign: str
    claim: tuple[str, str] | None
    cues: tuple[Cue, ...]


def speech_of(world: World) -> Speech:
    """What is said in a world; times are those of its own video, which begins at `world.begin`."""
    rng = random.Random((world.seed << 20) + (1 << 101))
    sign = pick(rng, [s for s in CARD_SYMBOLS if world.card is None or s != world.card.symbol]).lower()
    cues = [_cue(rng, world, pick(rng, SIGN_CUES).format(sign))]
    shapes = [thing.shape for thing in world.things]
    alone = [thing for thing in world.things if shapes.count(thing.shape) == 1]
    claim = None
    if alone:
        thing = pick(rng, alone)
        others = [colour for colour in COLOURS if colour != thing.colour]
        claim = thing.shape, thing.colour if rng.random() < 0.5 else pick(rng, others)
        cues.append(_cue(rng, world, "The {} is {}.".format(*claim)))
    return Speech(sign, claim, tuple(sorted(cues, key=lambda cue: cue.start)))


def _cue(rng: random.Random, world: World, text: str) -> Cue:
    start = float(world.moment(whole(rng, 0, max(world.seconds - 2, 0)) + 0.5))
    return Cue(start, start + CUE_SECONDS, text)


@dataclass
class TimedFrames:
    """A rendered video as a reader of frames with their times: `pixels` uint8 (F, h, w, 3), `timestamps` (F,) seconds.

    It takes the place of a file of which a part was read: the first frame may be any moment of it.
    """

    pixels: np.ndarray
    timestamps: np.ndarray
    duration: float
    name: str = "<rendered frames>"
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def of_world(cls, pixels: np.ndarray, world: World, fps: float = 1.0) -> TimedFrames:
        """Frames of a world, and of what was earlier, at `fps`, in a video that ends with it."""
        times = world.moment(np.arange(len(pixels)) / fps - world.earlier)
        return cls(pixels, times, float(world.moment(world.seconds)))

    def __enter__(self) -> TimedFrames:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.pixels.shape[1], self.pixels.shape[2]

    @property
    def sampling(self) -> Sampling:
        """What was looked at."""
        return Sampling(start=float(self.timestamps[0]))

    @property
    def frame_times(self) -> np.ndarray:
        """As of a `FrameReader`."""
        return self.timestamps

    @property
    def expected_frames(self) -> int:
        """Number of frames."""
        return len(self.pixels)

    def resampled(self, **changes: Any) -> TimedFrames:
        """The same frames: they are chosen already. ValueError where fewer are wanted."""
        if changes:
            raise ValueError("frames of a rendered world are chosen already: render fewer of them")
        return replace(self)

    def chunks(self, n: int = 32, skip: int = 0, threads: int | None = None) -> Iterator[FrameChunk]:
        """As of a `FrameReader`."""
        for first in range(skip, len(self.pixels), n):
            yield _chunk(self.pixels[first : first + n], self.timestamps[first : first + n])

    def read(self) -> FrameChunk:
        """All at once."""
        return _chunk(self.pixels, self.timestamps)

    def content_digest(self) -> None:
        """There is no file."""

    def close(self) -> None:
        """Nothing is open."""


def _chunk(pixels: np.ndarray, timestamps: np.ndarray) -> FrameChunk:
    from ..processing.video_reader import FrameChunk

    return FrameChunk(pixels, timestamps)
