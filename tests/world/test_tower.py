"""The first stage: labels of cells agree with the world, and the tower learns from them."""

import random

import numpy as np
import pytest
import torch

from video_ma2mba.modeling_video_ma2mba.modeling_video_ma2mba import VideoMa2mbaForConditionalGeneration
from video_ma2mba.world import WorldDataset, render
from video_ma2mba.world.model import SIZES, world_config
from video_ma2mba.world.tokenizer import build_world_tokenizer
from video_ma2mba.world.tower import TowerFrames, cell_labels, take_tower_, tower_costs, train_tower
from video_ma2mba.world.world import CARD_SYMBOLS, COLOURS, SHAPES


def test_labels_name_what_is_drawn():
    data = WorldDataset("train", 40, frames=(12, 12))
    seen = 0
    for index in range(40):
        world = data.world(index)
        frames = render(world)
        for time in range(12):
            classes, places = cell_labels(world, time, 4)
            if world.card.start == time:
                assert (classes[:, 2] == CARD_SYMBOLS.index(world.card.symbol) + 1).all()
                assert (classes[:, :2] == -100).all()
                continue
            assert (classes[:, 2] == 0).all()
            assert classes[:, 3].sum() == 1
            for cell in (classes[:, 0] > 0).nonzero()[0]:
                x = (cell % 4 + 0.5 + places[cell, 0]) / 4
                y = (cell // 4 + 0.5 + places[cell, 1]) / 4
                matching = [
                    t for t in world.things
                    if t.start <= time < t.end and np.allclose(t.position(time), (x, y), atol=1e-5)
                ]  # fmt: skip
                (thing,) = matching
                assert list(COLOURS)[classes[cell, 0] - 1] == thing.colour
                assert SHAPES[classes[cell, 1] - 1] == thing.shape
                if thing.shape != "ring":  # which has a hole in the middle
                    drawn = frames[time, int(y * 64), int(x * 64)].astype(float)
                    wanted = np.array(COLOURS[thing.colour], float)
                    assert np.abs(drawn - wanted).max() < 60  # stripes and dots are darker
                seen += 1
    assert seen > 200


def test_every_thing_in_view_has_a_cell():
    data = WorldDataset("train", 40, frames=(12, 12))
    for index in range(40):
        world = data.world(index)
        for time in range(12):
            if world.card.start != time:
                classes, _ = cell_labels(world, time, 4)
                found = {(c, s) for c, s in classes[:, :2].tolist() if c > 0}
                assert len(found) == sum(thing.start <= time < thing.end for thing in world.things)


def test_batches_follow_from_their_number():
    frames = TowerFrames(16, 4, seed=0, resolution=64)
    one, two = (frames.batch(random.Random("x")) for _ in range(2))
    assert all(torch.equal(one[name].nan_to_num(), two[name].nan_to_num()) for name in one)
    assert one["pixels"].shape == (16, 3, 64, 64)
    assert one["classes"].shape == (16, 16, 4)


def test_a_tower_of_clips_gets_frames_that_follow_each_other():
    torch.manual_seed(0)
    frames = TowerFrames(16, 4, seed=0, resolution=64, clip=4).batch(random.Random("x"))
    suns = frames["classes"][..., 3].argmax(-1).view(4, 4)  # it crosses the sky from left to right
    assert (suns.diff(dim=1) >= 0).all()
    assert frames["pixels"].shape == (16, 3, 64, 64)
    model = VideoMa2mbaForConditionalGeneration(world_config(SIZES["tiny"], build_world_tokenizer(), "videomamba"))
    assert model.config.clip_frames == 4
    before = model.model.vision_tower.temporal_pos_embedding.detach().clone()
    pixels = train_tower(model, seconds=0.0, steps=3, frames_per_batch=8, workers=0, seed=0, rate=3e-3)
    assert not torch.equal(before, model.model.vision_tower.temporal_pos_embedding)
    costs = tower_costs(model, pixels, repeats=1)
    assert set(costs) == {"forward frames/s", "training frames/s"}  # bytes are of a GPU
    assert costs["forward frames/s"] > costs["training frames/s"] > 0


def test_the_tower_learns_colours(capsys):
    torch.manual_seed(0)
    model = VideoMa2mbaForConditionalGeneration(world_config(SIZES["tiny"], build_world_tokenizer()))
    before = model.model.vision_tower.state_dict()["embeddings.patch_embedding.weight"].clone()
    pixels = train_tower(model, seconds=0.0, steps=200, frames_per_batch=32, workers=0, seed=0, rate=3e-3)
    assert pixels.dtype == torch.uint8
    assert not torch.equal(before, model.model.vision_tower.embeddings.patch_embedding.weight)
    told = capsys.readouterr().out.split()
    assert float(told[told.index("colour") + 1]) > 0.4  # of eight, by a tower of one layer


def test_a_tower_is_taken_from_another_model(tmp_path):
    tokenizer = build_world_tokenizer()
    other = VideoMa2mbaForConditionalGeneration(world_config(SIZES["tiny"], tokenizer))
    other.save_pretrained(tmp_path)
    torch.manual_seed(1)
    model = VideoMa2mbaForConditionalGeneration(world_config(SIZES["tiny"], tokenizer))
    words = model.get_input_embeddings().weight.clone()
    pixels = take_tower_(model, str(tmp_path), 16, seed=0)
    assert pixels.shape == (16, 3, 64, 64) and pixels.dtype == torch.uint8
    taken, wanted = model.model.vision_tower.state_dict(), other.model.vision_tower.state_dict()
    assert all(torch.equal(taken[name], wanted[name]) for name in wanted)
    assert torch.equal(model.get_input_embeddings().weight, words), "nothing else is taken"
    model = VideoMa2mbaForConditionalGeneration(world_config(SIZES["tiny"], tokenizer, "videomamba"))
    with pytest.raises(ValueError, match="its vision tower is of another kind or size"):
        take_tower_(model, str(tmp_path), 16, seed=0)
