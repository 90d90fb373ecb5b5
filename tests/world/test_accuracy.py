"""Scoring on the rendered world: right means right, batches do not matter, and a table can be finished later."""

import csv
import json

import pytest
import torch

from video_ma2mba.modeling_video_ma2mba.answering_questions import question_ids, video_prefix
from video_ma2mba.processing.byte_tokenizer import build_byte_tokenizer
from video_ma2mba.world import KINDS, WorldDataset, accuracy
from video_ma2mba.world.accuracy import WorldAccuracy, measure
from video_ma2mba.world.model import SIZES, world_config, world_processor
from video_ma2mba.world.scoring import generate_answers, score_forced
from video_ma2mba.world.train import export


@pytest.fixture(scope="module")
def processor():
    tokenizer = build_byte_tokenizer()
    return world_processor(world_config(SIZES["tiny"], tokenizer), tokenizer)


@pytest.fixture(scope="module")
def half_trained(processor):
    """A tiny model that has learnt a few answers by heart, so that some are right and some wrong."""
    from video_ma2mba import VideoMa2mbaForConditionalGeneration

    torch.manual_seed(0)
    model = VideoMa2mbaForConditionalGeneration(world_config(SIZES["tiny"], processor.tokenizer))
    data = WorldDataset("test", 4, frames=(4, 4), questions=4, kinds=("count", "time"))
    questions = [question for index in range(4) for question in data.asked(index)[1]]
    pieces = []
    for question in questions[::2]:
        asked = question_ids(processor, question.text)[0].tolist()
        answer = processor.tokenizer(f"{question.answer}<|endoftext|>")["input_ids"]
        pieces.append((asked + answer, [-100] * len(asked) + answer))
    longest = max(len(ids) for ids, _ in pieces)
    ids = torch.tensor([ids + [1] * (longest - len(ids)) for ids, _ in pieces])
    labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in pieces])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(40):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def samples(count=4):
    data = WorldDataset("test", count, frames=(4, 4), questions=4, kinds=("count", "time"))
    return [data[index] for index in range(count)]


def test_forced_scores_equal_greedy_decoding(half_trained, processor):
    forced = score_forced(half_trained, processor, samples())
    greedy = generate_answers(half_trained, processor, samples())
    assert [question for question, _ in forced] == [question for question, _ in greedy]
    hits = [given == question.answer for question, given in greedy]
    assert [hit for _, hit in forced] == hits
    assert 0 < sum(hits) < len(hits)


def test_scores_do_not_depend_on_the_batch(half_trained, processor):
    together = generate_answers(half_trained, processor, samples())
    alone = [pair for sample in samples() for pair in generate_answers(half_trained, processor, [sample])]
    assert together == alone


def test_one_question_equals_the_plain_way(half_trained, processor):
    """Reading the video once and asking from its state gives what one ordinary `generate` call gives."""
    (sample,) = samples(1)
    for question, given in generate_answers(half_trained, processor, [sample]):
        opening, asked = video_prefix(processor), question_ids(processor, question.text)
        ids = torch.cat([opening[:, :-1], opening[:, -1:].expand(1, 4 * 16), asked], dim=1)
        out = half_trained.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values_videos=torch.from_numpy(sample.frames).permute(0, 3, 1, 2),
            do_sample=False,
            max_new_tokens=20,
            pad_token_id=1,
        )
        assert processor.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip() == given


@pytest.fixture
def model_folder(half_trained, processor, tmp_path):
    export(half_trained, processor.tokenizer, tmp_path / "model", "float32")
    return tmp_path / "model"


def test_the_table(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "_BLOCK", 4)
    settings = WorldAccuracy(model=str(model_folder), out=str(tmp_path / "t.csv"), per_kind=3, frames=["8..9", "12"])
    settings.device, settings.dtype = "cpu", "float32"
    table = measure(settings)
    with (tmp_path / "t.csv").open() as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(table)
    for frames in ("8..9", "12"):
        rows = {(row["kind"], row["form"]): row for row in table if row["frames"] == frames}
        assert all(rows[kind, "all"]["questions"] >= 3 for kind in KINDS)
        assert rows["all", "all"]["questions"] == sum(rows[kind, "all"]["questions"] for kind in KINDS)
        assert all(row["accuracy"] == round(row["right"] / row["questions"], 4) for row in rows.values())

    answers = tmp_path / "t.answers.jsonl"
    complete = answers.read_text()
    lines = complete.splitlines(keepends=True)
    broken = len(lines) * 2 // 3
    answers.write_text("".join(lines[:broken]) + lines[broken][:20])  # the machine died while writing
    calls = []
    score = accuracy._answer
    monkeypatch.setattr(accuracy, "_answer", lambda *a: calls.append(a[3]) or score(*a))
    assert measure(settings) == table
    assert sorted(answers.read_text().splitlines()) == sorted(complete.splitlines())
    asked = sum(len(indices) for indices in calls)
    assert 0 < asked < sum('"block"' in line for line in lines) * 4

    settings.method = "forced"
    with pytest.raises(ValueError, match="another model or other settings"):
        measure(settings)
    settings.out = str(tmp_path / "forced.csv")
    assert [row["right"] for row in measure(settings)] == [row["right"] for row in table]


def test_given_answers_are_kept(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "_BLOCK", 2)
    settings = WorldAccuracy(model=str(model_folder), out=str(tmp_path / "t.csv"), per_kind=1, frames=["8"])
    settings.device, settings.dtype = "cpu", "float32"
    measure(settings)
    rows = [json.loads(line) for line in (tmp_path / "t.answers.jsonl").read_text().splitlines()[1:]]
    for row in rows:
        assert "block" in row or row["right"] == (row["given"] == row["answer"])


def test_wrong_settings(tmp_path):
    with pytest.raises(ValueError, match="method"):
        WorldAccuracy(model="x", out="y", method="guess")
    with pytest.raises(ValueError, match="per_kind"):
        WorldAccuracy(model="x", out="y", per_kind=0)
    with pytest.raises(FileNotFoundError, match="no model"):
        measure(WorldAccuracy(model=str(tmp_path), out=str(tmp_path / "y.csv")))
