"""Lengths without decoding: equal to what the collator makes of intact videos."""

import pytest
from transformers.trainer_pt_utils import LengthGroupedSampler

from video_ma2mba.trainer.data import VideoChatCollator, estimated_lengths, lengths, load_training_data


@pytest.fixture
def rows(video_folder, write_jsonl):
    names = ("a.mp4", "b.mp4", "long.mp4", None, "long.mp4", "gone.mp4")
    table = [{"question": "Q" * (3 * n + 1), "answer": "A", "video": name} for n, name in enumerate(names)]
    table[4] |= {"start": 2.0, "end": 11.5}
    return load_training_data(write_jsonl(table), base_dir=video_folder)


@pytest.mark.parametrize(
    "settings",
    [{}, {"fps": 0.4}, {"num_frames": 4}, {"max_frames": 5}, {"max_length": 150}, {"labels": "captions"}],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_lengths_are_those_of_the_batches(processor, rows, settings):
    collator = VideoChatCollator(processor, on_broken="raise", **settings)
    actual = [collator([row])["input_ids"].shape[1] for row in list(rows)[:-1]]
    assert estimated_lengths(rows, processor, **settings) == [*actual, 1]


def test_durations_are_looked_up_once(processor, rows, tmp_path, monkeypatch):
    looked_up = []
    real = lengths.header_timing
    monkeypatch.setattr(lengths, "header_timing", lambda path: looked_up.append(path) or real(path))
    cache = tmp_path / "durations.jsonl"
    first = estimated_lengths(rows, processor, cache=cache)
    assert len(looked_up) == 3
    with cache.open("a") as file:
        file.write('["half a li')
    assert estimated_lengths(rows, processor, cache=cache) == first
    assert len(looked_up) == 3


def test_a_video_that_changes_is_looked_up_again(processor, tmp_path, video_folder, write_jsonl):
    path = tmp_path / "clip.mp4"
    rows = None
    for name, frames in (("a", 6), ("long", 30)):
        path.write_bytes((video_folder / f"{name}.mp4").read_bytes())
        rows = rows or load_training_data(write_jsonl([{"video": "clip.mp4", "question": "Q", "answer": "A"}]))
        (found,) = estimated_lengths(rows, processor, labels="captions", cache=tmp_path / "cache.jsonl")
        assert found == frames * 4 + len("\nA") + 1


def test_nothing_is_decoded_and_no_packet_is_read(processor, rows, monkeypatch):
    from video_ma2mba.processing import video_reader

    monkeypatch.setattr(video_reader, "decode_frames", None)
    monkeypatch.setattr(video_reader, "scan_video", None)
    assert estimated_lengths(rows, processor)[2] > 120


def test_transformers_groups_by_them(processor, rows):
    found = estimated_lengths(rows, processor)
    order = list(LengthGroupedSampler(2, lengths=found))
    assert sorted(order) == list(range(len(rows)))
    assert found[order[0]] == max(found)


def test_rows_that_stream_have_no_lengths(processor, rows):
    with pytest.raises(TypeError, match="streaming=False"):
        estimated_lengths(rows.to_iterable_dataset(), processor)
