"""The trainer with multi-axis checkpointing learns what the stock Trainer learns without, step by step."""

import pytest
import torch
from tensor_chats import CELLS, TensorChats, collate, losses, make_trainer, tiny_model, weights
from transformers import Trainer, TrainingArguments


def test_fifty_steps_equal_the_stock_trainer_without_checkpointing(tmp_path):
    shared = {
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "max_steps": 50,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    stock = Trainer(
        tiny_model(),
        TrainingArguments(
            str(tmp_path / "stock"),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            **shared,
        ),
        train_dataset=TensorChats(),
        data_collator=collate,
    )
    stock.train()
    ours = make_trainer(tmp_path / "ours", gradient_checkpointing_kwargs=CELLS, vision_learning_rate=None, **shared)
    ours.train()
    assert ours.video_model.model.language_model.engine.last_plan.segment_length == CELLS["segment_length"]
    expected, found = torch.tensor(losses(stock)), torch.tensor(losses(ours))
    assert len(expected) == 50 and expected[-1] < 0.8 * expected[0], "nothing was learned: this shows nothing"
    assert ((found - expected).abs() / expected.abs()).max() <= 1e-5


def test_accumulation_equals_one_large_batch(tmp_path):
    """Samples have different numbers of labels: a mean of means would differ."""
    runs = []
    for samples, steps in ((4, 1), (1, 4)):
        trainer = make_trainer(
            tmp_path / f"{steps}", per_device_train_batch_size=samples, gradient_accumulation_steps=steps, max_steps=3
        )
        trainer.train()
        runs.append((losses(trainer), weights(trainer.model)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)
    for name, value in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], value, rtol=1e-3, atol=1e-4)


def test_scores_are_those_of_the_full_logits(tmp_path):
    """Loss, entropy and accuracy that TRL logs, from labelled positions only, in chunks."""
    trainer = make_trainer(tmp_path)
    model = trainer.video_model
    batch = collate([TensorChats()[3], TensorChats()[6]])
    outputs = model(**batch, fused_lm_head=True)
    labels = batch["labels"][:, 1:]
    plain = {name: value for name, value in batch.items() if name != "labels"}
    spread = model(**plain, logits_to_keep=0).logits[:, :-1].log_softmax(-1)[labels != -100]
    wanted = labels[labels != -100]
    torch.testing.assert_close(outputs.log_probs, spread[torch.arange(len(wanted)), wanted])
    torch.testing.assert_close(outputs.entropy, -(spread.exp() * spread).sum(-1))
    assert torch.equal(outputs.is_top1.bool(), spread.argmax(-1) == wanted)
    assert int(outputs.label_mask.sum()) == len(wanted)

    batch["labels"][:] = -100
    outputs = model(**batch, fused_lm_head=True)
    assert outputs.log_probs.sum() == 0
    outputs.log_probs.sum().backward()
    unreached = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert unreached == set(), "a batch without labels must reach every parameter, or other processes wait for ever"
