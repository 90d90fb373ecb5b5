"""The small classifier: its labels are what its frames show, and a run leaves a folder that classifies."""

import csv
import dataclasses
import json
import random
import re
from functools import partial

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForVideoClassification
from typer.testing import CliRunner

from video_ma2mba.cli.main import app
from video_ma2mba.loading import BUNDLED_CLASSIFIER, load_classifier
from video_ma2mba.world.classifier import (
    LABELS,
    MOTIONS,
    ClassifierTraining,
    KeptClips,
    MovingThings,
    accuracy_per_kind,
    mirrored,
    moving_world,
    patch_labels,
    train,
    world_labels,
)
from video_ma2mba.world.render import WorldRenderer
from video_ma2mba.world.video_files import write_world
from video_ma2mba.world.world import COLOURS, SHAPES


def centre(frame: torch.Tensor, colour: str) -> np.ndarray | None:
    """Mean place (x, y) of the pixels (3, h, w) of about this colour; None for less than a dozen."""
    pixels = frame.permute(1, 2, 0).numpy().astype(float)
    y, x = np.nonzero(np.abs(pixels - np.array(COLOURS[colour])).max(-1) < 45)
    return np.array([x.mean(), y.mean()]) if len(x) >= 12 else None


def test_labels_are_what_the_frames_show():
    data, checked = MovingThings("test", 200), 0
    for index in range(200):
        world, item = moving_world("test", index), data[index]
        clip, labels = item["pixel_values"], item["labels"]
        assert clip.shape == (8, 3, 64, 64) and clip.dtype == torch.uint8
        names = [name for each in LABELS.values() for name in each]
        said = [name for name, value in zip(names, labels, strict=True) if value]
        assert len(said) == 3
        moving = next(thing for thing in world.things if thing.direction)
        looks = {thing.colour for thing in world.things if thing.pattern == "solid"}
        if len(looks) < 2:
            continue  # they are told apart by colour below
        resting = next(thing for thing in world.things if not thing.direction)
        places = [centre(frame, moving.colour) for frame in clip]
        seen = [place for place in places if place is not None]
        others = [number for number, frame in enumerate(clip) if centre(frame, resting.colour) is not None]
        stays = [thing.end - thing.start for thing in (moving, resting)]
        if [len(seen), len(others)] != stays:
            continue  # a backdrop of the same colour
        way = seen[-1] - seen[0]
        axis = int(np.abs(way).argmax())
        assert said[0] == f"moves {(('left', 'right'), ('up', 'down'))[axis][int(way[axis] > 0)]}"
        first = next(number for number, place in enumerate(places) if place is not None) < others[0]
        assert said[1] == ("what moves comes first" if first else "what rests comes first")
        assert said[2] == f"a {moving.shape} moves"
        checked += 1
    assert checked >= 8


def test_patches_are_named_by_what_lies_in_their_middle():
    seen = 0
    for index in range(20):
        world = moving_world("test", index)
        moments = [second + 0.5 for second in range(8)]
        labels = patch_labels(world, moments, 8).reshape(8, 8, 8, 2)
        for moment, (shapes, motions) in zip(moments, labels.transpose(0, 3, 1, 2), strict=True):
            assert ((shapes == 0) == (motions == 0)).all() and ((shapes < 0) == (motions < 0)).all()
            there = [thing for thing in world.things if thing.start <= moment < thing.end]
            assert set(motions[motions > 0]) == {MOTIONS.index(thing.direction or "rests") for thing in there}
            for thing in there:
                x, y = (int(8 * place) for place in thing.position(moment))
                assert shapes[y, x] == SHAPES.index(thing.shape) + 1
                assert motions[y, x] == MOTIONS.index(thing.direction or "rests")
                seen += 1
    assert seen > 60


def test_training_clips_differ_and_splits_do_not_meet():
    seeds = [{moving_world(split, index).seed for index in range(30)} for split in ("train", "test")]
    assert len(seeds[0] & seeds[1]) == 0 and len(seeds[0]) == len(seeds[1]) == 30
    first, again = MovingThings("train", 4)[2], MovingThings("train", 4)[2]
    assert torch.equal(first["pixel_values"], again["pixel_values"])


def test_a_mirror_changes_left_and_right_of_frames_patches_and_labels():
    data, turned = MovingThings("test", 30), 0
    for index in range(30):
        item = data[index]
        seen = mirrored(item)
        assert torch.equal(seen["pixel_values"].flip(-1), item["pixel_values"])
        swap = [1, 0, 2, 3, *range(4, 14)]
        assert torch.equal(seen["labels"], item["labels"][swap])
        names = torch.tensor([0, 1, 3, 2, 4, 5])  # of MOTIONS
        before, after = (each["patches"].unflatten(1, (8, 8)) for each in (item, seen))
        assert torch.equal(after[..., 0].flip(-1), before[..., 0])
        known = before[..., 1] >= 0
        assert torch.equal(after[..., 1].flip(2)[known], names[before[..., 1][known]])
        assert torch.equal(after[..., 1].flip(2) < 0, ~known)
        turned += int(item["labels"][:2].sum())
    assert 5 < turned < 25


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_look_the_same_in_a_mirror(shape):
    world = next(world for world in map(partial(moving_world, "test"), range(200)) if world.things[0].shape == shape)
    thing = dataclasses.replace(world.things[0], pattern="solid", x=0.5, y=0.5, direction=None, radius=0.25)
    world = dataclasses.replace(world, things=(thing,), clutter=False, sun=False)
    frame = WorldRenderer(world, 64).frames([thing.start])[0].astype(int)
    there = np.abs(frame - np.array(COLOURS[thing.colour])).max(-1) < 100
    assert 100 < there.sum() < 1100 and (there != there[:, ::-1]).mean() < 0.02


def test_clips_are_drawn_once_and_then_read_from_the_file(tmp_path, monkeypatch):
    fresh = MovingThings("train", 3)
    kept, again = (KeptClips(MovingThings("train", 3), tmp_path / "clips") for _ in range(2))
    random.seed(0)
    drawn = [kept[2] for _ in range(8)]
    monkeypatch.setattr(MovingThings, "__getitem__", lambda *_: pytest.fail("drawn again"))
    drawn += [again[2] for _ in range(8)]  # another worker
    monkeypatch.undo()
    both = [fresh[2], mirrored(fresh[2])]
    found = [[all(torch.equal(item[name], one[name]) for name in one) for one in both] for item in drawn]
    assert [sum(column) for column in zip(*found, strict=True)] == [9, 7]
    assert len(kept) == 3


def test_accuracy_is_counted_within_each_kind():
    labels = np.zeros((4, 14))
    labels[:, 1] = labels[:, 5] = labels[:, 9] = 1
    scores = labels.copy()
    scores[0, 0] = 2  # another direction
    scores[:2, 4] = 3  # the other order
    assert accuracy_per_kind(scores, labels) == {"direction": 0.75, "order": 0.5, "shape": 1.0}


def test_a_run_leaves_a_classifier_with_its_card(tmp_path):
    with pytest.raises(ValueError, match="length of training"):
        ClassifierTraining(out=str(tmp_path))
    found = train(
        ClassifierTraining(
            out=str(tmp_path), size="tiny", max_steps=2, batch=2, test_videos=4, workers=0, videos=8, warmup_steps=1
        )
    )
    assert not (tmp_path / "clips").exists()
    with (tmp_path / "accuracy.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["kind"]: float(row["accuracy"]) for row in rows} == {k: round(v, 4) for k, v in found.items()}
    assert [float(row["chance"]) for row in rows] == [0.25, 0.5, 0.125]
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.pipeline_tag == "video-classification"
    assert "--size tiny --max_steps 2 --batch 2 --warmup_steps 1 --videos 8 --test_videos 4" in card.text
    assert "| direction |" in card.text and "14: moves left" in card.text
    classify = load_classifier(str(tmp_path / "model"), device="cpu")
    again = train(
        ClassifierTraining(
            out=str(tmp_path / "again"),
            start_from=str(tmp_path / "model"),
            max_steps=1,
            batch=2,
            test_videos=4,
            workers=0,
            videos=8,
            learning_rate=0.0,
        )
    )
    assert again == found  # nothing was learnt since
    named = classify("examples/videos/000000.mp4", top=14)
    assert {entry["label"] for entry in named} == {name for each in LABELS.values() for name in each}
    assert all(0 < entry["score"] < 1 for entry in named)


@pytest.mark.bundled
def test_the_bundled_classifier_says_of_unseen_videos_what_its_card_says(tmp_path):
    assert sum(file.stat().st_size for file in BUNDLED_CLASSIFIER.iterdir()) < 4e6
    model = AutoModelForVideoClassification.from_pretrained(BUNDLED_CLASSIFIER, dtype=torch.float32).eval()
    items = [MovingThings("test", 24)[index] for index in range(24)]
    with torch.inference_mode():
        scores = model(torch.stack([item["pixel_values"] for item in items])).logits.numpy()
    found = accuracy_per_kind(scores, np.stack([item["labels"] for item in items]))
    card = (BUNDLED_CLASSIFIER / "README.md").read_text(encoding="utf-8")
    for kind, share in found.items():
        said = float(re.search(rf"\| {kind} \| ([\d.]+)% \|", card)[1]) / 100
        assert share >= said - 0.15 and said >= 0.7
    videos = [str(tmp_path / f"{index}.mp4") for index in range(3)]
    for index, video in enumerate(videos):
        write_world(video, moving_world("test", index), fps=10)
    result = CliRunner().invoke(app, ["classify", *videos, "--top", "3", "--json"])
    assert result.exit_code == 0, result.output
    assert "of other videos it knows nothing" in result.stderr
    for index, line in enumerate(result.stdout.splitlines()):
        said = {entry["label"] for entry in json.loads(line)["classes"]}
        right = world_labels(moving_world("test", index))
        assert {LABELS[kind][right[kind]] for kind in ("direction", "order")} <= said
