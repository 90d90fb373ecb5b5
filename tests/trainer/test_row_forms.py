"""Rows of every form go straight into the trainer: what is learnt is exactly the answers, or it is refused at once."""

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from PIL import Image
from tensor_chats import TensorChats, make_trainer, settings, tiny_model, tiny_processor

from video_ma2mba.trainer.data import VideoChatCollator
from video_ma2mba.trainer.video_trainer import VideoMa2mbaTrainer

PICTURE = Image.fromarray(np.full((16, 16, 3), 90, np.uint8))
END = "<|endoftext|>"


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def place(kind, **source):
    return {"type": kind, **source}


def text(words):
    return {"type": "text", "text": words}


@pytest.fixture
def processor():
    return tiny_processor()


FORMS = {
    "prompt and completion": ({"prompt": [user("Q?")], "completion": [said("A")]}, ["A" + END], 0),
    "texts": ({"prompt": "Q?", "completion": "A"}, ["A" + END], 0),
    "earlier answers belong to the prompt": (
        {"prompt": [user("Q?"), said("no"), user("R?")], "completion": [said("A"), user("S?"), said("B")]},
        ["A" + END, "B" + END],
        0,
    ),
    "prompt and completion with a picture": (
        {"prompt": [user("Q?")], "completion": [said("A")], "images": [PICTURE]},
        ["A" + END],
        1,
    ),
    "prompt of parts": (
        {"prompt": [user([place("image"), text("Q?")])], "completion": [said([text("A")])], "images": [PICTURE]},
        ["A" + END],
        1,
    ),
    "parts without a place": (
        {"messages": [user([text("Q?")]), said([text("A")])], "images": [PICTURE, PICTURE]},
        ["A" + END],
        2,
    ),
    "messages and pictures": ({"messages": [user("Q?"), said("A")], "images": [PICTURE, PICTURE]}, ["A" + END], 2),
    "messages and one picture": ({"messages": [user("Q?"), said("A")], "image": PICTURE}, ["A" + END], 1),
    "messages with marks": ({"messages": [user("<image>\nQ?"), said("A")], "images": [PICTURE]}, ["A" + END], 1),
    "pictures in messages": (
        {"messages": [user([place("image", image=PICTURE), text("Q?")]), said("A")]},
        ["A" + END],
        1,
    ),
    "no content": ({"messages": [user("Q?"), said(None), user("R?"), said("A")]}, [END, "A" + END], 0),
    "text": ({"text": "hello world"}, ["hello world" + END], 0),
    "text about a picture": ({"text": "hello", "image": PICTURE}, ["hello" + END], 1),
    "question and answer": ({"image": PICTURE, "question": "Q?", "answer": "A"}, ["A" + END], 1),
    "conversations": (
        {"image": PICTURE, "conversations": [{"from": "human", "value": "<image>Q?"}, {"from": "gpt", "value": "A"}]},
        ["A" + END],
        1,
    ),
    "marks that are words": (
        {"image": PICTURE, "question": "What does <video> mean?", "answer": "An <image> moves"},
        ["An <image> moves" + END],
        1,
    ),
    "words only": ({"messages": [user("What is <video>?"), said("<pad>, <|user|>")]}, ["<pad>, <|user|>" + END], 0),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("arrow", [False, True], ids=["in memory", "datasets"])
def test_what_is_learnt(processor, name, arrow):
    row, learnt, frames = FORMS[name]
    if arrow and name in ("pictures in messages",):
        pytest.skip("Arrow has no type for it")
    rows = list(Dataset.from_list([row])) if arrow else [row]
    batch = VideoChatCollator(processor, on_broken="raise")(rows)
    runs, run = [], []
    for token in [*batch["labels"][0].tolist(), -100]:
        if token != -100:
            run.append(token)
            if token == 0:
                runs.append(processor.decode(run))
                run = []
        assert token != -100 or not run, "an answer ends with the end of the text"
    assert runs == learnt
    assert len(batch.get("pixel_values_videos", ())) == frames
    assert (batch["input_ids"] == processor.video_token_id).sum() == frames * processor.tokens_per_frame


def test_a_prompt_keeps_its_words_when_marks_are_words(processor):
    row = FORMS["marks that are words"][0]
    (ids,) = VideoChatCollator(processor, on_broken="raise")([row])["input_ids"]
    assert "What does <video> mean?" in processor.decode(ids[ids != processor.video_token_id])


def trainer_of(out, rows, **options):
    model = tiny_model()
    model.resize_token_embeddings(272)
    return VideoMa2mbaTrainer(
        model,
        settings(out, max_steps=2, warmup_steps=0, **options),
        train_dataset=rows,
        processing_class=tiny_processor(),
    )


@pytest.mark.parametrize("name", ["prompt and completion", "messages and pictures", "text", "question and answer"])
def test_training_runs_and_learns(tmp_path, name):
    trainer = trainer_of(tmp_path, Dataset.from_list([FORMS[name][0]] * 4))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and min(losses) > 0.1 and losses[1] < losses[0]


@pytest.mark.parametrize("row", [{"sentence": "x", "label": 3}, {"input_ids": [5, 6]}, {"prompt": "Q?"}])
def test_other_forms_are_refused_before_the_first_step(tmp_path, row):
    named = next(iter(row))
    with pytest.raises(ValueError, match=f"'{named}'.* no known form.*prompts and completions.*data_collator"):
        trainer_of(tmp_path, Dataset.from_list([row] * 4))
    stream = IterableDataset.from_generator(lambda: iter([row] * 4))
    for rows in (stream, [row] * 4):  # without columns: the first row tells
        with pytest.raises(ValueError, match=f"'{named}'.* no known form"):
            trainer_of(tmp_path, rows).train()


class NoLabels(TensorChats):
    def __getitem__(self, index):
        item = super().__getitem__(index)
        return {**item, "labels": torch.full_like(item["labels"], -100)}


def test_a_run_that_learnt_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="nothing was learnt: not one of 6 batches"):
        make_trainer(tmp_path, data=NoLabels()).train()


@pytest.mark.filterwarnings("ignore:sample .* is left out")
def test_a_run_of_broken_samples_is_an_error(tmp_path):
    row = {"video": "missing.mp4", "question": "Q?", "answer": "A"}
    with pytest.raises(ValueError, match="nothing was learnt.*broken_samples.jsonl"):
        trainer_of(tmp_path, Dataset.from_list([row] * 4)).train()


def test_a_few_batches_without_labels_are_no_error(tmp_path):
    class Mixed(TensorChats):
        def __getitem__(self, index):
            return (NoLabels if index % 2 else TensorChats)(16)[index]

    make_trainer(tmp_path, data=Mixed(), per_device_train_batch_size=1, max_steps=4).train()
