"""The retrieval recipe: its values, batches, that it learns, goes on where it stopped, starts from what there is."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from video_ma2mba.trainer.recipe_files import recipe_content
from video_ma2mba.trainer.videomamba import caption_data
from video_ma2mba.trainer.videomamba.caption_data import PairSampler
from video_ma2mba.trainer.videomamba.recipe_run import build_recipe, build_trainer, run_recipe
from video_ma2mba.trainer.videomamba.retrieval_run import starting_retrieval
from video_ma2mba.trainer.videomamba.starting_model import encoder_weights
from video_ma2mba.world.video_files import write_video

CPU = ["use_cpu=true", "report_to=none", "disable_tqdm=true"]

# Rate, epochs, warm-up, weight decay, drop path, hidden patches of clips, of pictures, hidden words' weight, tokens of
# a text, frames. Pre-training is VideoMamba's; data sets of their own are Unmasked Teacher's (base).
STAGES = {
    "masked": (4e-4, 10, 1, 0.05, 0.25, 0.8, 0.5, 1.0, 32, 8),
    "unmasked": (8e-5, 1, 0.2, 0.05, 0.25, 0.0, 0.5, 1.0, 32, 8),
    "msrvtt": (1e-5, 10, 1, 0.02, 0.2, 0.0, 0.5, 0.0, 32, 12),
    "didemo": (2e-5, 12, 1, 0.02, 0.1, 0.0, 0.5, 0.0, 64, 12),
    "anet": (4e-5, 20, 1, 0.02, 0.1, 0.0, 0.5, 0.0, 150, 12),
    "lsmdc": (2e-5, 10, 1, 0.02, 0.2, 0.0, 0.5, 0.0, 96, 12),
    "msvd": (1e-5, 5, 0, 0.02, 0.2, 0.0, 0.5, 0.0, 64, 12),
}


def built(*overrides: str, smoke: bool = False):
    return build_recipe(recipe_content("videomamba/retrieval", [*CPU, *overrides], smoke))


@pytest.mark.parametrize("stage", STAGES)
def test_stages_are_those_that_were_published(stage):
    recipe, args = built(f"stage={stage}", "data=x", "eval_data=x")
    found = (args.learning_rate, args.num_train_epochs, args.warmup_epochs, args.weight_decay, args.drop_path_rate)
    found += (args.mask_ratio, args.picture_mask_ratio, args.mlm_weight, recipe.max_text_length, recipe.num_frames)
    assert found == STAGES[stage]
    assert args.lr_scheduler_kwargs["min_lr"] == pytest.approx(args.learning_rate / 100)
    assert (args.adam_beta1, args.adam_beta2, args.max_grad_norm) == (0.9, 0.999, 0)
    assert (args.vtc_weight, args.vtm_weight, args.uta_weight, args.mlm_probability) == (1, 1, 1, 0.5)
    assert recipe.paragraphs is (stage in ("didemo", "anet")) and recipe.model_size == "m"
    assert args.global_batch_size == (2048 if "masked" in stage else 256)
    assert (args.crop, args.flip, args.mask) == ("gentle", True, "attention")


def test_batches_hold_one_kind():
    pictures = np.arange(23) % 3 == 0  # 8 pictures, 15 videos
    sampler = PairSampler(pictures, seed=0, block=4)
    orders = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        drawn = np.array(list(sampler))
        assert len(drawn) == len(sampler) == 20 and len(set(drawn)) == 20 and (drawn // 23 == epoch).all()
        kinds = pictures[drawn % 23].reshape(5, 4)
        assert (kinds == kinds[:, :1]).all()
        orders.append(drawn % 23)
    assert orders[0].tolist() != orders[1].tolist()
    assert sorted(PairSampler(np.zeros(5, bool), 0, 4)) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="there are only 8 pictures beside others, and a batch of 9"):
        PairSampler(pictures, 0, 9)


@pytest.fixture(scope="module")
def sixteen(tmp_path_factory):
    """A list of 16 videos and 4 pictures, each of colours that its caption names."""
    folder = tmp_path_factory.mktemp("pairs")
    names = ["red", "green", "blue", "white"]
    colours = dict(zip(names, [(200, 30, 30), (30, 200, 30), (40, 40, 220), (240, 240, 240)], strict=True))
    rows = []
    for top in names:
        for bottom in names:
            frame = np.zeros((32, 32, 3), dtype=np.uint8)
            frame[:16], frame[16:] = colours[top], colours[bottom]
            write_video(folder / f"{top}-{bottom}.mp4", [np.stack([frame] * 4)])
            rows.append({"video": f"{top}-{bottom}.mp4", "caption": f"{top} above {bottom}"})
        Image.fromarray(frame).save(folder / f"{top}.png")
        rows.append({"image": f"{top}.png", "caption": f"a picture of {top}"})
    (folder / "all.json").write_text(json.dumps(rows))
    (folder / "videos.json").write_text(json.dumps([row for row in rows if "video" in row]))
    return folder


def test_it_learns_sixteen_pairs_by_heart(sixteen, tmp_path, monkeypatch):
    decoded, kept = caption_data.training_clip, {}  # every frame of a video is the same, and none is augmented

    def training_clip(row, *settings):
        if row.name not in kept:
            kept[row.name] = decoded(row, *settings)
        return kept[row.name]

    monkeypatch.setattr(caption_data, "training_clip", training_clip)
    recipe, args = built(
        *(f"data={sixteen}/videos.json", f"eval_data={sixteen}/videos.json", f"output_dir={tmp_path}", "max_steps=60"),
        *("per_device_train_batch_size=16", "global_batch_size=16", "stage=unmasked", "learning_rate=0.01"),
        *("warmup_epochs=0", "flip=false", "crop=none", "drop_path_rate=0", "logging_steps=60", "max_grad_norm=1"),
        "model_config={hidden_size: 32, num_hidden_layers: 2, state_size: 4, patch_size: 16, image_size: 32, "
        "num_frames: 2, time_step_range: [0.001, 0.1], initializer_range: 0.15}",
        "text_config={hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64, "
        "hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0, initializer_range: 0.1}",
        *("mlm_weight=0", "seed=1"),
        smoke=True,
    )
    trainer = build_trainer(recipe, args)
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_loss"] < 0.1
    assert found["eval_t2v_r1"] == found["eval_v2t_r1"] == 1.0 and found["eval_t2v_median_rank"] == 1.0
    line = next(entry for entry in trainer.state.log_history if "vtm_loss" in entry)
    assert "vtc_loss" in line and not {"mlm_loss", "uta_loss"} & line.keys()
    assert "| t2v_r1 | 1.0000 |" in trainer.card("sixteen")


def test_it_goes_on_where_it_stopped_and_starts_from_what_there_is(sixteen, tmp_path):
    """Clips and pictures with hidden patches beside a teacher; then whole clips of more frames from the result."""
    shared = [f"data={sixteen}/all.json", "eval_share=0", "save_strategy=steps", "save_steps=2", "save_total_limit=3"]
    whole = run_recipe(*built(*shared, f"output_dir={tmp_path}/a", "max_steps=4", smoke=True))
    run_recipe(*built(*shared, f"output_dir={tmp_path}/b", "max_steps=4", smoke=True))
    for name in ("checkpoint-4", "model.safetensors"):
        target = tmp_path / "b" / name
        target.unlink() if target.is_file() else target.rename(tmp_path / "gone")
    recipe, args = built(*shared, f"output_dir={tmp_path}/b", "max_steps=4", "resume=true", smoke=True)
    again = run_recipe(recipe, args)
    log = json.loads((whole / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert {"vtc_loss", "vtm_loss", "mlm_loss", "uta_loss"} <= log[0].keys()
    one, two = (load_file(folder / "model.safetensors") for folder in (whole, again))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert not [name for name in one if "heads" in name or "teacher" in name]
    assert "| optimizer steps | 4 of 4 |" in (again / "README.md").read_text()

    recipe, args = built("stage=unmasked", f"model={whole}", "data=x", smoke=True)
    recipe = type(recipe)(**{**vars(recipe), "model_config": None, "num_frames": 6, "image_size": 32})
    model, tokenizer = starting_retrieval(recipe, 0.1, [])
    assert model.config.vision_config.num_frames == 6 and model.config.vision_config.drop_path_rate == 0.1
    assert torch.equal(model.vision_proj.weight, one["vision_proj.weight"])
    assert model.vision_encoder.temporal_pos_embedding.shape[1] == 6
    assert tokenizer("red above green")["input_ids"][0] == tokenizer.cls_token_id
    config, weights = encoder_weights(str(whole))
    assert config.num_frames == 4 and torch.equal(weights["pos_embed"], one["vision_encoder.pos_embed"])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["teacher_config=null", "teacher=null"], "the recipe names no teacher: add teacher="),
        (["text_config=null"], "the recipe names no BERT: add text_model="),
        (
            ["model_config={hidden_size: 32, num_hidden_layers: 2, patch_size: 16, image_size: 32}"],
            "the teacher sees 16",
        ),
    ],
)
def test_what_cannot_be_trained_is_said(sixteen, tmp_path, overrides, said):
    recipe, args = built(f"data={sixteen}/all.json", f"output_dir={tmp_path}", *overrides, smoke=True)
    with pytest.raises(ValueError, match=said):
        build_trainer(recipe, args)
