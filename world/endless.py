"""A rendered world without an end: one short scene after the other, and questions about any stretch of it.

Each scene is a world of its own with one or two things. What it shows looks like nothing in the two scenes before it,
and only every third scene may show a card. So a stretch of up to two scenes' length holds at most six things and one
card, all different, as the videos of `build_world` do, and questions about it have one right answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np

from .questions import FORMS, KINDS, Question, ask
from .render import WorldRenderer
from .world import COLOURS, SHAPES, Thing, World, WorldSettings, build_world, video_seed

SCENE_SECONDS = 32
LONGEST_STRETCH = 2 * SCENE_SECONDS
"""Seconds of the longest stretch in which nothing comes twice."""
ENDLESS_KINDS = tuple(kind for kind in KINDS if kind != "time")  # there are no quarters of what does not end
_TRIES = 1000
_APART = 3  # scenes after which the same look may come again


class EndlessWorld:
    """The scenes that `seed` decides, of `SCENE_SECONDS` seconds each; any of them can be made without the others."""

    def __init__(self, seed: int = 0, split: str = "test"):
        self.seed, self.split = seed, split
        self.scene = lru_cache(maxsize=16)(self._scene)

    def _scene(self, number: int) -> World:
        settings = WorldSettings(min_objects=1, max_objects=2, card=number % _APART == 0)
        for attempt in range(_TRIES):
            world = build_world(video_seed(self.split, number * _TRIES + attempt, self.seed), SCENE_SECONDS, settings)
            if all(_look_class(thing) == number % _APART for thing in world.things):
                return world
        raise RuntimeError(f"scene {number}: none of {_TRIES} seeds gives the looks that are its own")

    def chunks(self, seconds: int, size: int = 64) -> Iterator[np.ndarray]:
        """Frames at 1 FPS, uint8 `(up to SCENE_SECONDS, H, W, 3)` at a time, `seconds` in all."""
        for number in range(-(-seconds // SCENE_SECONDS)):
            count = min(SCENE_SECONDS, seconds - number * SCENE_SECONDS)
            yield WorldRenderer(self.scene(number), size).frames(range(count))

    def between(self, start: int, end: int) -> World:
        """What is seen during `start <= t < end`, as one world whose time begins at `start`; `earlier` says so.

        Raises:
            ValueError: the stretch is empty, or longer than two scenes (it could show the same thing twice).
        """
        if not 0 <= start < end <= start + LONGEST_STRETCH:
            raise ValueError(f"{start} to {end} s: a stretch has 1 to {LONGEST_STRETCH} s")
        things, card = [], None
        for number in range(start // SCENE_SECONDS, -(-end // SCENE_SECONDS)):
            scene, shift = self.scene(number), number * SCENE_SECONDS - start
            for thing in scene.things:
                first, last = max(thing.start + shift, 0), min(thing.end + shift, end - start)
                hidden = scene.card is not None and range(first, last) == range(c := scene.card.start + shift, c + 1)
                if first < last and not hidden:
                    things.append(replace(thing, start=first, end=last))
            if scene.card is not None and 0 <= scene.card.start + shift < end - start:
                card = replace(scene.card, start=scene.card.start + shift)
        seed = video_seed(self.split, start, self.seed)
        about = {"begin": start, "earlier": start}
        return World(seed, end - start, tuple(things), card, backdrops=(), sun=True, clutter=True, **about)

    def ask(self, start: int, end: int, count: int, forms: tuple[str, ...] = FORMS) -> list[Question]:
        """Up to `count` different questions about a stretch, each with exactly one right answer."""
        return ask(self.between(start, end), count, ENDLESS_KINDS, forms)


def _look_class(thing: Thing) -> int:
    return (list(COLOURS).index(thing.colour) + SHAPES.index(thing.shape)) % _APART
