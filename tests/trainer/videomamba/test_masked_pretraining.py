"""Masks by their properties, the alignment beside transformers' own CLIP, and what the student computes and learns."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from video_ma2mba.modeling_video_ma2mba.configuration_videomamba import VideoMambaConfig
from video_ma2mba.modeling_video_ma2mba.modeling_videomamba import VideoMambaModel
from video_ma2mba.trainer.recipe_files import recipe_content
from video_ma2mba.trainer.videomamba.masked_pretraining import (
    MASKS,
    ClipTeacher,
    MaskedAlignment,
    MaskedVideoMamba,
    sine_positions,
    visible_patches,
)
from video_ma2mba.trainer.videomamba.recipe_run import build_recipe
from video_ma2mba.trainer.videomamba.self_distillation import cosine_distance
from video_ma2mba.trainer.videomamba.training_settings import VideoMambaTrainingConfig

FRAMES, SIDE = 4, 7


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    config = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
                              image_size=32, patch_size=8, projection_dim=12)  # fmt: skip
    return CLIPVisionModelWithProjection(config)


def student(before: bool, layers: int = 1, **fields) -> MaskedVideoMamba:
    torch.manual_seed(1)
    config = VideoMambaConfig(hidden_size=16, num_hidden_layers=3, state_size=4, image_size=32, patch_size=8,
                              num_frames=FRAMES, **fields)  # fmt: skip
    return MaskedVideoMamba(VideoMambaModel(config), 12, layers, before)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.65, 0.8, 0.85])
@pytest.mark.parametrize("kind", MASKS)
def test_masks_hide_exactly_what_they_should(kind, ratio):
    attention = torch.rand(5, FRAMES, SIDE**2)
    found = visible_patches(kind, 5, FRAMES, SIDE, ratio, attention=attention)
    assert (found.diff(dim=1) > 0).all(), "the order is kept and nothing comes twice"
    assert found.min() >= 0 and found.max() < FRAMES * SIDE**2
    seen = torch.zeros(5, FRAMES * SIDE**2, dtype=torch.bool).scatter_(1, found, True).view(5, FRAMES, SIDE, SIDE)
    places = SIDE**2
    if kind == "random":
        assert (seen.sum((1, 2, 3)) == FRAMES * places - int(FRAMES * places * ratio)).all()
    elif kind == "tube":
        assert (seen == seen[:, :1]).all() and (seen[:, 0].sum((1, 2)) == places - int(places * ratio)).all()
    elif kind == "attention":
        assert (seen.sum((2, 3)) == places - int(places * ratio)).all()
    else:
        assert (seen == seen[..., :1]).all(), "rows are whole"
        rows = seen[..., 0]
        if kind == "frame_row":
            assert (rows.sum(2) == SIDE - int(SIDE * ratio)).all()
        else:
            assert (rows.sum((1, 2)) == FRAMES * (SIDE - int(SIDE * ratio))).all()


def test_masks_differ_between_clips_and_the_attention_guided_one_follows_the_teacher():
    for kind in MASKS:
        found = visible_patches(kind, 8, FRAMES, SIDE, 0.5, attention=torch.ones(8, FRAMES, SIDE**2))
        assert len({tuple(row.tolist()) for row in found}) == 8, kind
    weights = torch.ones(4)
    weights[2] = 5.0  # one of four patches is looked at five times as much: drawn first in 5 of 8 cases
    found = visible_patches("attention", 4000, 1, 2, 0.75, attention=weights.expand(4000, 1, 4))
    shares = np.bincount(found.flatten(), minlength=4) / 4000
    np.testing.assert_allclose(shares, [1 / 8, 1 / 8, 5 / 8, 1 / 8], atol=0.03)
    for arguments, message in (
        ({"kind": "x"}, "mask='x' is not valid"),
        ({"kind": "attention"}, "needs the teacher's attention"),
        ({"kind": "frame_row", "ratio": 1.0}, "leaves nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            visible_patches(**{"batch": 1, "frames": 2, "side": 3, "ratio": 0.5, **arguments})


def test_the_teacher_is_transformers_clip(clip):
    pixels = torch.randn(2, FRAMES, 3, 32, 32)
    features, attention = ClipTeacher(clip, 2)(pixels)
    assert features.shape == (2, 2, 1 + FRAMES * 16, 12) and attention.shape == (2, FRAMES, 16)
    clip.set_attn_implementation("eager")
    own = clip(pixel_values=pixels.flatten(0, 1), output_hidden_states=True, output_attentions=True)
    clip.set_attn_implementation("sdpa")
    mapped = (own.last_hidden_state @ clip.visual_projection.weight.T).view(2, FRAMES, 17, 12)
    torch.testing.assert_close(features[-1, :, 1:], mapped[:, :, 1:].flatten(1, 2))
    torch.testing.assert_close(features[-1, :, 0], mapped[:, :, 0].mean(1))
    wanted = own.attentions[-1].mean(1)[:, 0, 1:].view(2, FRAMES, 16)
    torch.testing.assert_close(attention, wanted, atol=1e-6, rtol=1e-5)


def test_with_everything_visible_the_student_is_the_encoder():
    pixels = torch.randn(2, FRAMES, 3, 32, 32)
    whole = torch.arange(FRAMES * 16).expand(2, -1)
    after = student(before=False).eval()
    expected = after.videomamba(pixels).last_hidden_state + after.positions
    torch.testing.assert_close(after(pixels, whole)[0], after.heads[0](expected))
    before = student(before=True).eval()
    tokens = before.videomamba.embed(pixels)
    residual, delta = before.videomamba.run_blocks(tokens, layers=2)
    torch.testing.assert_close(before(pixels, whole)[0], before.heads[0](residual + delta + before.positions))
    assert sine_positions(3, 4)[1].tolist() == pytest.approx([np.sin(1), np.cos(1), np.sin(0.01), np.cos(0.01)])
    for fields, message in (({"scan_order": "temporal_first"}, "spatial_first"), ({"tubelet_size": 2}, "tubelet")):
        with pytest.raises(ValueError, match=message):
            student(before=True, **fields)
    with pytest.raises(ValueError, match="align_layers=4 is not valid"):
        student(before=True, layers=4)


def test_only_visible_tokens_are_computed():
    """What is hidden has no influence, and blocks see no more than what is visible."""
    model, pixels = student(before=True).eval(), torch.randn(2, FRAMES, 3, 32, 32)
    visible = visible_patches("attention", 2, FRAMES, 4, 0.8, attention=torch.ones(2, FRAMES, 16))
    seen = []
    hook = model.videomamba.layers[0].mixer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    found = model(pixels, visible)
    hook.remove()
    assert seen == [(2, 1 + FRAMES * (16 - 12), 16)] and found.shape == (1, 2, 17, 12)
    hidden = torch.ones(2, FRAMES * 16, dtype=torch.bool).scatter_(1, visible, False).view(2, FRAMES, 4, 4)
    mask = hidden.repeat_interleave(8, 2).repeat_interleave(8, 3)[:, :, None]
    torch.testing.assert_close(model(torch.where(mask, 9.0, pixels), visible), found)


@pytest.mark.parametrize(("before", "layers"), [(True, 1), (False, 2)])
def test_the_loss_falls_and_the_teacher_stays(before, layers, clip, tmp_path):
    model = student(before, layers)
    args = VideoMambaTrainingConfig(str(tmp_path), mask="random", mask_ratio=0.5, report_to="none")
    objective = MaskedAlignment(args, model.config, ClipTeacher(clip, layers))
    kept = [parameter.clone() for parameter in clip.parameters()]
    batch = {"pixel_values": torch.randint(256, (4, FRAMES, 3, 32, 32), dtype=torch.uint8)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(12):
        loss, _ = objective.loss(model, batch, 0.0)
        loss.backward()
        if not losses:
            without = {name for name, p in model.named_parameters() if p.grad is None}
            last = ("videomamba.layers.2.", "videomamba.norm_f.")
            expected = {name for name, _ in model.named_parameters() if name.startswith(last)} if before else set()
            assert without == expected, "the last mixer and the last norms learn where the stream after it is aligned"
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(*pair) for pair in zip(kept, clip.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in clip.parameters())


def test_distances_and_the_recipe_are_those_of_the_paper():
    found, wanted = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    cosine = F.cosine_similarity(found, wanted, dim=-1)
    torch.testing.assert_close(cosine_distance(found, wanted), (2 - 2 * cosine).mean())
    content = recipe_content("videomamba/masked", ["data=x", "use_cpu=true", "report_to=none"])
    recipe, args = build_recipe(content)
    assert (recipe.model_size, recipe.num_frames, recipe.image_size) == ("m", 8, 224)
    assert (args.mask, args.mask_ratio, args.align_layers, args.align_before_last_mixer) == ("attention", 0.8, 1, True)
    assert (args.adam_beta1, args.adam_beta2, args.weight_decay, args.drop_path_rate) == (0.9, 0.95, 0.05, 0.4)
    assert (args.num_train_epochs, args.warmup_epochs, args.crop, args.flip) == (800, 40, "scales", True)
    assert args.learning_rate == pytest.approx(1.2e-3) and args.clips_a_step == 2048
    assert args.lr_scheduler_kwargs["min_lr"] == pytest.approx(1e-5)
