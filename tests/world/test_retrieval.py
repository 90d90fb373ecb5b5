"""Texts and clips of the rendered world: what captions say, and a training of two steps."""

import csv

import torch
from transformers import AutoModel

from video_ma2mba.world.retrieval import RetrievalTraining, WorldPairs, caption_of, train


def test_captions_say_what_comes_in_its_order():
    pairs = WorldPairs("test", 50)
    said = []
    for index in range(50):
        world = pairs.world(index)
        parts = caption_of(world).split(", then ")
        assert len(parts) == 3
        starts = []
        for part in parts:
            _, colour, shape, does, *way = part.split()
            (thing,) = [t for t in world.things if (t.colour, t.shape) == (colour, shape)]
            assert (does, way) == (("rests", []) if thing.direction is None else ("moves", [thing.direction]))
            starts.append(thing.start)
        assert starts == sorted(starts)
        said.append(caption_of(world))
    assert len(set(said)) == 50
    assert not set(said) & {caption_of(WorldPairs("train", 200).world(index)) for index in range(200)}
    one, two = pairs[0], WorldPairs("test", 1)[0]
    assert torch.equal(one["pixel_values"], two["pixel_values"]) and torch.equal(one["keys"], two["keys"])
    assert one["pixel_values"].shape == (8, 3, 64, 64) and one["pixel_values"].dtype == torch.uint8


def test_a_training_writes_curve_recall_and_a_model(tmp_path):
    settings = dict(size="tiny", max_steps=2, batch=4, clips=16, test_clips=6, eval_steps=1, depth=3, workers=0)
    found = train(RetrievalTraining(out=str(tmp_path / "one"), mask_ratio=0.5, **settings))
    assert set(found) == {f"{way}_{name}" for way in ("t2v", "v2t") for name in ("r1", "r5", "r10", "median_rank")}
    with (tmp_path / "one" / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["vtc_loss"]] == ["1", "2"]
    assert all(0 <= float(row["eval_t2v_r1"]) <= 1 for row in rows if row["eval_t2v_r1"])
    with (tmp_path / "one" / "recall.csv").open() as file:
        assert [row["way"] for row in csv.DictReader(file)] == ["dual encoder", "best 3 re-ranked"]
    model = AutoModel.from_pretrained(tmp_path / "one" / "model")
    assert model.config.vision_config.time_step_range == [0.001, 0.1]
    train(RetrievalTraining(out=str(tmp_path / "two"), start=str(tmp_path / "one" / "model"), **settings))
