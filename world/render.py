"""Pictures of a world: RGB frames at any side length and at any moments, drawn with NumPy alone.

Backdrops are drawn once for as long as they stand, shapes are drawn once as small anti-aliased sprites and pasted; a
frame costs a copy and a few pastes. Only what is asked for is drawn, so hours can be walked through in chunks.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from .world import COLOURS, SKY, Backdrop, Card, Thing, World, shuffled

TILES = 8  # on each side of a card that is cut up
_SUPERSAMPLE = 4
_SUN = (255, 250, 210)
_NIGHT = (18, 22, 40)


class WorldRenderer:
    """Draws one world with frames of `size` x `size` pixels."""

    def __init__(self, world: World, size: int = 64):
        if size < 32:
            raise ValueError(f"size={size}: frames of the rendered world are at least 32 pixels wide.")
        self.world = world
        self.size = size
        self._starts = [backdrop.start for backdrop in world.backdrops]
        self._drawn: tuple[int, np.ndarray, np.ndarray] | None = None
        self._sprites: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._card: tuple[slice, slice, np.ndarray] | None = None
        self._decoys = {decoy.start: decoy for decoy in world.decoys}

    def frames(self, times: Sequence[float]) -> np.ndarray:
        """Frames at `times` (seconds, each `0 <= t < world.seconds`), uint8 (F, H, W, 3)."""
        world, size = self.world, self.size
        out = np.empty((len(times), size, size, 3), np.uint8)
        for frame, time in zip(out, times, strict=True):
            if not 0 <= time < world.seconds:
                raise ValueError(f"time {time} s lies outside the video of {world.seconds} s.")
            number = bisect_right(self._starts, time) - 1
            ground, bugs = self._ground(number)
            frame[:] = ground
            if len(bugs):
                self._paste_bugs(frame, bugs, time - self._starts[number])
            if world.sun:
                self._paste_sun(frame, (time + 0.5) / world.seconds)
            for place, thing in enumerate(world.things):
                if thing.start <= time < thing.end:
                    self._paste_thing(frame, place, thing, time)
            card = world.card
            if card is not None and card.start <= time < card.start + 1:
                if self._card is None:
                    self._card = _card_picture(card, size)
                rows, columns, picture = self._card
                frame[rows, columns] = picture
            if (decoy := self._decoys.get(int(time))) is not None:
                rows, columns, picture = _card_picture(decoy, size)
                mixed = shuffled(random.Random(world.seed + (decoy.start << 100)), range(TILES * TILES))
                frame[rows, columns] = cut_up(picture, mixed)
        return out

    def chunks(self, fps: float = 1.0, chunk: int = 32) -> Iterator[np.ndarray]:
        """All frames at `fps`, uint8 (up to `chunk`, H, W, 3) at a time."""
        if not fps > 0:
            raise ValueError(f"fps={fps}: frames per second must be more than 0.")
        total = frame_count(self.world.seconds, fps)
        for first in range(0, total, chunk):
            yield self.frames([number / fps for number in range(first, min(first + chunk, total))])

    def _ground(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        if self._drawn is None or self._drawn[0] != number:
            self._drawn = (number, *_ground_picture(self.world.backdrops[number], self.size, self.world))
        return self._drawn[1], self._drawn[2]

    def _paste_bugs(self, frame: np.ndarray, bugs: np.ndarray, elapsed: float) -> None:
        side = max(self.size // 32, 1)
        span = np.array([1.0, 1.0 - SKY])
        spots = (bugs[:, :2] + bugs[:, 2:4] * elapsed) % span
        corners = (spots * self.size + np.array([0.0, SKY * self.size])).astype(int)
        for (x, y), tone in zip(corners.tolist(), bugs[:, 4].tolist(), strict=True):
            frame[y : y + side, x : x + side] = int(tone)

    def _paste_sun(self, frame: np.ndarray, progress: float) -> None:
        half = max(round(self.size * 0.035), 1)
        centre = min(max(int(progress * self.size), half), self.size - half)
        top = max(int(SKY * self.size) // 2 - half, 0)
        frame[top : top + 2 * half, centre - half : centre + half] = _SUN

    def _paste_thing(self, frame: np.ndarray, place: int, thing: Thing, time: float) -> None:
        if place not in self._sprites:
            self._sprites[place] = _sprite(thing, self.size)
        paint, keep = self._sprites[place]
        side = keep.shape[0]
        x, y = thing.position(time)
        left = min(max(round(x * self.size - side / 2), 0), self.size - side)
        top = min(max(round(y * self.size - side / 2), 0), self.size - side)
        region = frame[top : top + side, left : left + side]
        region[:] = region * keep + paint


def frame_count(seconds: int, fps: float) -> int:
    """Frames of a video of `seconds` at `fps`; at least one."""
    return max(int(seconds * fps + 1e-6), 1)


def render(world: World, fps: float = 1.0, size: int = 64) -> np.ndarray:
    """The whole video, uint8 (F, H, W, 3). For long videos walk through `WorldRenderer.chunks` instead."""
    return WorldRenderer(world, size).frames([number / fps for number in range(frame_count(world.seconds, fps))])


def _ground_picture(backdrop: Backdrop, size: int, world: World) -> tuple[np.ndarray, np.ndarray]:
    """The backdrop with its specks (H, W, 3) and the drifting bugs (N, 5): x, y, velocity x, velocity y, grey."""
    random = np.random.RandomState(backdrop.seed)  # the legacy generator's streams are frozen for good
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = axis[None, :], axis[:, None]
    cycles, phase, angle = random.uniform(3, 7), random.uniform(0, 1), random.uniform(0, 2 * np.pi)
    coarse = random.uniform(-1, 1, (9, 9)).astype(np.float32)
    specks = random.uniform(0, 1, (random.randint(4, 12), 4))
    bugs = random.uniform(0, 1, (random.randint(0, 4), 5))
    if backdrop.texture == "gradient":
        relief = (x - 0.5) * np.float32(np.cos(angle)) + (y - 0.5) * np.float32(np.sin(angle))
        relief = relief * 2
    elif backdrop.texture == "stripes":
        relief = np.sin(2 * np.pi * (cycles * (x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))) + phase))
    elif backdrop.texture == "checks":
        relief = np.where((np.floor(x * cycles + phase) + np.floor(y * cycles + phase)) % 2 > 0, 1.0, -1.0)
    elif backdrop.texture == "blotches":
        relief = _enlarge(coarse, size)
    else:
        relief = np.zeros((size, size), np.float32)
    tone = np.array(backdrop.tone, np.float32)
    ground = np.clip(tone * (1 + 0.28 * np.broadcast_to(relief, (size, size))[:, :, None]), 0, 130).astype(np.uint8)
    if world.clutter:
        for left, top, side, light in specks.tolist():
            half = max(int(size * (0.012 + 0.02 * side)), 1)
            column, row = int(left * (size - 2 * half)), int(top * (size - 2 * half))
            ground[row : row + 2 * half, column : column + 2 * half] = int(40 + 90 * light)
        bugs = np.column_stack((bugs[:, 0], bugs[:, 1] * (1 - SKY), (bugs[:, 2:4] - 0.5) * 0.16, 60 + 90 * bugs[:, 4]))
    else:
        bugs = bugs[:0]
    if world.sun:
        ground[: int(SKY * size)] = _NIGHT
    return ground, bugs


def _enlarge(coarse: np.ndarray, size: int) -> np.ndarray:
    """Bilinear enlargement of a small square grid to (size, size)."""
    last = coarse.shape[0] - 1
    place = np.linspace(0, last, size, dtype=np.float32)
    low = np.minimum(place.astype(int), last - 1)
    part = place - low
    rows = coarse[low] * (1 - part)[:, None] + coarse[low + 1] * part[:, None]
    return rows[:, low] * (1 - part) + rows[:, low + 1] * part


def _sprite(thing: Thing, size: int) -> tuple[np.ndarray, np.ndarray]:
    """`paint` (side, side, 3) and `keep` (side, side, 1), float32: the frame below becomes `frame * keep + paint`."""
    side = max(round(2 * thing.radius * size), 7)
    alpha, shade = _mask(thing.shape, thing.pattern, side)
    colour = np.array(COLOURS[thing.colour], np.float32)
    return alpha[:, :, None] * shade[:, :, None] * colour, 1 - alpha[:, :, None]


@lru_cache(maxsize=512)
def _mask(shape: str, pattern: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Coverage and brightness of a shape, both float32 (side, side)."""
    fine = (np.arange(side * _SUPERSAMPLE, dtype=np.float32) + 0.5) / (side * _SUPERSAMPLE) * 2 - 1
    x, y = np.broadcast_arrays(fine[None, :], fine[:, None])
    inside = _inside(shape, x, y).astype(np.float32)
    alpha = inside.reshape(side, _SUPERSAMPLE, side, _SUPERSAMPLE).mean((1, 3))
    centre = (np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1
    if pattern == "striped":
        dark = np.broadcast_to((np.floor(centre * 4) % 2 > 0)[None, :], (side, side))
    elif pattern == "dotted":
        dark = (np.floor(centre * 4) % 2 > 0)[None, :] & (np.floor(centre * 4) % 2 > 0)[:, None]
    else:
        dark = np.zeros((side, side), bool)
    return alpha, np.where(dark, np.float32(0.8), np.float32(1.0))


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points of the square [-1, 1]² (y downwards) belong to `shape`."""
    distance = np.hypot(x, y)
    if shape == "circle":
        return distance < 0.98
    if shape == "ring":
        return (distance < 1.0) & (distance > 0.52)
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) < 0.84
    if shape == "diamond":
        return np.abs(x) * 1.35 + np.abs(y) < 1.0
    if shape == "triangle":
        return (y < 0.9) & (y > -1.0 + 2.0 * np.abs(x) - 0.05)
    if shape == "cross":
        return (np.minimum(np.abs(x), np.abs(y)) < 0.3) & (np.maximum(np.abs(x), np.abs(y)) < 0.98)
    if shape == "star":
        wedge = np.abs((np.arctan2(x, -y) / (2 * np.pi / 5) + 0.5) % 1 - 0.5) * (2 * np.pi / 5)
        # a five-pointed star's edge: the line from a tip at radius 1 to a notch at radius 0.42
        notch = 0.42
        edge = (
            notch
            * np.sin(np.pi / 5)
            / (np.sin(wedge) * (1 - notch * np.cos(np.pi / 5)) + np.cos(wedge) * notch * np.sin(np.pi / 5))
        )
        return distance < edge
    if shape == "heart":
        u, v = x * 1.2, -y * 1.2 + 0.12
        return (u * u + v * v - 1) ** 3 - u * u * v**3 < 0
    raise ValueError(f"shape {shape!r} cannot be drawn.")


def cut_up(picture: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """A picture (h, w, 3) cut into `TILES` x `TILES` tiles that change places: `order` says whose part each shows."""
    high, wide = (side // TILES for side in picture.shape[:2])
    corners = [(y * high, x * wide) for y in range(TILES) for x in range(TILES)]
    mixed = picture.copy()
    for (y, x), number in zip(corners, order, strict=True):
        from_y, from_x = corners[number]
        mixed[y : y + high, x : x + wide] = picture[from_y : from_y + high, from_x : from_x + wide]
    return mixed


def _card_picture(card: Card, size: int) -> tuple[slice, slice, np.ndarray]:
    """Rows and columns that the card covers, and its picture."""
    top, left = int(size * 0.12), int(size * 0.16)
    height, width = size - top - max(int(size * 0.03), 1), size - 2 * left
    bitmap = np.array([[mark == "#" for mark in row] for row in GLYPHS[card.symbol]], bool)
    scale = min((height - 4) / bitmap.shape[0], (width - 4) / bitmap.shape[1])
    glyph_height, glyph_width = int(bitmap.shape[0] * scale), int(bitmap.shape[1] * scale)
    rows = np.arange(glyph_height) * bitmap.shape[0] // glyph_height
    columns = np.arange(glyph_width) * bitmap.shape[1] // glyph_width
    picture = np.empty((height, width, 3), np.uint8)
    picture[:] = card.paper
    picture[[0, -1]] = card.ink
    picture[:, [0, -1]] = card.ink
    y, x = (height - glyph_height) // 2, (width - glyph_width) // 2
    picture[y : y + glyph_height, x : x + glyph_width][bitmap[np.ix_(rows, columns)]] = card.ink
    return slice(top, top + height), slice(left, left + width), picture


# A 5 x 7 dot-matrix alphabet for the cards, so that they look the same on every machine.
_ROWS = """
2  .###. #...# ....# ..##. .#... #.... #####
3  ####. ....# ....# .###. ....# ....# ####.
4  ...#. ..##. .#.#. #..#. ##### ...#. ...#.
5  ##### #.... ####. ....# ....# #...# .###.
6  ..##. .#... #.... ####. #...# #...# .###.
7  ##### ....# ...#. ..#.. .#... .#... .#...
8  .###. #...# #...# .###. #...# #...# .###.
9  .###. #...# #...# .#### ....# ...#. .##..
A  .###. #...# #...# ##### #...# #...# #...#
C  .#### #.... #.... #.... #.... #.... .####
E  ##### #.... #.... ####. #.... #.... #####
F  ##### #.... #.... ####. #.... #.... #....
H  #...# #...# #...# ##### #...# #...# #...#
K  #...# #..#. #.#.. ##... #.#.. #..#. #...#
L  #.... #.... #.... #.... #.... #.... #####
M  #...# ##.## #.#.# #.#.# #...# #...# #...#
N  #...# ##..# ##..# #.#.# #..## #..## #...#
P  ####. #...# #...# ####. #.... #.... #....
R  ####. #...# #...# ####. #.#.. #..#. #...#
T  ##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..
U  #...# #...# #...# #...# #...# #...# .###.
V  #...# #...# #...# #...# .#.#. .#.#. ..#..
X  #...# #...# .#.#. ..#.. .#.#. #...# #...#
Y  #...# #...# .#.#. ..#.. ..#.. ..#.. ..#..
"""

GLYPHS: dict[str, tuple[str, ...]] = {line.split()[0]: tuple(line.split()[1:]) for line in _ROWS.strip().splitlines()}
