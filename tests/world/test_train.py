"""Training on the rendered world: what the model is given, and that a run can stop, go on and be loaded."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest
import torch

from video_ma2mba.modeling_video_ma2mba.answering_questions import question_ids, video_prefix
from video_ma2mba.processing.text_batches import IGNORED_LABEL
from video_ma2mba.trainer.training_clock import TrainingClock
from video_ma2mba.world import KINDS, WorldDataset, chat
from video_ma2mba.world.batches import (
    WorldBatches,
    choose_questions,
    draw_length,
    imitate_mp4,
    longest_at,
    question_subject,
)
from video_ma2mba.world.model import (
    SIZES,
    fit_projector_,
    start_for_recall_,
    world_config,
    world_processor,
)
from video_ma2mba.world.tokenizer import build_world_tokenizer
from video_ma2mba.world.train import WorldTraining, train


@pytest.fixture(scope="module")
def processor():
    tokenizer = build_world_tokenizer()
    return world_processor(world_config(SIZES["bundled"], tokenizer), tokenizer)


def batches(processor, **options):
    data = WorldDataset("train", 1000, frames=(8, 16), questions=4)
    fields = {"tokens_per_batch": 2000, "progress": torch.ones(1), "weights": torch.ones(len(KINDS))}
    return WorldBatches(data, processor, **fields | options)


def test_batches_hold_what_the_processor_would_write(processor):
    """One tokenization for training here and for everybody who uses the processor."""
    sample = WorldDataset(frames=(9, 9), questions=3)[4]
    messages = chat(sample.questions, sample.frames)
    batch = batches(processor).collator([{"messages": messages}])
    written = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert torch.equal(written["input_ids"], batch["input_ids"])
    assert torch.equal(written["pixel_values_videos"], batch["pixel_values_videos"])
    pixels = torch.from_numpy(sample.frames).permute(0, 3, 1, 2)
    assert torch.equal(written["pixel_values_videos"], pixels)
    first, *others = (question.answer for question in sample.questions)
    answers = f"{first}<|endoftext|>" + "".join(others)  # the end is learnt from the first turn
    labels = batch["labels"][0].tolist()
    assert processor.tokenizer.decode([label for label in labels if label != IGNORED_LABEL]) == answers


def test_a_question_alone_starts_as_a_chat_does(processor):
    """What scoring puts behind a video that was read before is what training puts there."""
    sample = WorldDataset(frames=(8, 8), questions=1)[0]
    (ids,) = batches(processor).collator([{"messages": chat(sample.questions, sample.frames)}])["input_ids"].tolist()
    asked = question_ids(processor, sample.questions[0].text)[0].tolist()
    answer = processor.tokenizer(f"{sample.questions[0].answer}<|endoftext|>")["input_ids"]
    opening = video_prefix(processor)[0].tolist()
    assert ids == opening[:-1] + opening[-1:] * 8 * 16 + asked + answer


def test_batch_shapes_and_labels(processor):
    for batch in itertools.islice(batches(processor), 3):
        videos, length = batch["input_ids"].shape
        assert batch["labels"].shape == (videos, length)
        frames = batch["num_frames"]
        assert len(set(frames.tolist())) == 1
        assert batch["pixel_values_videos"].shape == (int(frames.sum()), 3, 64, 64)
        assert batch["pixel_values_videos"].dtype == torch.uint8
        assert int((batch["input_ids"] == processor.video_token_id).sum()) == int(frames.sum()) * 16
        labelled = batch["labels"] != IGNORED_LABEL
        assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])
        assert labelled.any(1).all()


def test_the_curriculum_lengthens_videos(processor):
    early = {int(b["num_frames"][0]) for b in itertools.islice(batches(processor, progress=torch.zeros(1)), 5)}
    late = {int(b["num_frames"][0]) for b in itertools.islice(batches(processor), 12)}
    assert early <= {1, 2}
    assert max(late) > 11
    tops = [longest_at(p / 100, 64, 0.5) for p in range(101)]
    assert tops[0] == 2
    assert tops == sorted(tops)
    assert set(tops[50:]) == {64}
    assert tops[40] < 64
    assert sum(top <= 8 for top in tops[:50]) > 15  # a good part of the ramp is cheap


def test_lengths_stay_in_range_and_pictures_stay_in_the_mixture():
    rng = random.Random(0)
    drawn = [draw_length(rng, 64, 8) for _ in range(2000)]
    assert (min(drawn), max(drawn)) == (1, 64)
    assert 0.05 < sum(length < 8 for length in drawn) / 2000 < 0.2
    assert {draw_length(rng, 4, 8) for _ in range(50)} == {2, 3, 4}
    often = [draw_length(rng, 64, 8, shorter=0.5) for _ in range(2000)]
    assert 0.4 < sum(length < 8 for length in often) / 2000 < 0.5  # half of them up to 8, of which an eighth is 8


def test_questions_are_drawn_by_the_weights_of_their_kinds():
    rng = random.Random(0)
    weights = dict.fromkeys(KINDS, 1.0) | {"time": 5.0, "order": 0.05}
    data = WorldDataset(frames=(16, 16), questions=14)
    kinds, firsts = Counter(), Counter()
    for index in range(300):
        asked = data.asked(index)[1]
        chosen = choose_questions(rng, asked, 4, weights)
        assert len({question_subject(question) for question in chosen}) == len(chosen) <= 4
        assert set(chosen) <= set(asked)
        kinds.update(question.kind for question in chosen)
        firsts[chosen[0].kind] += 1
    assert kinds["time"] > 2 * kinds["needle"] > 4 * kinds["order"]
    assert set(firsts) >= set(KINDS) - {"order"}


def test_a_subject_is_the_same_in_every_wording():
    data = WorldDataset(frames=(24, 24), questions=40)
    for index in range(20):
        asked = data.asked(index)[1]
        about = Counter(question_subject(question) for question in asked)
        assert about["needle", frozenset({"card"})] == sum(question.kind == "needle" for question in asked)
        for question in asked:
            kind, names = question_subject(question)
            assert len(names) == {"direction": 2, "count": 1, "colour": 1, "shape": 1}.get(kind, len(names))
            if kind == "order":
                assert 3 <= len(names) <= 4
    assert max(about.values()) > 1


def test_the_projector_starts_from_standardised_features(make_model):
    model = make_model()
    features = torch.randn(20, 9, model.config.vision_config.hidden_size) * 3 + 5
    linear = model.model.multi_modal_projector.linear_1
    torch.nn.init.zeros_(linear.bias)
    standard = (features - features.mean((0, 1))) / features.flatten(0, 1).std(0)
    wanted = linear(standard)
    fit_projector_(model, features)
    torch.testing.assert_close(linear(features), wanted, atol=1e-4, rtol=1e-4)


def test_batches_follow_from_their_number(processor):
    one, two = (next(iter(batches(processor))) for _ in range(2))
    assert torch.equal(one["input_ids"], two["input_ids"])
    assert torch.equal(one["pixel_values_videos"], two["pixel_values_videos"])
    later = next(iter(batches(processor, first_batch=7)))
    assert not torch.equal(one["pixel_values_videos"][:8], later["pixel_values_videos"][:8])


def test_chats_about_streams_do_not_list_all_that_was_seen(processor):
    made = batches(processor, progress=torch.zeros(1))
    for streams, lists in ((1.0, False), (0.0, True)):
        made.dataset = WorldDataset("train", 1000, frames=(100, 100), questions=4, streams=streams)
        ids = made.batch(range(6), 100)["input_ids"]
        assert ids.shape[0] == 6
        assert any("List everything" in text for text in processor.tokenizer.batch_decode(ids)) == lists


def test_pictures_as_from_a_file_stay_close():
    frames = WorldDataset(frames=(8, 8))[3].frames
    rough = imitate_mp4(frames, 5)
    assert rough.shape == frames.shape
    assert rough.dtype == np.uint8
    assert 0.5 < np.abs(rough.astype(int) - frames).mean() < 6


def test_the_clock():
    falling = {"num_decay_steps": 0.4, "decay_type": "linear", "min_lr_ratio": 0.0}
    clock = TrainingClock(100, 50.0, 10, "warmup_stable_decay", falling)
    assert clock.progress(50) == 0.5
    clock.elapsed = 40.0
    assert clock.progress(50) == 0.8
    assert clock(50) == pytest.approx(0.5)  # half of the way down
    clock.elapsed = 20.0
    assert [clock(step) for step in (0, 9, 59)] == pytest.approx([0.1, 1.0, 1.0])  # warm-up, then constant
    clock.elapsed = 500.0
    assert clock.progress(0) == 1.0
    assert TrainingClock(100, None, 10)(0) == pytest.approx(0.1, abs=1e-3)
    assert TrainingClock(100, None, 0, "cosine")(50) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="steps"):
        TrainingClock(None, None, 10)


def test_recall_start_reaches_every_layer(make_model):
    model = make_model()
    start_for_recall_(model)
    for layer in model.model.language_model.layers:
        rates = layer.mixer.A_log.exp()
        assert rates[0] < 0.005
        assert rates[-1] > 7
        assert (rates.diff() > 0).all()


@pytest.mark.parametrize("wrong", [{"size": "huge"}, {"tower": "cnn"}, {"frames": "9..1"}, {"kinds": "colour,smell"}])
def test_wrong_settings(wrong):
    with pytest.raises(ValueError):
        WorldTraining(out="x", steps=1, **wrong)


def small(out, **options):
    fields = {
        "size": "tiny",
        "frames": "8..8",
        "tokens_per_batch": 900,
        "questions": 4,
        "workers": 0,
        "tower_steps": 2,
    }
    fields |= {"tower_frames": 16, "eval_seconds": 0.0, "eval_videos": 2, "warmup_steps": 2}
    return WorldTraining(out=str(out), **fields | options)


def test_a_run_stops_resumes_and_exports(tmp_path):
    import csv

    from video_ma2mba import VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor

    sizes = {"state": 32, "head": 8}
    train(small(tmp_path, steps=50, stop_after=0.0, **sizes))  # stops after its first step
    assert (tmp_path / "checkpoint-1").is_dir()
    with pytest.raises(ValueError, match="--resume"):
        train(small(tmp_path, steps=4))
    results = train(small(tmp_path, steps=4, resume=True, **sizes))
    assert set(results) == {8}
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    with (tmp_path / "training_log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4]
    assert all(float(row["loss"]) < 9 for row in rows)
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)  # the clock goes on where it stopped
    assert (tmp_path / "validation.csv").is_file()

    model = VideoMa2mbaForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.float32)
    batch = next(iter(batches(VideoMa2mbaProcessor.from_pretrained(tmp_path / "model"))))
    assert torch.isfinite(model(**batch).loss)
    assert model.config.vision_chunk_frames == 64
    text = model.config.text_config
    assert (text.state_size, text.head_dim, text.num_heads) == (32, 8, 8)


@pytest.mark.slow
def test_the_model_learns(tmp_path):
    """A few dozen steps on one tiny batch: the loss on answers falls well below what guessing would leave."""
    from video_ma2mba import VideoMa2mbaForConditionalGeneration

    tokenizer = build_world_tokenizer()
    model = VideoMa2mbaForConditionalGeneration(world_config(SIZES["tiny"], tokenizer))
    start_for_recall_(model)
    batch = batches(world_processor(model.config, tokenizer)).batch([1, 2], 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    losses = []
    for _ in range(60):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.3 < 5 < losses[0]
