"""transformers' own Trainer with this model, nothing of TRL: losses, scores, the best checkpoint, NEFTune's noise."""

import inspect

import numpy as np
import pytest
import torch
from tensor_chats import PER_FRAME, VIDEO, TensorChats, collate, make_trainer, tiny_model
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from video_ma2mba import VideoMa2mbaForConditionalGeneration


def stock(out, model=None, data=None, metrics=None, **options) -> Trainer:
    fields = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
        "logging_steps": 1,
    }
    return Trainer(
        tiny_model() if model is None else model,
        TrainingArguments(str(out), **(fields | options)),
        train_dataset=data or TensorChats(4),
        eval_dataset=TensorChats(4),
        data_collator=collate,
        compute_metrics=metrics,
    )


def test_evaluation_gives_loss_and_logits(tmp_path):
    seen = {}

    def metrics(found):
        seen["logits"], seen["labels"] = found.predictions, found.label_ids
        return {"hits": 1.0}

    trainer = stock(tmp_path, metrics=metrics)
    result = trainer.evaluate()
    model = trainer.model.eval()
    batches = [collate([TensorChats()[i] for i in pair]) for pair in ((0, 1), (2, 3))]
    with torch.no_grad():
        logits = [model(**{k: v for k, v in batch.items() if k != "labels"}).logits for batch in batches]
    losses = [
        F.cross_entropy(scores[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        for scores, batch in zip(logits, batches, strict=True)
    ]
    assert result["eval_loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert result["eval_hits"] == 1.0
    longest = max(scores.shape[1] for scores in logits)
    assert seen["logits"].shape == (4, longest, 48) and seen["labels"].shape == (4, longest)
    np.testing.assert_allclose(seen["logits"][2:, : logits[1].shape[1]], logits[1].numpy(), atol=1e-5)


def test_the_best_checkpoint_is_loaded(tmp_path):
    trainer = stock(
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    trainer.train()
    assert trainer.state.best_metric == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)


def test_shifted_labels_are_taken_by_keyword(tmp_path):
    names = inspect.signature(VideoMa2mbaForConditionalGeneration.forward).parameters
    assert [name for name in names if "label" in name] == ["labels"]
    model = tiny_model().eval()
    batch = collate([TensorChats()[2]])
    shifted = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    plain = {name: value for name, value in batch.items() if name != "labels"}
    torch.testing.assert_close(model(**plain, shift_labels=shifted).loss, model(**batch).loss)


def test_logits_beside_the_loss_stay_small(monkeypatch):
    from video_ma2mba.modeling_video_ma2mba import modeling_video_ma2mba

    model, batch = tiny_model().eval(), collate([TensorChats()[2]])
    with torch.no_grad():
        assert model(**batch).logits.shape == (*batch["input_ids"].shape, 48)
        monkeypatch.setattr(modeling_video_ma2mba, "MOST_EVALUATED_LOGITS", batch["input_ids"].numel() * 48 - 1)
        assert model(**batch).logits is None
        assert model(**batch, logits_to_keep=0).logits is not None
    assert model(**batch).logits is None, "with gradients nothing of full length exists"


@pytest.mark.parametrize("kind", ["trl", "stock"])
def test_noise_on_the_embeddings_of_a_batch_with_video(tmp_path, kind):
    def losses(**noise):
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path, max_steps=2, **noise) if kind == "trl" else stock(tmp_path, **noise)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    quiet, noisy = losses(), losses(neftune_noise_alpha=5.0)
    assert len(noisy) == 2 and np.isfinite(noisy).all() and noisy != quiet
    assert losses() == quiet


def test_what_hooks_on_the_embedding_see_is_each_rows_text():
    model = tiny_model().train()
    shapes = []

    def double(module: nn.Module, inputs, output):
        shapes.append(tuple(output.shape))
        return output * 2

    items = [TensorChats()[0], TensorChats()[3]]
    items[1]["input_ids"] = items[1]["input_ids"][:-3]  # rows differ in their text, too
    items[1]["labels"] = items[1]["labels"][:-3]
    batch = {name: value for name, value in collate(items).items() if name != "labels"}
    handle = model.get_input_embeddings().register_forward_hook(double)
    hooked = model.model.embed_inputs(batch["input_ids"], batch["pixel_values_videos"])
    handle.remove()
    plain = model.model.embed_inputs(batch["input_ids"], batch["pixel_values_videos"])
    is_video = batch["input_ids"] == VIDEO
    assert is_video.sum() == 5 * PER_FRAME
    torch.testing.assert_close(hooked[~is_video], 2 * plain[~is_video])
    torch.testing.assert_close(hooked[is_video], plain[is_video])
    assert len(shapes) == 1 and len(shapes[0]) == 3 and shapes[0][0] == 2
