"""What the trainer does with parameters, data, evaluation, logs and cards."""

import logging

import pytest
import torch
from datasets import Dataset
from tensor_chats import TensorChats, adapters, collate, losses, make_trainer, settings, tiny_model, tiny_processor

from video_ma2mba.hub_cards.model_card import OWN_WORDS_BEGIN, read_metadata
from video_ma2mba.trainer.training_config import VideoMa2mbaTrainingConfig
from video_ma2mba.trainer.training_inputs import EpochLengthSampler
from video_ma2mba.trainer.video_trainer import VideoMa2mbaTrainer


def names_of(trainer) -> dict[tuple[str, float], set[str]]:
    """Parameter names by (rate, decay) of the optimizer's groups."""
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    return {
        (group["lr"], group["weight_decay"]): {names[id(p)] for p in group["params"]}
        for group in trainer.create_optimizer().param_groups
    }


def test_parts_have_their_rates_and_only_matrices_decay(tmp_path):
    trainer = make_trainer(tmp_path, learning_rate=4e-5, vision_learning_rate=4e-6, projector_learning_rate=1e-3)
    groups = names_of(trainer)
    assert set(groups) == {(rate, decay) for rate in (4e-5, 4e-6, 1e-3) for decay in (0.05, 0.0)}
    assert trainer.optimizer.param_groups[0]["lr"] == 4e-5, "the Trainer logs the first group's rate"
    for (rate, decay), names in groups.items():
        part = {4e-5: "language_model", 4e-6: "vision_tower", 1e-3: "multi_modal_projector"}[rate]
        assert all(part in name or (part == "language_model" and "lm_head" in name) for name in names)
        recurrence = (
            "A_log",
            ".D",
            "dt_bias",
            "bias",
            "norm.weight",
            "norm_f.weight",
            "norm1.weight",
            "norm2.weight",
            "class_embedding",
        )
        endings = {name for name in names if name.endswith(recurrence)}
        assert endings == (set() if decay else names), f"decay {decay}: {sorted(names - endings)}"
    grouped = [name for names in groups.values() for name in names]
    assert sorted(grouped) == sorted(n for n, p in trainer.model.named_parameters() if p.requires_grad)


def test_a_stage_trains_its_parts_only(tmp_path):
    trainer = make_trainer(tmp_path, train_parts="projector", max_steps=2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("multi_modal_projector" in name for name in moved)
    with pytest.raises(ValueError, match="train names 'head'"):
        make_trainer(tmp_path, train_parts="head")


def test_data_of_any_kind(tmp_path):
    """Map-style and iterable data sets of tensors pass through to the given collator."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from (TensorChats()[index] for index in range(16))

    assert len(losses_of(make_trainer(tmp_path, data=Stream(), max_steps=2))) == 2
    with pytest.raises(ValueError, match="has no length: set max_steps"):
        make_trainer(tmp_path, data=Stream(), max_steps=-1)
    workers = make_trainer(tmp_path, max_steps=2, dataloader_num_workers=1)
    assert losses_of(workers) == pytest.approx(losses_of(make_trainer(tmp_path, max_steps=2)), rel=1e-6)


def losses_of(trainer) -> list[float]:
    trainer.train()
    return losses(trainer)


def test_frames_stay_on_the_host_until_they_are_wanted(tmp_path):
    """All micro-batches of a step are fetched before the first is used: on the GPU they would fill it."""
    trainer = make_trainer(tmp_path)
    loader = trainer.get_train_dataloader()
    assert loader.device is None
    batch = next(iter(loader))
    trainer.args.__dict__["_n_gpu"] = 0
    prepared = trainer._prepare_inputs(batch)
    assert prepared["pixel_values_videos"] is batch["pixel_values_videos"]
    del batch["attention_mask"]
    assert trainer._prepare_inputs(batch)["attention_mask"].all()


def test_evaluation_early_stopping_and_tensorboard(tmp_path):
    trainer = make_trainer(
        tmp_path,
        eval_dataset=TensorChats(4),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        early_stopping_patience=2,
        learning_rate=1.0,  # it only gets worse
        vision_learning_rate=None,
        warmup_steps=0,
        max_steps=20,
        report_to=["tensorboard"],
    )
    trainer.train()
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.global_step < 20, "patience should have ended this"
    assert trainer.state.best_metric == min(evaluations)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(tmp_path.rglob("events.out*")).parent))
    events.Reload()
    assert {"train/loss", "train/tokens_per_second", "train/frames_per_second", "eval/loss"} <= set(
        events.Tags()["scalars"]
    )


def test_evaluation_loss_is_that_of_the_model(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=TensorChats(3), per_device_eval_batch_size=3)
    model = trainer.video_model.eval()
    with torch.no_grad():
        expected = model(**collate([TensorChats()[index] for index in range(3)])).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_wrong_settings_are_refused(tmp_path):
    for options, message in (
        ({"packing": True}, "packing=True needs max_length"),
        ({"labels": "everything"}, "labels='everything' is not valid"),
        ({"global_batch_size": 3}, "global_batch_size=3 is no multiple of 2 samples x 1 processes"),
        ({"early_stopping_patience": 1}, "needs evaluations"),
    ):
        with pytest.raises(ValueError, match=message):
            settings(tmp_path, **options)
    with pytest.raises(ValueError, match="must be a VideoMa2mbaTrainingConfig"):
        VideoMa2mbaTrainer(tiny_model(), {}, train_dataset=TensorChats())
    assert settings(tmp_path, global_batch_size=8).gradient_accumulation_steps == 4
    assert VideoMa2mbaTrainingConfig(str(tmp_path), use_cpu=True).bf16 is False


def test_mixed_precision(tmp_path):
    bf16 = losses_of(make_trainer(tmp_path, bf16=True, max_steps=3))
    assert bf16 == pytest.approx(losses_of(make_trainer(tmp_path, max_steps=3)), rel=0.05)


def test_order_by_length_is_the_same_again():
    lengths = [10 * (1 + index % 7) for index in range(64)]
    first, again = (EpochLengthSampler(lengths, 4, seed=3) for _ in range(2))
    second_epoch = (first.set_epoch(0), list(first), first.set_epoch(1), list(first))
    again.set_epoch(1)
    assert list(again) == second_epoch[3] != second_epoch[1]
    assert sorted(second_epoch[1]) == list(range(64))
    groups = [second_epoch[1][i : i + 4] for i in range(0, 64, 4)]
    assert sum(max(lengths[i] for i in g) - min(lengths[i] for i in g) for g in groups) < 16 * 30


def test_card_is_filled_in_and_keeps_own_words(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, license="apache-2.0", base_model="owner/base")
    trainer.data_name = "my clips"
    trainer.train()
    trainer.create_model_card(tags="mine")
    card = tmp_path / "README.md"
    text = card.read_text()
    for line in (
        "| data | my clips |",
        "| optimizer steps | 2 of 2 |",
        "| learning_rate | 0.01 |",
        "Mamba-2, 2 layers",
    ):
        assert line in text
    assert f"| last training loss | {losses(trainer)[-1]:.4f} (step 2) |" in text
    metadata = read_metadata(card)
    assert metadata["license"] == "apache-2.0" and metadata["base_model"] == "owner/base"
    assert {"trl", "sft", "video-ma2mba", "mine"} <= set(metadata["tags"])

    card.write_text(text.replace(f"{OWN_WORDS_BEGIN}\n", f"{OWN_WORDS_BEGIN}\nI made this on a rainy day.\n\n"))
    trainer.create_model_card()
    text = card.read_text()
    assert "I made this on a rainy day." in text and text.count("| optimizer steps |") == 1


def test_push_to_hub_sends_model_processor_code_and_card(tmp_path, monkeypatch):
    import transformers.trainer

    sent = {}

    class Hub:
        def create_repo(self, repo_id, **_):
            sent["repo"] = repo_id
            return type("Url", (), {"repo_id": repo_id})()

        def upload_folder(self, repo_id, folder_path, ignore_patterns=None, **_):
            from pathlib import Path

            from huggingface_hub.utils import filter_repo_objects

            names = [
                path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()
            ]
            sent["files"] = set(filter_repo_objects(names, ignore_patterns=ignore_patterns))
            return "https://hub/commit"

    hub = Hub()
    for name in ("hf_api", "create_repo", "upload_folder"):
        if hasattr(transformers.trainer, name):
            monkeypatch.setattr(transformers.trainer, name, (lambda: hub) if name == "hf_api" else getattr(hub, name))
    trainer = make_trainer(tmp_path, max_steps=2, hub_model_id="me/mine", save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.push_to_hub()
    assert sent["repo"] == "me/mine"
    needed = {"README.md", "config.json", "model.safetensors", "processor_config.json", "tokenizer.json"}
    assert needed | {"modeling_video_ma2mba.py", "processing_video_ma2mba.py"} <= sent["files"]
    assert not any(name.startswith("checkpoint-") for name in sent["files"])
    assert 'model="me/mine"' in (tmp_path / "README.md").read_text()


def test_chats_with_videos_through_the_default_collator(tmp_path, tiny_video, caplog):
    """Rows of `load_training_data`; one video is broken: it is left out, counted and listed."""
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    rows = [(tiny_video, "Is it dark?", "yes"), (broken, "Is it light?", "no"), (tiny_video, "And now?", "brighter")]
    table = tmp_path / "questions.csv"
    table.write_text("video,question,answer\n" + "".join(f"{v},{q},{a}\n" for v, q, a in rows))
    from video_ma2mba.trainer.data import load_training_data

    data = load_training_data(table)
    assert isinstance(data, Dataset)
    model = tiny_model()
    model.resize_token_embeddings(272)
    model.config.text_config.pad_token_id = 1
    trainer = VideoMa2mbaTrainer(
        model,
        settings(tmp_path / "run", max_steps=3, fps=2.0, train_sampling_strategy="group_by_length"),
        train_dataset=data,
        processing_class=tiny_processor(),
    )
    with caplog.at_level(logging.WARNING), pytest.warns(UserWarning, match="broken"):
        trainer.train()
    assert len(losses(trainer)) == 3
    assert trainer.state.log_history[-2]["broken_samples"] >= 1
    assert "broken.mp4" in (tmp_path / "run" / "broken_samples.jsonl").read_text()


def test_how_times_are_read_is_a_setting(tmp_path, tiny_video):
    rows = Dataset.from_list([{"video": str(tiny_video), "question": "When?", "answer": "red [0:01-0:03]"}] * 2)
    given = {"frame_times": "learned", "frame_times_every": 2.0, "fps": 1.0, "max_steps": 1, "warmup_steps": 0}
    processor, model = tiny_processor(), tiny_model()
    trainer = VideoMa2mbaTrainer(model, settings(tmp_path, **given), train_dataset=rows, processing_class=processor)
    (row,) = trainer.data_collator([rows[0]])["input_ids"].tolist()
    ids = processor.tokenizer.convert_tokens_to_ids(["<|0 m|>", "<|0 s|>", "<|2 s|>", "<|4 s|>", "<|1 s|>"])
    assert [row.count(token) for token in ids] == [3, 1, 1, 1, 0]
    before = model.get_input_embeddings().weight[ids].clone()
    trainer.train()
    moved = (model.get_input_embeddings().weight[ids] != before).any(dim=1)
    assert moved[:4].all(), "they are learnt"
    trainer.save_model(str(tmp_path / "kept"))
    kept = type(processor).from_pretrained(tmp_path / "kept")
    assert (kept.frame_times, kept.frame_times_every) == ("learned", 2.0)
    assert type(model).from_pretrained(tmp_path / "kept").config.frame_times == "learned"
    with pytest.raises(ValueError, match="which adapters do not train: use frame_times=text"):
        make_trainer(tmp_path, frame_times="learned", peft_config=adapters())
    with pytest.raises(ValueError, match="use one of none, text, learned"):
        make_trainer(tmp_path, frame_times="words")
    with pytest.raises(ValueError, match="frame_times_every needs frame_times"):
        settings(tmp_path, frame_times_every=2.0)
