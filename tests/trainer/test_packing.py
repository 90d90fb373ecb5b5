"""Packed training: whole samples in rows of a length, and what is learnt from them is what each alone would teach."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tensor_chats import CELLS, collate, losses, make_trainer, tiny_model, tiny_processor
from tensor_chats import settings as training_settings
from torch.utils.data import DataLoader

from video_ma2mba.trainer.data import BrokenSamples, VideoChatCollator, load_training_data
from video_ma2mba.trainer.data.packing import PACK, PackedRows, PackedStream, pack_places
from video_ma2mba.trainer.video_trainer import VideoMa2mbaTrainer
from video_ma2mba.world.video_files import write_video

ROOM = 160


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Texts, questions about videos, and one about two videos."""
    folder = tmp_path_factory.mktemp("films")
    draw = np.random.default_rng(0)
    for name, frames in (("a", 5), ("b", 2), ("c", 9)):
        write_video(folder / f"{name}.mp4", [draw.integers(0, 255, (frames, 16, 16, 3), np.uint8)])
    asked = {"question": "What is there?", "answer": "Nothing."}
    table = [{"id": f"{name}", "video": str(folder / f"{name}.mp4"), **asked} for name in "abc"]
    table += [{"id": "text", "question": "Who?", "answer": "You, and nobody else."}]
    both = "<video> and <video>: which is longer?"
    said = [{"role": "user", "content": both}, {"role": "assistant", "content": "The first"}]
    chats = [{"id": "both", "messages": said, "videos": [str(folder / f"{name}.mp4") for name in "ab"]}]
    texts = [{"text": "a document " * n} for n in (1, 3, 4, 7)]
    return Dataset.from_list(
        [row for part in (table, chats, texts) for row in load_training_data(Dataset.from_list(part))]
    )


def lengths_of(rows: Dataset) -> list[int]:
    collator = VideoChatCollator(tiny_processor())
    return [collator([row])["input_ids"].shape[1] for row in rows]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 120), max_size=60), st.integers(1, 100))
def test_every_sample_has_a_place_and_packs_are_full(lengths: list[int], room: int):
    packs = pack_places(lengths, room)
    assert sorted(place for pack in packs for place in pack) == list(range(len(lengths)))
    sums = [sum(lengths[place] for place in pack) for pack in packs]
    assert all(total <= room or len(pack) == 1 for total, pack in zip(sums, packs, strict=True))
    fitting = sorted(total for total in sums if total <= room)
    assert all(one + other > room for one, other in pairwise(fitting)), "two would fit in one"


@pytest.mark.parametrize("cells", [None, CELLS], ids=["plain", "multi-axis checkpointing"])
def test_packed_is_separate(rows: Dataset, cells: dict | None):
    """Loss and gradients in fp64, whatever is beside a sample."""
    model = tiny_model().double()
    model.resize_token_embeddings(272)
    model.train()
    if cells:
        model.gradient_checkpointing_enable(cells)
    collator = VideoChatCollator(tiny_processor(), max_length=ROOM)
    packed = collator([PackedRows(rows, lengths_of(rows), ROOM)[n] for n in range(2)])
    assert packed["input_ids"].shape[1] <= ROOM and int(packed["seq_idx"].max()) > 0

    def learn(batches: list[dict[str, torch.Tensor]]) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss = sum(model(**batch, num_items_in_batch=100).loss for batch in batches)
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    packs = PackedRows(rows, lengths_of(rows), ROOM)
    places = [place for n in range(2) for place in packs.packs[n]]
    assert len(places) > 3
    loss, gradients = learn([packed])
    alone, expected = learn([collator([rows[place]]) for place in places])
    assert loss == pytest.approx(alone, rel=1e-12)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12, msg=name)


def test_a_pack_is_its_samples(rows: Dataset):
    """Frames, labels and numbers; what turns out too long together becomes two rows, broken ones are left out."""
    report = BrokenSamples(limit_share=1.0)
    collator = VideoChatCollator(tiny_processor(), max_length=ROOM, report=report, replacements=rows)
    missing = {"question": "Q?", "answer": "A", "video": "missing.mp4"}
    some = [rows[0], missing, rows[5], rows[1]]
    with pytest.warns(UserWarning, match="left out"):
        batch = collator([{PACK: some}])
    single = [VideoChatCollator(tiny_processor())([row]) for row in (rows[0], rows[5], rows[1])]
    assert torch.equal(batch["input_ids"][0], torch.cat([one["input_ids"][0] for one in single]))
    sizes = [one["input_ids"].shape[1] for one in single]
    assert batch["seq_idx"][0].bincount().tolist() == sizes
    assert batch["num_frames"].tolist() == [5, 2] and report.broken == 1
    starts = [0, sizes[0], sizes[0] + sizes[1]]
    labels = torch.cat([one["labels"][0] for one in single])
    labels[starts] = -100
    assert torch.equal(batch["labels"][0], labels)
    tight = VideoChatCollator(tiny_processor(), max_length=max(sizes) + 1)([{PACK: [rows[0], rows[5], rows[1]]}])
    assert len(tight["input_ids"]) > 1 and tight["input_ids"].shape[1] <= max(sizes) + 1
    assert tight["attention_mask"].sum() == sum(sizes)
    replaced = collator([{PACK: [missing]}])
    assert (replaced["labels"] != -100).any() and "seq_idx" not in replaced


def trainer_of(out: Path, rows: Dataset | IterableDataset, **options: object) -> VideoMa2mbaTrainer:
    model = tiny_model()
    model.resize_token_embeddings(272)
    options = {"packing": True, "max_length": ROOM, "max_steps": 2, "warmup_steps": 0, **options}
    return VideoMa2mbaTrainer(
        model, training_settings(out, **options), train_dataset=rows, processing_class=tiny_processor()
    )


@pytest.mark.parametrize("streams", [False, True], ids=["in files", "streaming"])
def test_training_packs(tmp_path: Path, rows: Dataset, streams: bool):
    given = rows.to_iterable_dataset(num_shards=2) if streams else rows
    trainer = trainer_of(tmp_path, given, train_sampling_strategy="group_by_length")  # as recipes have it
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["seq_idx"].max() > 0 and batch["input_ids"].shape[1] <= ROOM
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert trainer.args.packing and trainer.evaluate(rows.select(range(2)))["eval_loss"] > 0


def test_streams_of_any_size_are_packed_as_they_come(rows: Dataset):
    """Nothing is read ahead beyond some hundred rows, and workers share the stream."""
    drawn = []

    def endless():
        while True:
            drawn.append(0)
            yield {"text": "word " * (len(drawn) % 7)}

    stream = PackedStream(endless(), lambda row: len(row["text"]) + 1, ROOM)
    packs = [pack for pack, _ in zip(stream, range(100), strict=False)]
    assert len(drawn) < 5000 and all(sum(len(row["text"]) + 1 for row in pack[PACK]) <= ROOM for pack in packs)
    shards = PackedStream(rows.to_iterable_dataset(num_shards=2), lambda row: 1, 2)
    found = DataLoader(shards, batch_size=None, num_workers=2, collate_fn=lambda pack: [r["id"] for r in pack[PACK]])
    assert sorted(name for pack in found for name in pack) == sorted(row["id"] for row in rows)


@pytest.mark.parametrize("streams", [False, True], ids=["in files", "streaming"])
def test_texts_longer_than_a_pack_are_cut_and_nothing_is_lost(tmp_path: Path, streams: bool):
    long = "Überall Wörter, 漢字 und \U0001f600 " * 40
    table = [{"text": "short"}, {"text": long}, {"text": "end " * 9}]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    data = load_training_data(tmp_path / "texts.jsonl", streaming=streams)
    trainer = trainer_of(tmp_path, data, max_steps=3, per_device_train_batch_size=1)
    packs = (
        list(trainer.train_dataset)
        if streams
        else [trainer.train_dataset[n] for n in range(len(trainer.train_dataset))]
    )
    texts = [row["messages"][0]["content"][0]["text"] for pack in packs for row in pack[PACK]]
    pieces = [text for text in texts if text not in ("short", "end " * 9)]
    assert len(pieces) > 8 and len(texts) == len(pieces) + 2
    assert sorted(pieces, key=long.index)[0] == long[: len(pieces[0])] and sum(map(len, pieces)) == len(long)
    assert all(piece in long for piece in pieces)
    shapes = [trainer.data_collator([pack])["input_ids"].shape for pack in packs]
    assert all(rows == 1 and tokens <= ROOM for rows, tokens in shapes), shapes
    assert trainer.data_collator.report.broken == 0


def test_windows_train_as_one(tmp_path: Path):
    """carry_state: with the state's gradient the losses are those of whole samples; without it the first still is."""
    runs = {}
    for name, options in {"whole": {}, "through": {"carry_window": 5}, "cut": {"carry_window": 5}}.items():
        carried = {"carry_state": name, **options} if options else {}
        trainer = make_trainer(tmp_path / name, max_steps=3, **carried)
        trainer.train()
        runs[name] = losses(trainer)
    assert runs["through"] == pytest.approx(runs["whole"], abs=2e-5)
    assert runs["cut"][0] == pytest.approx(runs["whole"][0], abs=2e-5)
    assert abs(runs["cut"][2] - runs["whole"][2]) > 1e-5
    for options, words in (
        ({"carry_state": "kept", "carry_window": 9}, "carry_state='kept' is not valid: use through or cut"),
        ({"carry_state": "cut"}, "belong together"),
        ({"carry_window": 9}, "belong together"),
    ):
        with pytest.raises(ValueError, match=words):
            training_settings(tmp_path, **options)


def test_what_makes_no_sense_is_refused(tmp_path: Path, rows: Dataset):
    for options, words in (
        ({"max_length": None}, "needs max_length"),
        ({"packing_strategy": "wrapped"}, "no video can be cut"),
        ({"eval_packing": True}, "changes nothing"),
        ({"packing": False, "padding_free": True}, "set packing=True"),
    ):
        with pytest.raises(ValueError, match=words):
            trainer_of(tmp_path, rows, **options)
    with pytest.raises(ValueError, match="leave data_collator out"):
        VideoMa2mbaTrainer(
            tiny_model(),
            training_settings(tmp_path, packing=True, max_length=9),
            train_dataset=rows,
            data_collator=collate,
            processing_class=tiny_processor(),
        )
