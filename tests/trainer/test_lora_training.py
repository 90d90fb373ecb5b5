"""Adapters: only they learn, both projections feel them, and they survive merging and a fresh process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tensor_chats import TensorChats, collate, losses, make_trainer, tiny_model, weights

from video_ma2mba.hub_cards.model_card import read_metadata
from video_ma2mba.trainer.recipe import Recipe
from video_ma2mba.trainer.train_run import lora_config

BATCH = collate([TensorChats()[3], TensorChats()[6]])
RELOAD = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from peft import PeftModel
from tensor_chats import TensorChats, collate, tiny_model
batch = {k: v for k, v in collate([TensorChats()[3], TensorChats()[6]]).items() if k != "labels"}
model = PeftModel.from_pretrained(tiny_model(), sys.argv[2]).eval()
with torch.no_grad():
    torch.save(model(**batch, logits_to_keep=0).logits, sys.argv[3])
"""


def logits(model) -> torch.Tensor:
    plain = {name: value for name, value in BATCH.items() if name != "labels"}
    with torch.no_grad():
        return model.eval()(**plain, logits_to_keep=0).logits


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trainer after a few steps with adapters in language model and tower, and the weights it began with."""
    out = tmp_path_factory.mktemp("lora") / "run"
    recipe = Recipe(lora_rank=4, lora_alpha=8, lora_dropout=0.1, lora_vision=True)
    trainer = make_trainer(out, peft_config=lora_config(recipe), save_strategy="steps", save_steps=3, max_steps=6)
    before = weights(trainer.model)
    gradients = set()
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: gradients.add(name))
    trainer.train()
    trainer.save_model()
    return trainer, before, gradients


def test_only_adapters_and_projector_learn(run):
    trainer, before, gradients = run
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert gradients and all("lora_" in n or "modules_to_save" in n for n in gradients)
    for place in ("in_proj.lora_A", "in_proj.lora_B", "out_proj.lora_A", "q_proj.lora_B", "projector.modules_to_save"):
        assert any(place in name for name in gradients), place
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved <= gradients
    assert {n for n, p in trainer.model.named_parameters() if p.requires_grad} == gradients, "nothing waits in vain"


@pytest.mark.parametrize("projection", ["in_proj", "out_proj"])
def test_each_projection_feels_its_adapter(run, projection):
    model = run[0].model
    whole = logits(model)
    factors = [p for n, p in model.named_parameters() if f".{projection}.lora_B" in n and "mixer" in n]
    assert len(factors) == 2
    kept = [p.detach().clone() for p in factors]
    with torch.no_grad():
        for parameter in factors:
            parameter.zero_()
        without = logits(model)
        for parameter, value in zip(factors, kept, strict=True):
            parameter.copy_(value)
    assert (whole - without).abs().max() > 1e-4
    torch.testing.assert_close(logits(model), whole)


def test_merging_and_unmerging_agree(run):
    model = run[0].model
    whole = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), whole, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), whole, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert (logits(model) - whole).abs().max() > 1e-4


def test_a_fresh_process_loads_the_adapter(run, tmp_path):
    trainer = run[0]
    script, result = tmp_path / "reload.py", tmp_path / "logits.pt"
    script.write_text(RELOAD)
    here = os.path.dirname(__file__)
    command = [sys.executable, str(script), here, trainer.args.output_dir, str(result)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=550)
    torch.testing.assert_close(torch.load(result), logits(trainer.model), rtol=1e-4, atol=1e-5)
    merged = PeftModel.from_pretrained(tiny_model(), trainer.args.output_dir).merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(trainer.model), rtol=1e-4, atol=1e-5)


def test_adapters_resume_like_an_uninterrupted_run(run, tmp_path):
    """Dropout included: its random numbers go on, too."""
    trainer = run[0]
    recipe = Recipe(lora_rank=4, lora_alpha=8, lora_dropout=0.1, lora_vision=True)
    again = make_trainer(tmp_path, peft_config=lora_config(recipe), max_steps=6)
    again.train(resume_from_checkpoint=os.path.join(trainer.args.output_dir, "checkpoint-3"))
    assert losses(again)[3:] == pytest.approx(losses(trainer)[3:], rel=1e-5)


def test_card_of_an_adapter(run):
    trainer = run[0]
    trainer.args.base_model = "owner/base"
    trainer.create_model_card()
    readme = Path(trainer.args.output_dir, "README.md")
    metadata = read_metadata(readme)
    assert metadata["base_model"] == "owner/base" and metadata["base_model_relation"] == "adapter"
    assert metadata["library_name"] == "peft"
    assert "| LoRA | rank 4, alpha 8 |" in readme.read_text(encoding="utf-8")
