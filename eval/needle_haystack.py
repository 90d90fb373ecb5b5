"""Haystacks and needles: long videos without a card, and single frames that hold one up, with a question about it.

Needles are frames (pixels), inserted before the vision tower sees them, so a needle costs what any frame costs.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..processing.frame_fitting import fit_frame
from ..world import Question, World, WorldRenderer, WorldSettings, ask, build_world, video_seed
from ..world.render import TILES, cut_up
from ..world.world import CARD_SYMBOLS, Backdrop, Card
from .needle_grid import SYNTHETIC, check_haystack

_SMALLEST = 32  # pixels: the rendered world draws no smaller; smaller models get its frames scaled down
CHUNK = 64  # frames


@dataclass(frozen=True)
class Needle:
    """One inserted frame, uint8 (h, w, 3), and what is asked about it."""

    frame: np.ndarray
    questions: tuple[Question, ...]


class SyntheticHaystack:
    """A rendered video of its own for every length, without a card; needles are the scene of the moment with a card.

    The world is that of the training videos: a sun crosses it once, so a length is not the beginning of a longer one.
    """

    name = SYNTHETIC
    sha256 = None

    def __init__(self, size: tuple[int, int], resize_mode: str, seed: int):
        self.size, self.resize_mode, self.seed = size, resize_mode, seed

    def check(self, frames: int) -> None:
        """ValueError unless there are so many frames."""
        self._world(frames)

    def chunks(self, frames: int, turn: tuple[int, int] = (0, 1)) -> Iterator[np.ndarray]:
        """`frames` frames, uint8 (up to `CHUNK`, h, w, 3) at a time; of several that take turns, those of one."""
        renderer = WorldRenderer(self._world(frames), max(*self.size, _SMALLEST))
        for first in range(turn[0] * CHUNK, frames, turn[1] * CHUNK):
            chunk = renderer.frames(range(first, min(first + CHUNK, frames)))
            yield np.stack([fit_frame(frame, self.size, self.resize_mode) for frame in chunk])

    def scene(self, card: Card, frames: int, position: int) -> tuple[World, int]:
        """A world that holds up `card`, and the second at which to look at it."""
        second = min(position, frames - 1)  # behind the last frame, the scene is still that of the last frame
        return replace(self._world(frames), card=replace(card, start=second)), second

    def _world(self, frames: int) -> World:
        return build_world(video_seed("test", frames, self.seed), frames, WorldSettings(card=False))


class VideoHaystack:
    """The first frames of a video, `fps` of them a second; needles are cards on plain grey."""

    def __init__(self, reader: Any):
        self.reader = reader
        self.name, self.size, self.resize_mode = str(reader.name), reader.size, reader.resize_mode
        self.sha256 = reader.content_digest()

    def check(self, frames: int) -> None:
        """ValueError unless there are so many frames."""
        found = self.reader.expected_frames
        if found < frames:
            raise ValueError(
                f"--haystack {self.name} has {found} frames at {self.reader.sampling.fps:g} a second, "
                f"but --frames asks for {frames}: use a longer video, a higher --fps or fewer frames"
            )

    def chunks(self, frames: int, turn: tuple[int, int] = (0, 1)) -> Iterator[np.ndarray]:
        """`frames` frames, uint8 (up to `CHUNK`, h, w, 3) at a time; of several that take turns, those of one."""
        wanted = [min(CHUNK, frames - first) for first in range(turn[0] * CHUNK, frames, turn[1] * CHUNK)]
        read = 0
        try:
            for chunk, count in zip(self.reader.chunks(CHUNK, turn=turn), wanted, strict=False):
                read += min(len(chunk), count)
                yield chunk.pixels[:count]
        finally:
            self.reader.close()
        if read < sum(wanted):
            lost = f"{sum(wanted) - read} of {frames} frames could not be read"
            raise ValueError(f"--haystack {self.name} is damaged: {lost}; use fewer")

    def scene(self, card: Card, frames: int, position: int) -> tuple[World, int]:
        """A world that holds up `card`, and the second at which to look at it."""
        plain = Backdrop(0, 1, "plain", (70, 70, 70), 0)
        return World(0, 1, (), replace(card, start=0), (plain,), sun=False, clutter=False), 0


class Distracted:
    """A haystack some of whose frames are distractors: cards like the needle's, whose sign is cut up and mixed.

    Colours, brightness and place are a needle's, but there is nothing to be read: what is asked has one right answer.

    Args:
        count: of frames, at places that a haystack's length and `seed` decide.
    """

    def __init__(self, haystack: Any, count: int, seed: int):
        self.haystack, self.count, self.seed = haystack, count, seed

    def __getattr__(self, name: str) -> Any:
        return getattr(self.haystack, name)

    def places(self, frames: int) -> list[int]:
        """Numbers of the frames that are distractors."""
        return sorted(random.Random((self.seed << 24) + frames + (1 << 90)).sample(range(frames), self.count))

    def chunks(self, frames: int, turn: tuple[int, int] = (0, 1)) -> Iterator[np.ndarray]:
        """As the haystack's own."""
        places = self.places(frames)
        for number, chunk in enumerate(self.haystack.chunks(frames, turn)):
            first = (turn[0] + number * turn[1]) * CHUNK
            own = [place for place in places if first <= place < first + len(chunk)]
            if own:
                chunk = chunk.copy()
                for place in own:
                    chunk[place - first] = self._picture(frames, place)
            yield chunk

    def _picture(self, frames: int, place: int) -> np.ndarray:
        rng = random.Random(((self.seed << 24) + frames << 24) + place + (1 << 91))
        card = build_world(int(rng.random() * 2**40), 4).card
        assert card is not None  # of the usual settings
        world, second = self.haystack.scene(card, frames, place)
        side = max(*self.haystack.size, _SMALLEST)
        picture = WorldRenderer(world, side).frames([second])[0]
        bare = WorldRenderer(replace(world, card=None), side).frames([second])[0]
        return fit_frame(_mixed(picture, bare, rng), self.haystack.size, self.haystack.resize_mode)


def _mixed(picture: np.ndarray, bare: np.ndarray, rng: random.Random) -> np.ndarray:
    """A picture (h, w, 3) whose part that differs from a `bare` one is cut into tiles, which change places."""
    rows, columns = np.nonzero((picture != bare).any(-1))
    top, left = rows.min(), columns.min()
    part = slice(top, rows.max() + 1), slice(left, columns.max() + 1)
    mixed = picture.copy()
    mixed[part] = cut_up(picture[part], rng.sample(range(TILES**2), TILES**2))
    return mixed


def open_haystack(source: str, processor: Any, *, fps: float = 1.0, seed: int = 0) -> Any:
    """The haystack called `synthetic`, or one made of a video file, a folder of pictures or an address.

    Raises:
        FileNotFoundError: there is no such video.
        ValueError: it is no video, or `fps` is out of range.
    """
    video_processor = processor.video_processor
    size = (video_processor.size["height"], video_processor.size["width"])
    if source == SYNTHETIC:
        return SyntheticHaystack(size, video_processor.resize_mode, seed)
    check_haystack(source)
    return VideoHaystack(video_processor.open(source, fps=fps))


def make_needles(
    haystack: Any, frames: int, position: int, count: int, forms: Sequence[str], seed: int
) -> list[Needle]:
    """`count` needles for the place before frame `position` of a haystack of `frames` frames (`frames`: behind all).

    Signs do not repeat before all have been used. The same arguments give the same needles.
    """
    rng = random.Random(((seed << 24) + frames << 24) + position)
    side = max(*haystack.size, _SMALLEST)
    needles: list[Needle] = []
    used: set[str] = set()
    while len(needles) < count:
        drawn = int(rng.random() * 2**40)
        card = build_world(drawn, 4).card
        if card.symbol in used:
            continue
        used = set() if len(used) + 1 == len(CARD_SYMBOLS) else used | {card.symbol}
        world, second = haystack.scene(card, frames, position)
        picture = WorldRenderer(world, side).frames([second])[0]
        asked = [ask(replace(world, seed=drawn), 1, ("needle",), (form,))[0] for form in forms]
        needles.append(Needle(fit_frame(picture, haystack.size, haystack.resize_mode), tuple(asked)))
    return needles
