"""The trainer of clips: its order, rates and losses beside a loop written by hand, and runs that were interrupted."""

import math

import numpy as np
import pytest
import torch
from tiny_clips import WAYS, losses, settings, squares, tiny_clips, tiny_model, trainer_of
from torch.nn import functional as F

from video_ma2mba.trainer.videomamba.augmentation import Augmentation
from video_ma2mba.trainer.videomamba.clip_data import EpochSampler, TestClips, TrainingClips, collate_training
from video_ma2mba.trainer.videomamba.clip_rows import ClipRow, ClipRows
from video_ma2mba.trainer.videomamba.clip_trainer import accuracy, clip_processor, squared_error
from video_ma2mba.trainer.videomamba.smoke_clips import DIRECTIONS, moving_square
from video_ma2mba.trainer.videomamba.starting_model import layer_of, rate_groups


def loss_by_hand(way, model, pixels, labels, teacher):
    """Of a batch, from the definitions of the paper's losses. teacher: what it says of these clips."""
    if way == "masked":  # with everything visible
        found = model(pixels, torch.arange(16).expand(len(pixels), -1))
        return (F.normalize(found, dim=-1) - F.normalize(teacher, dim=-1)).pow(2).sum(-1).mean()
    if way == "classification":
        return F.cross_entropy(model(pixels).logits, labels, label_smoothing=0.1)
    outputs, tokens = model(pixels, align=True)
    apart = (F.normalize(tokens, dim=-1) - F.normalize(teacher, dim=-1)).pow(2).sum(-1).mean()
    return F.cross_entropy(outputs.logits, labels, label_smoothing=0.1) + apart


@pytest.mark.parametrize("way", WAYS)
def test_the_loss_curve_is_that_of_a_loop_by_hand(way, tmp_path):
    """Two micro-batches a step, warm-up and cosine, decay of matrices only, clipping: in fp32, to 1e-5."""
    args = settings(
        *(tmp_path,), gradient_accumulation_steps=2, num_train_epochs=4, warmup_epochs=1, min_learning_rate=1e-3,
        max_grad_norm=1.0, label_smoothing=0.1, per_device_train_batch_size=2, max_steps=6, layer_decay=0.5,
        mask="tube", mask_ratio=0.0,
    )  # fmt: skip
    trainer = WAYS[way](args)
    trainer.train()

    other = WAYS[way](args)
    model, clips, expected, groups = other.model.train(), tiny_clips(args), [], []
    for name, parameter in model.named_parameters():
        free = parameter.ndim == 1 or name.endswith(("bias", "pos_embed", "cls_token", "temporal_pos_embedding"))
        share = 0.5 ** (3 - layer_of(name, 2))
        groups.append({"params": [parameter], "weight_decay": 0.0 if free else 0.1, "share": share})
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon)
    sampler, draws = EpochSampler(8, args.seed), []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        draws += list(sampler)
    warm, total = 2, 6  # a quarter of six steps, rounded up
    for step in range(6):
        if step < warm:
            rate = 1e-2 * step / (warm - 1)
        else:
            rate = 1e-3 + (1e-2 - 1e-3) * 0.5 * (1 + math.cos(math.pi * (step - warm + 1) / (total - warm)))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        whole = 0.0
        for half in range(2):
            at = 4 * step + 2 * half
            batch = collate_training([clips[draw] for draw in draws[at : at + 2]])
            pixels, teacher = batch["pixel_values"], None
            if way == "masked":
                mean, std = (
                    torch.tensor(each).view(3, 1, 1) for each in (model.config.image_mean, model.config.image_std)
                )
                pixels = (pixels / 255 - mean) / std
                teacher = other.objective.teacher(pixels)[0]
            elif way == "distillation":
                teacher = other.objective.teacher(pixels).last_hidden_state
            loss = loss_by_hand(way, model, pixels, batch["labels"], teacher) / 2
            loss.backward()
            whole += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(whole)
    np.testing.assert_allclose(losses(trainer), expected, rtol=0, atol=1e-5)
    for (name, own), by_hand in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(own, by_hand, rtol=0, atol=1e-5, msg=name)


def test_a_resumed_run_is_the_one_that_was_not_interrupted(tmp_path):
    """The order, the augmentation, mixup and drop path are drawn again, whatever the moment."""
    options = {"mixup": 0.8, "cutmix": 1.0, "max_steps": 5, "repeated_augmentation": 2}
    model = {"drop_path_rate": 0.3}
    straight = trainer_of(settings(tmp_path / "a", **options), tiny_model(**model))
    straight.train()
    saving = {"save_strategy": "steps", "save_steps": 3}
    first = trainer_of(settings(tmp_path / "b", **options, **saving), tiny_model(**model))
    first.train()
    (tmp_path / "b" / "checkpoint-5" / "optimizer.pt").unlink()  # what a kill in the middle of saving leaves
    second = trainer_of(settings(tmp_path / "b", **options, **saving), tiny_model(**model))
    second.train(resume_from_checkpoint=True)
    np.testing.assert_allclose(losses(second)[-2:], losses(straight)[-2:], atol=1e-6)
    for own, other in zip(second.model.parameters(), straight.model.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-6)
    entry = next(entry for entry in straight.state.log_history if "loss" in entry)
    assert entry["clips_per_second"] > 0 and 0 <= entry["data_wait_share"] < 1


def test_a_recipe_tells_what_moves_from_what_rests(tmp_path):
    """The whole way: a moving square's direction, which no single frame shows, is learnt in seconds."""
    rng = np.random.default_rng(1)
    clips = [ClipRow(moving_square(DIRECTIONS[n % 4], "white", 4, 16, rng), n % 4) for n in range(16)]
    model = tiny_model(time_step_range=(0.001, 0.1), initializer_range=0.25)  # it takes twice as long without
    args = settings(tmp_path, learning_rate=1e-2, max_steps=36, per_device_train_batch_size=16, logging_steps=36)
    rows = ClipRows(clips, DIRECTIONS)
    trainer = trainer_of(
        *(args, model, rows),
        eval_dataset=TestClips(rows, clip_processor(model.config, args)),
        compute_metrics=accuracy,
    )
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_top1"] > 0.9, found


def test_groups_have_the_rates_of_their_layers():
    model = tiny_model()
    names = dict(model.named_parameters())
    assert layer_of("videomamba.pos_embed", 2) == layer_of("videomamba.patch_embed.proj.weight", 2) == 0
    assert layer_of("videomamba.layers.1.mixer.A_log", 2) == 2 and layer_of("head.weight", 2) == 3
    assert layer_of("base_model.model.videomamba.layers.0.mixer.in_proj.lora_A.default.weight", 2) == 1
    for of in ("layers", "embeddings"):
        groups = rate_groups(names.items(), rate=1.0, weight_decay=0.05, layers=2, layer_decay=0.75, of=of)
        found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
        assert len(found) == len(names)
        middle = 0.75**2 if of == "layers" else 1.0
        assert found[id(names["videomamba.layers.0.mixer.A_log"])] == (middle, 0.05)
        assert found[id(names["videomamba.layers.0.mixer.D"])] == (middle, 0.0)
        assert found[id(names["videomamba.pos_embed"])] == (0.75**3, 0.0)
        assert found[id(names["head.weight"])] == (1.0, 0.05)
        assert groups[0]["lr"] == 1.0


def test_an_epoch_draws_every_row_and_repeats_them_where_asked():
    plain = EpochSampler(10, seed=3)
    first = list(plain)
    plain.set_epoch(1)
    second = list(plain)
    assert sorted(first) == list(range(10)) and sorted(draw % 10 for draw in second) == list(range(10))
    assert [draw // 10 for draw in second] == [1] * 10 and [draw % 10 for draw in second] != first
    repeated = list(EpochSampler(10, seed=3, repeats=3))
    assert len(repeated) == len(set(repeated)) == 10, "copies of a row are augmented apart"
    assert [draw % 10 for draw in repeated] == [row for row in first[:4] for _ in range(3)][:10]


def test_repeats_are_different_clips_of_one_video_and_broken_rows_are_left_out(tmp_path):
    rows = ClipRows([squares(1).rows[0], ClipRow(str(tmp_path / "gone.mp4"), 2)], DIRECTIONS)
    clips = TrainingClips(rows, 4, Augmentation(16), repeats=2, seed=0)
    item = clips[0]
    assert item["pixel_values"].shape == (2, 4, 3, 16, 16) and item["labels"] == 0
    assert (item["pixel_values"][0] != item["pixel_values"][1]).any()
    torch.testing.assert_close(item["pixel_values"], clips[0]["pixel_values"], msg="the same draw is the same clip")
    assert (clips[2]["pixel_values"] != item["pixel_values"]).any(), "another epoch is another clip"
    with pytest.warns(UserWarning, match="left out"):
        assert clips[1]["labels"] == 0
    assert clips.report.broken == 1
    batch = collate_training([clips[0], clips[2]])
    assert batch["pixel_values"].shape == (4, 4, 3, 16, 16) and batch["labels"].tolist() == [0] * 4
    with pytest.raises(ValueError, match="cannot be read"), pytest.warns(UserWarning, match="left out"):
        TrainingClips(ClipRows([rows.rows[1]], DIRECTIONS), 4, Augmentation(16))[0]


def test_scores_are_counted():
    class Evaluated:
        predictions = np.array([[5.0, 1, 0, 0, 0, 0], [9, 8, 7, 6, 5, 4], [0, 1, 2, 3, 4, 5]])
        label_ids = np.array([0, 4, 0])

    assert accuracy(Evaluated) == {"top1": pytest.approx(1 / 3), "top5": pytest.approx(2 / 3)}

    class Values:
        predictions, label_ids = np.array([[1.0], [2.0]]), np.array([0.0, 4.0])

    assert squared_error(Values) == {"mse": pytest.approx(2.5)}


def test_transformers_own_trainer_takes_the_mean_over_the_batches_of_a_step(tmp_path):
    """A forward with keywords would make it take the sum: two batches of four are one of eight."""
    from transformers import Trainer, TrainingArguments

    rows = [{"pixel_values": torch.randn(4, 3, 16, 16), "labels": n % 4} for n in range(8)]
    trained = []
    for batch in (8, 4):
        args = TrainingArguments(
            *(str(tmp_path),), max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=8 // batch,
            optim="sgd", learning_rate=1.0, max_grad_norm=0.0, save_strategy="no", report_to="none", use_cpu=True,
            disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        trainer = Trainer(tiny_model(), args, train_dataset=rows)
        trainer.train()
        trained.append(trainer.model)
    for own, other in zip(*(model.parameters() for model in trained), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-5)
