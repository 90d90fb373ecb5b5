"""The rendered world: what happens in one video, decided by one integer.

A world is a short list of facts: coloured shapes that come, move and go, a card that is held up for one second,
backdrops that change now and then. Nothing random is left once it is built: ``render.py`` and ``questions.py`` only
read it. Everything is in seconds and in units of the frame's side (0..1, y downwards), so a world can be drawn at
any resolution and any frame rate.

Random numbers come from ``random.Random.random`` alone: its stream for a given seed is guaranteed not to change
between Python versions, which is not true of ``choice``, ``shuffle`` or NumPy's ``Generator``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

SPLITS = ("train", "validation", "test")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (228, 26, 34),
    "green": (34, 190, 60),
    "blue": (50, 100, 255),
    "yellow": (252, 232, 30),
    "orange": (255, 132, 0),
    "purple": (176, 50, 224),
    "cyan": (30, 226, 232),
    "white": (248, 248, 248),
}
DIRECTIONS = ("left", "right", "up", "down")
QUARTERS = ("first", "second", "third", "fourth")
CARD_SYMBOLS = (
    "23456789ACEFHKLMNPRTUVXY"  # pairs that look alike on a coarse grid (0/O/Q, 1/I, B/8, S/5, Z/2 …) keep one
)
PATTERNS = ("solid", "striped", "dotted")
TEXTURES = ("plain", "gradient", "stripes", "checks", "blotches")

SKY = 0.09  # height of the strip at the top in which the sun travels
MAX_SECONDS = 7 * 24 * 3600
MAX_AT_ONCE = 3  # objects in view at the same moment
_MAX_STAY = 12  # seconds
_TRIES = 40  # to place one object without touching another
_AXES = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
_INDEX_BITS = 40

T = TypeVar("T")


@dataclass(frozen=True)
class WorldSettings:
    """What a world may hold. `sun=False` takes away the only visible clock: ``time`` questions get much harder."""

    min_objects: int = 2
    max_objects: int = 6
    card: bool = True
    sun: bool = True
    clutter: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.min_objects <= self.max_objects <= 12:
            raise ValueError(
                f"min_objects={self.min_objects}, max_objects={self.max_objects}: "
                "must be 1 <= min_objects <= max_objects <= 12."
            )


@dataclass(frozen=True)
class Thing:
    """One coloured shape and its only visit, `start <= t < end` (whole seconds)."""

    shape: str
    colour: str
    pattern: str
    radius: float
    start: int
    end: int
    x: float
    y: float
    direction: str | None
    distance: float  # travelled between the first and the last whole second of the visit

    @property
    def name(self) -> str:
        """Colour and shape, as questions and answers say it: "red circle"."""
        return f"{self.colour} {self.shape}"

    def position(self, time: float) -> tuple[float, float]:
        """Centre at `time` seconds; the thing rests during the last second of its visit."""
        if self.direction is None:
            return self.x, self.y
        travel = max(self.end - self.start - 1, 1)
        along = self.distance * min(max(time - self.start, 0.0), travel) / travel
        dx, dy = _AXES[self.direction]
        return self.x + dx * along, self.y + dy * along


@dataclass(frozen=True)
class Card:
    """A large card that hides the scene during `start <= t < start + 1`: one frame at 1 FPS."""

    symbol: str
    start: int
    paper: tuple[int, int, int]
    ink: tuple[int, int, int]


@dataclass(frozen=True)
class Backdrop:
    """What stands behind everything during `start <= t < end`."""

    start: int
    end: int
    texture: str
    tone: tuple[int, int, int]
    seed: int


@dataclass(frozen=True)
class World:
    """Everything that one video shows."""

    seed: int
    seconds: int
    things: tuple[Thing, ...]
    card: Card | None
    backdrops: tuple[Backdrop, ...]
    sun: bool
    clutter: bool
    begin: int = 0
    """Second of the video at which it begins: it may be the end of a longer one, of which only that is looked at."""
    pace: int = 1
    """Seconds of the video that each of its own takes: slow motion, looked at every `pace` seconds."""
    earlier: int = 0
    """Seconds of the video before it that are looked at, too: it is the latest part of a stream."""
    decoys: tuple[Card, ...] = ()
    """Cards that nobody can read: their signs are shown cut up and mixed."""

    def moment(self, second: Any) -> Any:
        """Second of the video, of a number or an array of its own seconds."""
        return self.begin + self.pace * second


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """One of `items`, uniformly."""
    return items[int(rng.random() * len(items))]


def shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    """`items` in random order (Fisher-Yates)."""
    result = list(items)
    for last in range(len(result) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        result[last], result[other] = result[other], result[last]
    return result


def whole(rng: random.Random, low: int, high: int) -> int:
    """A whole number in `low..high`, both ends included."""
    return low + int(rng.random() * (high - low + 1))


def between(rng: random.Random, low: float, high: float) -> float:
    """A random number from `low` to `high`, the same on every Python for the same state of `rng`."""
    return low + (high - low) * rng.random()


def video_seed(split: str, index: int, seed: int = 0) -> int:
    """The integer that decides video `index` of `split`: distinct for distinct arguments, modulo 3 it is the split."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: must be one of {', '.join(SPLITS)}.")
    if not 0 <= index < 1 << _INDEX_BITS or seed < 0:
        raise ValueError(f"index={index}, seed={seed}: must be 0 <= index < 2**{_INDEX_BITS} and seed >= 0.")
    return ((seed << _INDEX_BITS) + index) * len(SPLITS) + SPLITS.index(split)


def split_of(seed: int) -> str:
    """The split that a number made by `video_seed` belongs to."""
    return SPLITS[seed % len(SPLITS)]


def quarter_of(start: int, seconds: int) -> int:
    """Quarter (0..3) of a video of `seconds` in which the middle of second `start` lies."""
    return min(int(4 * (start + 0.5) / seconds), 3)


def build_world(seed: int, seconds: int, settings: WorldSettings | None = None) -> World:
    """The world that `seed` decides, `seconds` long (1 second to a week)."""
    if not 1 <= seconds <= MAX_SECONDS:
        raise ValueError(f"seconds={seconds}: a rendered video lasts 1 to {MAX_SECONDS} seconds.")
    settings = settings or WorldSettings()
    rng = random.Random(seed)
    card = _card(rng, seconds) if settings.card and seconds >= 4 else None
    most = max(min(settings.max_objects, 2 + seconds // 4), settings.min_objects)
    things: list[Thing] = []
    for colour, shape in _looks(rng, whole(rng, settings.min_objects, most)):
        thing = _place(rng, colour, shape, seconds, card, things)
        if thing is not None:
            things.append(thing)
    return World(
        seed=seed,
        seconds=seconds,
        things=tuple(things),
        card=card,
        backdrops=tuple(_backdrops(rng, seconds)),
        sun=settings.sun,
        clutter=settings.clutter,
    )


def with_decoys(world: World, most: int) -> World:
    """The world with up to `most` decoys, few more often than many, at seconds that show nothing else.

    Half of the worlds stay as they are, and so do those without a card.
    """
    rng = random.Random(world.seed + (1 << 94))
    if not most or world.card is None or rng.random() < 0.5:
        return world
    shown = {world.card.start}.union(*(range(thing.start, thing.end) for thing in world.things))
    free = [second for second in range(world.seconds) if second not in shown]
    count = min(round(most ** rng.random()), len(free) // 2)
    starts: set[int] = set()
    while len(starts) < count:
        starts.add(pick(rng, free))
    return replace(world, decoys=tuple(replace(_card(rng, world.seconds), start=start) for start in sorted(starts)))


def _card(rng: random.Random, seconds: int) -> Card:
    light = whole(rng, 225, 255)
    paper = pick(rng, ((light, light, light), (light, light, light - 40), (light - 40, light - 10, light)))
    ink = pick(rng, ((10, 10, 10), (120, 0, 0), (0, 0, 110), (0, 70, 0)))
    return Card(symbol=pick(rng, CARD_SYMBOLS), start=whole(rng, 0, seconds - 1), paper=paper, ink=ink)


def _looks(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """`count` different (colour, shape) pairs; two to four of them share a colour or a shape, to be counted."""
    colours, shapes = shuffled(rng, list(COLOURS)), shuffled(rng, SHAPES)
    alike = min(whole(rng, 2, 4), count)
    if rng.random() < 0.5:
        looks = [(colours[0], shape) for shape in shapes[:alike]]
    else:
        looks = [(colour, shapes[0]) for colour in colours[:alike]]
    while len(looks) < count:
        look = (pick(rng, colours), pick(rng, shapes))
        if look not in looks:
            looks.append(look)
    return shuffled(rng, looks)


def _place(
    rng: random.Random, colour: str, shape: str, seconds: int, card: Card | None, placed: list[Thing]
) -> Thing | None:
    """A visit that touches nobody's path, or None where there is no room left."""
    for _ in range(_TRIES):
        start, end = _visit(rng, seconds)
        if card is not None and (card.start == start or end - start - (start <= card.start < end) < min(2, seconds)):
            continue  # the card must hide neither the arrival nor all but one frame
        if sum(other.start < end and start < other.end for other in placed) >= MAX_AT_ONCE:
            continue
        thing = _route(rng, colour, shape, start, end)
        if all(_clear(thing, other) for other in placed):
            return thing
    return None


def _visit(rng: random.Random, seconds: int) -> tuple[int, int]:
    """Start and end in whole seconds; the start is equally likely in every quarter."""
    if seconds < 4:
        start = whole(rng, 0, max(seconds - 2, 0))
    else:
        quarter = whole(rng, 0, 3)
        start = pick(rng, [s for s in _quarter_range(quarter, seconds) if quarter_of(s, seconds) == quarter])
        start = min(start, seconds - 2)
    shortest, longest = min(4, 1 + seconds // 4), min(_MAX_STAY, seconds // 2)
    stay = max(whole(rng, shortest, max(shortest, longest)), 2)
    return start, min(start + stay, seconds)


def _quarter_range(quarter: int, seconds: int) -> range:
    return range(max(quarter * seconds // 4 - 1, 0), min((quarter + 1) * seconds // 4 + 2, seconds))


def _route(rng: random.Random, colour: str, shape: str, start: int, end: int) -> Thing:
    radius = between(rng, 0.105, 0.145)
    moves = end - start >= 2 and rng.random() < 0.75
    direction = pick(rng, DIRECTIONS) if moves else None
    distance = between(rng, 0.28, 0.5) if moves else 0.0
    dx, dy = _AXES[direction] if direction else (0.0, 0.0)
    edge = radius + 0.01
    x = between(rng, edge + max(-dx, 0.0) * distance, 1 - edge - max(dx, 0.0) * distance)
    y = between(rng, SKY + edge + max(-dy, 0.0) * distance, 1 - edge - max(dy, 0.0) * distance)
    return Thing(colour=colour, shape=shape, pattern=pick(rng, PATTERNS), radius=radius, start=start, end=end,
                 x=x, y=y, direction=direction, distance=distance)  # fmt: skip


def _clear(one: Thing, two: Thing) -> bool:
    """Whether two things never touch. Both move in straight lines with at most one stop each, so pieces between the
    moments where a velocity changes are linear and the closest point of each piece is known in closed form."""
    begin, finish = max(one.start, two.start), min(one.end, two.end)
    if begin >= finish:
        return True
    gap = one.radius + two.radius + 0.02
    stops = sorted({begin, finish, *(t for t in (one.end - 1, two.end - 1) if begin < t < finish)})
    for left, right in pairwise(stops):
        ax, ay = _apart(one, two, left)
        bx, by = _apart(one, two, right)
        vx, vy = bx - ax, by - ay
        speed = vx * vx + vy * vy
        nearest = min(max(-(ax * vx + ay * vy) / speed, 0.0), 1.0) if speed > 0 else 0.0
        if math.hypot(ax + nearest * vx, ay + nearest * vy) < gap:
            return False
    return True


def _apart(one: Thing, two: Thing, time: float) -> tuple[float, float]:
    (x1, y1), (x2, y2) = one.position(time), two.position(time)
    return x1 - x2, y1 - y2


def _backdrops(rng: random.Random, seconds: int) -> list[Backdrop]:
    backdrops: list[Backdrop] = []
    start = 0
    while start < seconds:
        end = min(start + whole(rng, 6, 40), seconds)
        grey = whole(rng, 34, 96)
        tone = tuple(max(grey + whole(rng, -14, 14), 0) for _ in range(3))
        backdrops.append(Backdrop(start, end, pick(rng, TEXTURES), tone, whole(rng, 0, 2**31 - 1)))  # type: ignore[arg-type]
        start = end
    return backdrops
