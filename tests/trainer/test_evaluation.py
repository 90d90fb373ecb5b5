"""Evaluation: its loss is that of its own samples, with and without adapters; logs go where they are wanted."""

import json
import math
import sqlite3

import pytest
import torch
from tensor_chats import TensorChats, make_trainer, settings, tiny_model, tiny_processor

from video_ma2mba.trainer.data import VideoChatCollator, load_training_data
from video_ma2mba.trainer.recipe import Recipe
from video_ma2mba.trainer.train_run import lora_config
from video_ma2mba.trainer.video_trainer import VideoMa2mbaTrainer

pytestmark = pytest.mark.filterwarnings("ignore:sample .* is left out")


@pytest.fixture
def table(tmp_path, tiny_video):
    """Writes questions about a video; "broken" about one that cannot be read."""
    (tmp_path / "broken.mp4").write_bytes(b"no video")

    def write(*answers: str):
        path = tmp_path / f"{'-'.join(answers)}.csv"
        rows = [f"{'broken.mp4' if answer == 'broken' else tiny_video},What is it?,{answer}\n" for answer in answers]
        path.write_text("video,question,answer\n" + "".join(rows))
        return load_training_data(path)

    return write


def chat_trainer(out, train, held_out, **options) -> VideoMa2mbaTrainer:
    model = tiny_model()
    model.resize_token_embeddings(272)
    model.config.text_config.pad_token_id = 1
    collator = options.pop("data_collator", None)
    return VideoMa2mbaTrainer(
        model,
        settings(out, fps=2.0, **options),
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=collator,
        processing_class=tiny_processor(),
    )


@pytest.mark.parametrize("own_collator", [False, True], ids=["default", "own"])
@pytest.mark.parametrize("together", [1, 2])
def test_broken_samples_are_left_out_and_counted(tmp_path, table, together, own_collator):
    good, mixed = table("red", "a blue one"), table("red", "broken", "broken", "a blue one")
    if together == 2:
        good, mixed = (
            table("red", "red", "a blue one"),
            table("red", "red", "broken", "broken", "broken", "a blue one"),
        )
    options = {"per_device_eval_batch_size": together}
    if own_collator:
        options["data_collator"] = VideoChatCollator(tiny_processor(), fps=2.0, replacements=good)
    expected = chat_trainer(tmp_path / "good", good, good, **options).evaluate()
    trainer = chat_trainer(tmp_path / "mixed", good, mixed, **options)
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    assert found["eval_entropy"] == pytest.approx(expected["eval_entropy"], rel=1e-6)
    assert found["eval_broken_samples"] == together + 1 and "eval_broken_samples" not in expected
    listed = (tmp_path / "mixed" / "broken_eval_samples.jsonl").read_text().splitlines()
    assert {json.loads(line)["source"].endswith("broken.mp4") for line in listed} == {True}
    assert trainer.evaluate()["eval_broken_samples"] == together + 1, "each evaluation counts anew"


def test_nothing_but_broken_samples_has_no_loss(tmp_path, table):
    found = chat_trainer(tmp_path, table("red"), table("broken"), per_device_eval_batch_size=1).evaluate()
    assert math.isnan(found["eval_loss"]) and found["eval_broken_samples"] == 1
    assert "eval_entropy" not in found


def test_adapters_are_evaluated_during_training(tmp_path):
    trainer = make_trainer(
        tmp_path,
        peft_config=lora_config(Recipe(lora_rank=4)),
        eval_dataset=TensorChats(4),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        early_stopping_patience=3,
        learning_rate=0.05,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) >= 3 and trainer.state.best_metric == min(evaluations[1:]) < before
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5), "the best is loaded"


def test_trackio_gets_the_logs(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    options = {"report_to": ["trackio"], "project": "clips", "eval_strategy": "steps", "eval_steps": 1}
    make_trainer(tmp_path / "run", max_steps=2, eval_dataset=TensorChats(2), **options).train()
    with sqlite3.connect(tmp_path / "trackio" / "clips.db") as database:
        logged = [json.loads(row[0]) for row in database.execute("select metrics from metrics order by id")]
    assert [sorted({"train/loss", "eval/loss"} & set(entry)) for entry in logged[:4]] == [
        ["train/loss"],
        ["eval/loss"],
        ["train/loss"],
        ["eval/loss"],
    ]
    assert {"train/tokens_per_second", "train/frames_per_second", "train/num_frames"} <= set(logged[0])


@pytest.mark.parametrize(
    "kind", [{}, {"loss_type": "dft"}, {"label_smoothing_factor": 0.1}, {"eval_accumulation_steps": 1}]
)
def test_loss_and_scores_do_not_depend_on_the_batch_size(tmp_path, table, kind):
    """Means over labelled tokens: a short answer alone in a batch counts no more than its tokens."""
    rows = table("a very long answer with many words", "red", "a blue one")
    found = []
    for together in (1, 2, 3):
        trainer = chat_trainer(tmp_path / str(together), rows, rows, per_device_eval_batch_size=together, **kind)
        found.append(trainer.evaluate())
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert [one[name] for one in found] == [pytest.approx(found[2][name], rel=1e-5)] * 3, name
    if not kind:
        model = trainer.model.eval()
        total = tokens = 0
        for batch in trainer.get_eval_dataloader():
            with torch.no_grad():
                logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, :-1]
            wanted = batch["labels"][:, 1:]
            total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum").item()
            tokens += (wanted != -100).sum().item()
        assert found[0]["eval_loss"] == pytest.approx(total / tokens, rel=1e-5)
