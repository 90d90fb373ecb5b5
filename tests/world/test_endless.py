"""The endless world: what a stretch of it shows is what its frames show."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from video_ma2mba.world.endless import ENDLESS_KINDS, SCENE_SECONDS, EndlessWorld
from video_ma2mba.world.render import WorldRenderer
from video_ma2mba.world.world import COLOURS


@given(st.integers(0, 100_000), st.integers(1, 2 * SCENE_SECONDS))
def test_a_stretch_holds_what_its_scenes_show(start, length):
    world = EndlessWorld(3)
    stretch = world.between(start, start + length)
    names = [thing.name for thing in stretch.things]
    assert len(set(names)) == len(names) <= 6 and stretch.seconds == length
    for second in range(start, start + length):
        scene, own = world.scene(second // SCENE_SECONDS), second % SCENE_SECONDS
        card = scene.card is not None and scene.card.start == own
        assert (stretch.card is not None and stretch.card.start == second - start) == card
        seen = {thing.name for thing in scene.things if thing.start <= own < thing.end}
        told = {thing.name for thing in stretch.things if thing.start <= second - start < thing.end}
        assert told == seen if not card else told <= seen
    questions = world.ask(start, start + length, 6)
    assert {question.kind for question in questions} <= set(ENDLESS_KINDS)


def test_frames_are_those_of_the_scenes():
    world = EndlessWorld()
    frames = np.concatenate(list(world.chunks(80)))
    assert frames.shape == (80, 64, 64, 3)
    assert (frames[32:64] == WorldRenderer(world.scene(1)).frames(range(32))).all()
    thing = next(t for n in range(2) for t in world.scene(n).things)
    near = np.abs(frames[thing.start].astype(int) - np.array(COLOURS[thing.colour])).sum(axis=2) < 60
    assert near.any(), "a thing of the first scene is seen in its colour"


def test_seeds_and_bad_stretches():
    assert EndlessWorld(1).scene(9) == EndlessWorld(1).scene(9) != EndlessWorld(2).scene(9)
    for start, end in ((5, 5), (-1, 4), (0, 2 * SCENE_SECONDS + 1)):
        with pytest.raises(ValueError, match="a stretch has 1 to 64 s"):
            EndlessWorld().between(start, end)
