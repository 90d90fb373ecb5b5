"""The data set in memory, for PyTorch and for `datasets`."""

import numpy as np
import pytest
from torch.utils.data import DataLoader

from video_ma2mba.world import WorldDataset, parse_frames
from video_ma2mba.world.endless import ENDLESS_KINDS
from video_ma2mba.world.hf_datasets import load_world
from video_ma2mba.world.world import COLOURS


def test_samples():
    data = WorldDataset("train", 5, frames=(8, 20), questions=4, kinds=["colour", "count"], seed=2)
    assert len(data) == 5
    for index, sample in enumerate(data):
        assert sample.frames.shape == (data.length(index), 64, 64, 3)
        assert sample.frames.dtype == np.uint8
        assert 1 <= len(sample.questions) <= 4
        assert {q.kind for q in sample.questions} <= {"colour", "count"}
        again = data[index]
        assert np.array_equal(sample.frames, again.frames)
        assert sample.questions == again.questions
    with pytest.raises(IndexError):
        data[5]


def test_lengths_fill_the_range_evenly():
    data = WorldDataset(size=3000, frames=(8, 15))
    counts = np.bincount([data.length(index) for index in range(3000)])
    assert counts[:8].sum() == 0
    assert counts[8:].min() > 0.75 * counts[8:].max()


def test_videos_differ_between_splits_seeds_and_indices():
    frames = [
        WorldDataset(split, 2, frames=(8, 8), seed=seed)[index].frames.tobytes()
        for split in ("train", "validation", "test")
        for seed in (0, 1)
        for index in (0, 1)
    ]
    assert len(set(frames)) == len(frames)


def test_resolution_and_frame_rate():
    sample = WorldDataset(frames=(12, 12), resolution=96, fps=2.0).sample(1)
    assert sample.frames.shape == (12, 96, 96, 3)
    assert sample.world.seconds == 6


def test_messages_hold_the_video_once():
    sample = WorldDataset(frames=(8, 8), questions=3)[0]
    messages = sample.messages("a.mp4")
    assert [message["role"] for message in messages] == ["user", "assistant"] * 3
    assert messages[0]["content"][0] == {"type": "video", "video": "a.mp4"}
    assert [part["type"] for message in messages[1:] for part in message["content"]] == ["text"] * 5
    assert messages[3]["content"][0]["text"] == sample.questions[1].answer


def test_streams_are_asked_about_their_last_minute():
    data = WorldDataset("train", 40, frames=(200, 200), questions=6, streams=0.5)
    samples = [data[index] for index in range(12)]
    streams = [sample for sample in samples if sample.world.earlier]
    assert 2 <= len(streams) <= 10 and len(data[0].frames) == 200
    for sample in streams:
        assert sample.frames.shape == (200, 64, 64, 3)
        assert (sample.world.earlier, sample.world.seconds) == (136, 64)
        assert {question.kind for question in sample.questions} <= set(ENDLESS_KINDS)
        assert (sample.timed_frames.timestamps == np.arange(200)).all() and sample.timed_frames.duration == 200
        assert len({thing.name for thing in sample.world.things}) == len(sample.world.things)
        for thing in sample.world.things:  # its colour is there when it should be, of which questions are made
            shown = np.abs(sample.frames[136 + thing.start].astype(int) - np.array(COLOURS[thing.colour])).sum(axis=2)
            card = sample.world.card
            assert (shown < 60).any() or (card is not None and card.start == thing.start)
    one, other = (WorldDataset(split, 1, frames=(40, 40), streams=1.0)[0].frames for split in ("train", "test"))
    assert not np.array_equal(one, other)
    with pytest.raises(ValueError, match="streams=0.5: must be a share from 0 to 1; with fps=1"):
        WorldDataset(streams=0.5, fps=2.0)


def test_loader_workers_draw_the_same():
    data = WorldDataset(size=4, frames=(8, 8))
    loaded = list(DataLoader(data, batch_size=None, num_workers=2))
    assert all(np.array_equal(sample.frames, data[index].frames) for index, sample in enumerate(loaded))


@pytest.mark.parametrize("streaming", [False, True])
def test_hugging_face_data_set(streaming, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    loaded = load_world("validation", 3, streaming=streaming, frames=(8, 10), questions=2)
    plain = WorldDataset("validation", 3, frames=(8, 10), questions=2)
    rows = list(loaded.with_format("numpy"))
    assert len(rows) == 3
    for row, sample in zip(rows, plain, strict=True):
        assert np.array_equal(np.asarray(row["video"]), sample.frames)
        assert row["frames"] == len(sample.frames)
    for row, sample in zip(loaded, plain, strict=True):
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * len(sample.questions)
        assert row["messages"][0]["content"][0]["type"] == "video"
        assert row["messages"][0]["content"][1]["text"] == sample.questions[0].text
        assert [q["answer"] for q in row["questions"]] == [q.answer for q in sample.questions]


@pytest.mark.parametrize(("text", "value"), [("8..64", (8, 64)), ("5", (5, 5)), ("1..1", (1, 1))])
def test_ranges(text, value):
    assert parse_frames(text) == value


@pytest.mark.parametrize("text", ["", "8-64", "64..8", "0..3", "a..b", "8.."])
def test_wrong_ranges(text):
    with pytest.raises(ValueError, match="frames"):
        parse_frames(text)
