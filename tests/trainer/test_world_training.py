"""Training on the rendered world: what the model is given, and that a run can stop, go on and be loaded."""

import itertools
import math

import numpy as np
import pytest
import torch

from video_ma2mba.processing.byte_tokenizer import build_byte_tokenizer
from video_ma2mba.synthetic import WorldDataset, chat
from video_ma2mba.trainer.world_batches import IGNORED, ChatTokens, WorldBatches, collate, longest_at, through_a_file
from video_ma2mba.trainer.world_clock import WorldClock
from video_ma2mba.trainer.world_model import SIZES, start_for_recall_, world_config, world_processor
from video_ma2mba.trainer.world_sft import WorldTraining, train


@pytest.fixture(scope="module")
def tokens():
    return ChatTokens(build_byte_tokenizer(), 16)


def batches(tokens, **options):
    data = WorldDataset("train", 1000, frames=(8, 16), questions=4)
    return WorldBatches(data, tokens, **{"tokens_per_batch": 2000, "progress": torch.ones(1)} | options)


def test_batches_hold_what_the_processor_would_write(tokens):
    """One tokenization for training here and for everybody who uses the processor."""
    config = world_config(SIZES["bundled"], tokens.tokenizer)
    processor = world_processor(config, tokens.tokenizer)
    sample = WorldDataset(frames=(9, 9), questions=3)[4]
    ((ids, labels),) = tokens.encode([sample.questions], 9)
    written = processor.apply_chat_template(
        chat(sample.questions, sample.frames), tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert written["input_ids"][0].tolist() == ids
    pixels = collate([(ids, labels)], [sample.frames], 1)["pixel_values_videos"]
    assert torch.equal(written["pixel_values_videos"], pixels)
    answers = "".join(f"{question.answer}<|endoftext|>" for question in sample.questions)
    assert tokens.tokenizer.decode([label for label in labels if label != IGNORED]) == answers


def test_a_question_alone_starts_as_a_chat_does(tokens):
    sample = WorldDataset(frames=(8, 8), questions=1)[0]
    ((ids, labels),) = tokens.encode([sample.questions], 8)
    question_ids, question_labels = tokens.encode_question(sample.questions[0])
    assert ids[-len(question_ids) :] == question_ids
    assert ids[: -len(question_ids)] == tokens.opening + [tokens.video_id] * 8 * 16
    assert labels[-len(question_ids) :] == question_labels


def test_batch_shapes_and_labels(tokens):
    for batch in itertools.islice(batches(tokens), 3):
        videos, length = batch["input_ids"].shape
        assert batch["labels"].shape == (videos, length)
        frames = batch["num_frames"]
        assert len(set(frames.tolist())) == 1
        assert batch["pixel_values_videos"].shape == (int(frames.sum()), 3, 64, 64)
        assert batch["pixel_values_videos"].dtype == torch.uint8
        assert int((batch["input_ids"] == tokens.video_id).sum()) == int(frames.sum()) * 16
        labelled = batch["labels"] != IGNORED
        assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])
        assert labelled.any(1).all()


def test_the_curriculum_lengthens_videos(tokens):
    early = {int(b["num_frames"][0]) for b in itertools.islice(batches(tokens, progress=torch.zeros(1)), 5)}
    late = {int(b["num_frames"][0]) for b in itertools.islice(batches(tokens), 12)}
    assert early == {8}
    assert max(late) > 11
    assert [longest_at(p, 8, 64, 0.5) for p in (0.0, 0.25, 0.5, 1.0)] == [8, 36, 64, 64]


def test_batches_follow_from_their_number(tokens):
    one, two = (next(iter(batches(tokens))) for _ in range(2))
    assert torch.equal(one["input_ids"], two["input_ids"])
    assert torch.equal(one["pixel_values_videos"], two["pixel_values_videos"])
    later = next(iter(batches(tokens, first_batch=7)))
    assert not torch.equal(one["pixel_values_videos"][:8], later["pixel_values_videos"][:8])


def test_pictures_as_from_a_file_stay_close():
    frames = WorldDataset(frames=(8, 8))[3].frames
    rough = through_a_file(frames, 5)
    assert rough.shape == frames.shape
    assert rough.dtype == np.uint8
    assert 0.5 < np.abs(rough.astype(int) - frames).mean() < 6


def test_the_clock():
    clock = WorldClock(steps=100, seconds=50.0, warmup_steps=10, floor=0.0)
    assert clock.progress(50) == 0.5
    clock.elapsed = 40.0
    assert clock.progress(50) == 0.8
    assert clock(50) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.8)))
    clock.elapsed = 500.0
    assert clock.progress(0) == 1.0
    assert WorldClock(100, None, 10)(0) == pytest.approx(0.1, abs=1e-3)
    with pytest.raises(ValueError, match="steps"):
        WorldClock(None, None, 10)


def test_recall_start_reaches_every_layer(make_model):
    model = make_model()
    start_for_recall_(model)
    for layer in model.model.language_model.layers:
        rates = layer.mixer.A_log.exp()
        assert rates[0] < 0.005
        assert rates[-1] > 7
        assert (rates.diff() > 0).all()


@pytest.mark.parametrize("wrong", [{"size": "huge"}, {"frames": "9..1"}, {"kinds": "colour,smell"}])
def test_wrong_settings(wrong):
    with pytest.raises(ValueError):
        WorldTraining(out="x", steps=1, **wrong)


def small(out, **options):
    fields = {"size": "tiny", "frames": "8..8", "tokens_per_batch": 900, "questions": 4, "workers": 0, "eval_every": 3}
    return WorldTraining(out=str(out), **fields | {"eval_videos": 2, "warmup_steps": 2} | options)


def test_a_run_stops_resumes_and_exports(tmp_path):
    import csv

    from transformers import AutoTokenizer

    from video_ma2mba import VideoMa2mbaForConditionalGeneration

    train(small(tmp_path, steps=50, stop_after=0.0))  # stops after its first step
    assert (tmp_path / "checkpoint-1").is_dir()
    with pytest.raises(ValueError, match="--resume"):
        train(small(tmp_path, steps=4))
    results = train(small(tmp_path, steps=4, resume=True))
    assert set(results) == {8}
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    with (tmp_path / "training_log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4]
    assert all(float(row["loss"]) < 6 for row in rows)
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)  # the clock goes on where it stopped
    assert (tmp_path / "validation.csv").is_file()

    model = VideoMa2mbaForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    batch = next(iter(batches(ChatTokens(tokenizer, 16))))
    assert torch.isfinite(model(**batch).loss)
    assert model.config.vision_chunk_frames == 64


@pytest.mark.slow
def test_the_model_learns(tmp_path):
    """A few dozen steps on one tiny batch: the loss on answers falls well below what guessing would leave."""
    from video_ma2mba import VideoMa2mbaForConditionalGeneration
    from video_ma2mba.trainer.world_sft import build_optimizer

    tokenizer = build_byte_tokenizer()
    tokens = ChatTokens(tokenizer, 16)
    model = VideoMa2mbaForConditionalGeneration(world_config(SIZES["tiny"], tokenizer))
    start_for_recall_(model)
    batch = batches(tokens).batch([1, 2], 8)
    optimizer = build_optimizer(model, small(tmp_path, steps=1, learning_rate=1e-2))
    losses = []
    for _ in range(60):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.3 < 5 < losses[0]
