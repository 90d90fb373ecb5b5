"""The rendered world: determinism, disjoint splits, and pictures that show what the world says."""

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from video_ma2mba.world import (
    SPLITS,
    WorldDataset,
    WorldRenderer,
    WorldSettings,
    build_world,
    render,
    split_of,
    video_seed,
)
from video_ma2mba.world.render import GLYPHS
from video_ma2mba.world.world import CARD_SYMBOLS, COLOURS, MAX_AT_ONCE, SHAPES

SECONDS = st.integers(1, 500)
SEEDS = st.integers(0, 2**60)


KNOWN_THINGS = [
    ("yellow star", 11, 15, "down"),
    ("yellow circle", 1, 5, "down"),
    ("yellow square", 14, 20, "down"),
    ("yellow cross", 3, 13, "down"),
    ("cyan heart", 5, 9, None),
]
KNOWN_CARD = ("8", 15)
KNOWN_PIXEL_SUM = 11855628


@given(seed=SEEDS, seconds=SECONDS)
@settings(max_examples=60, deadline=None)
def test_the_same_seed_gives_the_same_world_and_the_same_pictures(seed, seconds):
    world = build_world(seed, seconds)
    assert world == build_world(seed, seconds)
    some = range(0, seconds, max(seconds // 5, 1))
    assert np.array_equal(WorldRenderer(world).frames(some), WorldRenderer(world).frames(some))


def test_a_known_world_stays_what_it_was():
    """Guards the data against accidental change: published accuracies belong to exactly these videos."""
    world = build_world(video_seed("test", 5), 20)
    assert [(t.name, t.start, t.end, t.direction) for t in world.things] == KNOWN_THINGS
    assert (world.card.symbol, world.card.start) == KNOWN_CARD
    assert int(render(world).astype(np.int64).sum()) == KNOWN_PIXEL_SUM


def test_seeds_of_splits_never_meet():
    seen = {}
    for split, seed, index in itertools.product(SPLITS, range(4), [*range(300), 2**40 - 1]):
        number = video_seed(split, index, seed)
        assert number not in seen
        seen[number] = split
        assert split_of(number) == split


@pytest.mark.parametrize("arguments", [("dev", 0, 0), ("test", -1, 0), ("test", 2**40, 0), ("test", 0, -1)])
def test_wrong_seeds_are_refused(arguments):
    with pytest.raises(ValueError):
        video_seed(*arguments)


@given(seed=SEEDS, seconds=SECONDS)
@settings(max_examples=150, deadline=None)
def test_things_stay_apart_in_view_and_visible(seed, seconds):
    world = build_world(seed, seconds)
    assert world.things
    assert len({thing.name for thing in world.things}) == len(world.things)
    for thing in world.things:
        assert 0 <= thing.start < thing.end <= seconds
        for moment in np.linspace(thing.start, thing.end, 9):
            x, y = thing.position(moment)
            assert thing.radius < x < 1 - thing.radius
            assert thing.radius < y < 1 - thing.radius
        if world.card is not None:
            assert world.card.start != thing.start
            shown = [s for s in range(thing.start, thing.end) if s != world.card.start]
            assert len(shown) >= 2
        if thing.direction is not None:
            (x0, y0), (x1, y1) = thing.position(thing.start), thing.position(thing.end - 1)
            moved = {"left": x0 - x1, "right": x1 - x0, "up": y0 - y1, "down": y1 - y0}
            assert moved.pop(thing.direction) > 0.25
            assert max(moved.values()) == pytest.approx(0, abs=1e-9) or sorted(moved.values())[1] < 1e-9
    for moment in np.linspace(0, seconds, 200, endpoint=False):
        there = [thing for thing in world.things if thing.start <= moment < thing.end]
        assert len(there) <= MAX_AT_ONCE
        for one, two in itertools.combinations(there, 2):
            assert math.dist(one.position(moment), two.position(moment)) > one.radius + two.radius


@given(seed=SEEDS, seconds=SECONDS)
@settings(max_examples=60, deadline=None)
def test_backdrops_cover_the_video(seed, seconds):
    backdrops = build_world(seed, seconds).backdrops
    assert backdrops[0].start == 0
    assert backdrops[-1].end == seconds
    assert all(one.end == two.start for one, two in itertools.pairwise(backdrops))


@pytest.mark.parametrize("size", [64, 100, 336])
def test_pixels_show_each_thing_from_its_first_to_its_last_second(size):
    for index in range(6):
        world = build_world(video_seed("validation", index), 24)
        frames = render(world, size=size)
        for thing, second in itertools.product(world.things, range(24)):
            if world.card is not None and second == world.card.start:
                continue
            x, y = thing.position(second)
            radius = int(thing.radius * size) - 1
            row, column = round(y * size), round(x * size)
            box = frames[second, row - radius : row + radius, column - radius : column + radius].astype(int)
            colour = np.array(COLOURS[thing.colour])
            # the shape's own colour or its darker pattern, and nothing that a backdrop (at most 130) could be
            near = np.minimum(np.abs(box - colour).max(-1), np.abs(box - 0.8 * colour).max(-1)) < 12
            there = thing.start <= second < thing.end
            assert (near.mean() > 0.2) == there or (not there and _occupied(world, thing, second))


def _occupied(world, thing, second):
    """Whether another thing is near the place where `thing` would be."""
    here = thing.position(second)
    return any(
        other is not thing
        and other.start <= second < other.end
        and math.dist(other.position(second), here) < 2.5 * (thing.radius + other.radius)
        for other in world.things
    )


def test_every_shape_colour_and_card_looks_different():
    from dataclasses import replace

    world = next(w for w in (build_world(seed, 8) for seed in range(99)) if w.card)
    looks = set()
    for shape, colour in itertools.product(SHAPES, COLOURS):
        only = replace(world.things[0], shape=shape, colour=colour, start=0, end=8, pattern="solid")
        looks.add(render(replace(world, things=(only,), card=None))[0].tobytes())
    assert len(looks) == len(SHAPES) * len(COLOURS)
    cards = [render(replace(world, card=replace(world.card, symbol=s)))[world.card.start] for s in CARD_SYMBOLS]
    for one, two in itertools.combinations(cards, 2):
        assert (np.abs(one.astype(int) - two).max(-1) > 60).sum() > 40  # pixels that tell two cards apart
    assert set(GLYPHS) == set(CARD_SYMBOLS)
    assert all(len(rows) == 7 and all(len(row) == 5 for row in rows) for rows in GLYPHS.values())


def test_the_card_stands_for_one_second_only():
    world = next(w for w in (build_world(seed, 30) for seed in range(99)) if 2 < w.card.start < 27)
    frames = WorldRenderer(world).frames(np.arange(0, 30, 0.25))
    bright = (frames.min(-1) > 180).mean((1, 2)) > 0.15
    assert np.flatnonzero(bright).tolist() == [world.card.start * 4 + part for part in range(4)]


def test_the_sun_crosses_the_sky_once():
    frames = render(build_world(3, 40, WorldSettings(card=False)))
    top = frames[:, :5].min(-1)
    places = (top > 180).any(1) @ np.arange(64) / (top > 180).any(1).sum(1)
    assert places[0] < 5
    assert places[-1] > 58
    assert (np.diff(places) >= 0).all()
    dark = render(build_world(3, 40, WorldSettings(card=False, sun=False, clutter=False)))
    assert not np.array_equal(dark, frames)


def test_motion_is_smooth_at_higher_frame_rates():
    world = next(w for w in (build_world(seed, 12) for seed in range(99)) if w.things[0].direction)
    thing = world.things[0]
    steps = [thing.position(thing.start + part / 10) for part in range(10 * (thing.end - thing.start))]
    assert max(math.dist(one, two) for one, two in itertools.pairwise(steps)) < 0.06
    assert render(world, fps=2)[::2].tobytes() == render(world).tobytes()


def test_hours_are_walked_through_in_chunks():
    world = build_world(video_seed("test", 1), 3 * 3600)
    chunks = WorldRenderer(world).chunks(chunk=50)
    shapes = [chunk.shape for chunk in itertools.islice(chunks, 3)]
    assert shapes == [(50, 64, 64, 3)] * 3
    late = WorldRenderer(world).frames([thing.start for thing in world.things])
    assert late.shape[0] == len(world.things)


@pytest.mark.parametrize(
    "call",
    [
        lambda: build_world(0, 0),
        lambda: build_world(0, 10**9),
        lambda: WorldRenderer(build_world(0, 4), size=8),
        lambda: WorldRenderer(build_world(0, 4)).frames([4.0]),
        lambda: next(WorldRenderer(build_world(0, 4)).chunks(fps=0)),
        lambda: WorldSettings(min_objects=5, max_objects=2),
        lambda: WorldDataset(frames=(9, 8)),
        lambda: WorldDataset(size=0),
        lambda: WorldDataset(fps=0),
        lambda: WorldDataset(kinds=["colour", "smell"]),
        lambda: WorldDataset(kinds=[]),
        lambda: WorldDataset("dev"),
    ],
)
def test_nonsense_is_refused(call):
    with pytest.raises(ValueError, match=r"\w"):
        call()


def test_drawing_is_fast():
    """A floor far below what it does (about 20,000 frames a second on one core), for slow and busy machines."""
    data = WorldDataset(frames=(32, 32), questions=8)
    data[0]
    begun = time.process_time()
    for index in range(1, 31):
        data[index]
    assert 30 * 32 / (time.process_time() - begun) > 1500
