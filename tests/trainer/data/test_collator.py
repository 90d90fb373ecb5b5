"""Batches: what the model gets, what becomes of broken samples, and that worker processes make the same."""

import json
import multiprocessing
import warnings

import datasets
import pytest
import torch
from torch.utils.data import DataLoader

from video_ma2mba.trainer.data import BrokenSamples, TooManyBrokenError, VideoChatCollator, load_training_data
from video_ma2mba.trainer.data import collator as collator_file
from video_ma2mba.trainer.data.broken_samples import KINDS
from video_ma2mba.trainer.data.canonical import drop_empty
from video_ma2mba.trainer.data.collator import SequenceShare
from video_ma2mba.trainer.data.packing import PACK

pytestmark = pytest.mark.filterwarnings("ignore:sample .* is (left out|damaged)")


@pytest.fixture
def rows(video_folder, write_jsonl) -> datasets.Dataset:
    """Good and broken rows in turn: 0 video, 1 cut, 2 image, 3 missing, 4 text, 5 nonsense, 6 long video."""
    asked = {"question": "What is there to be seen?", "answer": "Something."}
    table = [
        {"id": "video", "video": "a.mp4", **asked},
        {"id": "cut", "video": "cut.mp4", **asked},
        {"id": "image", "image": "dot.png", **asked},
        {"id": "missing", "video": "no.mp4", **asked},
        {"id": "text", **asked},
        {"id": "nonsense", "question": "?"},
        {"id": "long", "video": "long.mp4", **asked},
    ]
    return load_training_data(write_jsonl(table), base_dir=video_folder)


def pick(rows, *names):
    return [row for row in rows if row["id"] in names]


def lenient(tmp_path) -> BrokenSamples:
    return BrokenSamples(tmp_path / "runs" / "broken.jsonl", limit_share=1.0)


def test_a_batch_of_all_kinds_is_its_samples_padded_on_the_right(processor, rows, tmp_path):
    collator = VideoChatCollator(processor, report=lenient(tmp_path), pad_to_multiple_of=16)
    good = pick(rows, "video", "image", "text")
    batch = collator(good)
    alone = [VideoChatCollator(processor)([row]) for row in good]
    assert list(batch) == ["input_ids", "attention_mask", "labels", "pixel_values_videos", "num_frames"]
    assert batch["input_ids"].shape[1] % 16 == 0
    for number, single in enumerate(alone):
        length = single["input_ids"].shape[1]
        assert batch["attention_mask"][number].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
        for name, filler in (("input_ids", processor.tokenizer.pad_token_id), ("labels", -100)):
            assert torch.equal(batch[name][number, :length], single[name][0])
            assert (batch[name][number, length:] == filler).all()
    assert batch["num_frames"].tolist() == [6, 1]
    assert batch["pixel_values_videos"].dtype == torch.uint8
    assert torch.equal(batch["pixel_values_videos"], torch.cat([b["pixel_values_videos"] for b in alone[:2]]))
    assert "pixel_values_videos" not in alone[2]


@pytest.mark.parametrize("names", [("long",), ("video", "text", "long"), ("image", "long", "video")])
@pytest.mark.parametrize("ranks", [2, 3])
def test_each_of_several_processes_decodes_its_own_frames_only(processor, rows, names, ranks, monkeypatch):
    """Of samples alone, in batches and packed: what it gets is what one process gets of these frames."""
    asked = []
    read = collator_file.read_own
    monkeypatch.setattr(
        collator_file,
        "read_own",
        lambda sample, own, size: asked.append(sum(map(len, own))) or read(sample, own, size),
    )
    chosen = pick(rows, *names)
    for drawn in (chosen, [{PACK: chosen}]):
        whole = VideoChatCollator(processor)(drawn)
        total = int(whole["num_frames"].sum())
        decoded = []
        for rank in range(ranks):
            asked.clear()
            collator = VideoChatCollator(processor)
            collator.share = SequenceShare(rank, ranks, segment_length=12)
            batch = collator(drawn)
            cut = batch["sequence_cut"]
            own = cut.frames(whole["input_ids"] == processor.video_token_id, rank, processor.tokens_per_frame)
            assert torch.equal(batch["pixel_values_videos"], whole["pixel_values_videos"][own])
            assert torch.equal(batch["num_frames"], whole["num_frames"]) and not batch["sequence_failed"]
            assert all(torch.equal(batch[name], whole[name]) for name in ("input_ids", "labels", "attention_mask"))
            decoded.append(len(own))
            assert sum(asked) == len(own) < total, "no frame of others is decoded"
        if len(whole["input_ids"]) == 1:
            assert sum(decoded) == total, "cut between frames, each is decoded once"


def test_the_model_learns_from_a_batch_what_it_learns_from_its_samples(make_model, processor, rows):
    model = make_model().train()
    collator = VideoChatCollator(processor)
    good = pick(rows, "video", "image", "text")
    batch = collator(good)
    total = model(**batch, num_items_in_batch=1).loss
    alone = sum(model(**collator([row]), num_items_in_batch=1).loss for row in good)
    torch.testing.assert_close(total, alone, rtol=1e-5, atol=1e-5)


def test_broken_samples_are_left_out_counted_and_listed_once(processor, rows, tmp_path):
    report = lenient(tmp_path)
    collator = VideoChatCollator(processor, report=report)
    with pytest.warns(UserWarning, match="'cut' is left out: .*not a video"):
        batch = collator(list(rows))
    collator(list(rows))  # the next epoch
    assert len(batch["input_ids"]) == 4
    assert report.counts == {"seen": 14, "broken": 6, "damaged": 0, "thinned": 0, "shortened": 0}
    assert len(report) == report.broken == 6
    listed = [json.loads(line) for line in report.path.read_text().splitlines()]
    assert [entry["id"] for entry in listed] == ["cut", "missing", "nonsense"]
    assert {entry["kind"] for entry in listed} == {"broken"}
    assert listed[0]["source"].endswith("cut.mp4") and "not a video" in listed[0]["error"]
    assert "no such file" in listed[1]["error"] and "no known form" in listed[2]["error"]
    again = BrokenSamples(report.path, limit_share=1.0)  # a resumed run
    VideoChatCollator(processor, report=again)(list(rows))
    assert len(report.path.read_text().splitlines()) == 3
    assert list(again.entries()) == listed


def test_what_is_left_out_of_long_samples_is_listed_too(processor, rows, tmp_path):
    report = lenient(tmp_path)
    VideoChatCollator(processor, max_frames=8, report=report)(pick(rows, "long"))
    messages = [drop_empty(m) for m in pick(rows, "video")[0]["messages"]]
    twice = {"id": "twice", "messages": messages * 2, "problem": None}
    VideoChatCollator(processor, max_length=140, report=report)([twice])
    assert [(entry["kind"], entry["id"]) for entry in report.entries()] == [("shortened", "twice")]
    assert "last 1 turns" in next(report.entries())["error"]
    assert report.counts["thinned"] == 1
    assert report.broken == 0


def test_on_broken_raise(processor, rows):
    with pytest.raises(ValueError, match="not a video"):
        VideoChatCollator(processor, on_broken="raise")(list(rows))


def test_a_batch_that_is_all_broken_is_replaced(processor, rows, tmp_path):
    broken = pick(rows, "cut", "missing", "nonsense")
    wanted = ("video", "image", "text", "long")
    alone = {name: VideoChatCollator(processor)(pick(rows, name))["input_ids"].tolist() for name in wanted}
    drawn = [VideoChatCollator(processor, report=lenient(tmp_path), replacements=rows)(broken) for _ in range(2)]
    assert drawn[0]["input_ids"].tolist() == drawn[1]["input_ids"].tolist()  # whatever the process
    assert drawn[0]["input_ids"].tolist() in alone.values()
    streaming = VideoChatCollator(processor, report=lenient(tmp_path))
    streaming(pick(rows, "image"))
    assert streaming(broken)["input_ids"].tolist() == alone["image"]


def test_where_nothing_works_the_batch_has_no_labels_and_no_effect(processor, rows, tmp_path, make_model, monkeypatch):
    broken = pick(rows, "cut", "missing")
    collator = VideoChatCollator(processor, report=lenient(tmp_path), replacements=rows.select([1, 3]))
    batch = collator(broken)
    assert (batch["labels"] == -100).all() and "pixel_values_videos" not in batch
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)  # as on a rank of a distributed run
    model = make_model().train()
    for count in (None, 0, torch.tensor(0)):
        model.zero_grad()
        loss = model(**batch, num_items_in_batch=count).loss
        loss.backward()
        assert loss.item() == 0.0
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name  # the rank takes part in the exchange of gradients
                assert not parameter.grad.any()


def test_too_many_broken_samples_end_training(processor, rows, tmp_path):
    report = BrokenSamples(tmp_path / "broken.jsonl", limit_share=0.2, after=10)
    collator = VideoChatCollator(processor, report=report)
    for _ in range(7):
        collator(pick(rows, "text"))
    collator(pick(rows, "cut"))
    collator(pick(rows, "missing"))  # 2 of 9
    with pytest.raises(TooManyBrokenError, match=r"3 of 10 samples are broken, more than 20%") as caught:
        collator(pick(rows, "missing"))
    assert "broken.jsonl" in str(caught.value) and "no such file" in str(caught.value)
    quiet = BrokenSamples(limit_share=0.2, after=10)
    collator = VideoChatCollator(processor, report=quiet)
    for _ in range(8):
        collator(pick(rows, "text"))
    for _ in range(2):
        collator(pick(rows, "cut"))  # exactly a fifth


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_make_the_same_batches_and_report_together(processor, rows, tmp_path, method):
    here = VideoChatCollator(processor, report=lenient(tmp_path / "here"))
    batches = [[0, 1], [2, 3], [4, 5], [6, 0]]
    expected = [here([rows[place] for place in batch]) for batch in batches]  # FFmpeg has run before the fork
    report = lenient(tmp_path / "there")
    loader = DataLoader(
        rows,
        batch_sampler=batches,
        collate_fn=VideoChatCollator(processor, report=report, replacements=rows),
        num_workers=2 if method == "fork" else 1,
        multiprocessing_context=method,
        timeout=500,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = list(loader)
        counts = report.counts
        if method == "fork":
            list(loader)  # the next epoch, in new processes
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert counts == here.report.counts == {**dict.fromkeys(KINDS, 0), "seen": 8, "broken": 3}
    assert sorted(entry["id"] for entry in report.entries()) == ["cut", "missing", "nonsense"]
    assert multiprocessing.active_children() == []


def test_too_many_broken_samples_in_a_worker_reach_the_main_process(processor, rows, tmp_path):
    report = BrokenSamples(tmp_path / "broken.jsonl", after=2)
    collator = VideoChatCollator(processor, report=report)
    loader = DataLoader(rows.select([1, 3, 5]), batch_size=1, collate_fn=collator, num_workers=1, timeout=500)
    with pytest.raises(TooManyBrokenError, match="2 of 2 samples are broken"):
        list(loader)


def test_streaming_rows_through_workers(processor, video_folder, write_jsonl):
    table = [{"id": str(n), "video": "b.mp4", "question": "Q", "answer": str(n)} for n in range(6)]
    files = [write_jsonl(table[:3], "1.jsonl"), write_jsonl(table[3:], "2.jsonl")]
    rows = load_training_data(files, base_dir=video_folder, streaming=True)
    loader = DataLoader(rows, batch_size=1, collate_fn=VideoChatCollator(processor), num_workers=2, timeout=500)
    answers = [processor.tokenizer.decode(batch["labels"][batch["labels"] >= 0]) for batch in loader]
    assert sorted(answers) == [f"{n}<|endoftext|>" for n in range(6)]


def test_wrong_arguments(processor):
    with pytest.raises(ValueError, match="use skip or raise"):
        VideoChatCollator(processor, on_broken="ignore")
    with pytest.raises(ValueError, match="labels='all'"):
        VideoChatCollator(processor, labels="all")
    with pytest.raises(ValueError, match="limit_share"):
        BrokenSamples(limit_share=2.0)
