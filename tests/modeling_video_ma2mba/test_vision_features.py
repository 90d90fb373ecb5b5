"""Vision rows: equal to transformers' towers, independent of chunking, exact gradients under recomputation."""

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from video_ma2mba.modeling_video_ma2mba.configuration_video_ma2mba import VideoMa2mbaConfig
from video_ma2mba.modeling_video_ma2mba.recompute_chunks import RowLayout
from video_ma2mba.modeling_video_ma2mba.vision_features import (
    VideoMa2mbaMultiModalProjector,
    encode_frames,
    freeze_unused_tower_parameters,
    normalise_pixels,
    video_rows,
)

TINY_TOWER = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 20,
    "patch_size": 4,
}


def make_parts(kind: str = "clip", **config_fields):
    """A 5x5-patch tower (odd on purpose: pooling rounds up to 3x3 = 9 tokens) and a projector, fp64."""
    torch.manual_seed(0)
    config_class, model_class = {
        "clip": (CLIPVisionConfig, CLIPVisionModel),
        "siglip": (SiglipVisionConfig, SiglipVisionModel),
    }[kind]
    config = VideoMa2mbaConfig(
        text_config={"hidden_size": 10, "num_hidden_layers": 1, "head_dim": 5, "state_size": 4, "vocab_size": 20},
        vision_config=config_class(**TINY_TOWER),
        video_token_id=3,
        vision_chunk_frames=4,
        **config_fields,
    )
    tower = model_class(config.vision_config).double().eval()
    projector = VideoMa2mbaMultiModalProjector(config).double()
    freeze_unused_tower_parameters(tower, config)
    return config, tower, projector


def raw_frames(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("layer", [-2, -1, 0, 2])
def test_features_equal_the_hidden_states_of_transformers(kind, layer):
    config, tower, _ = make_parts(kind, vision_feature_layer=layer)
    pixels = torch.randn(3, 3, 20, 20, dtype=torch.float64)
    with torch.no_grad():
        ours = encode_frames(tower, config, pixels)
        hidden = tower(pixels, output_hidden_states=True).hidden_states[layer]
        patches = hidden[:, 1:] if kind == "clip" else hidden
        grid = patches.view(3, 5, 5, 12).permute(0, 3, 1, 2)
        theirs = F.interpolate(grid, size=(3, 3), mode="bilinear").permute(0, 2, 3, 1).reshape(3, 9, 12)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_layers_above_the_wanted_one_do_not_run():
    config, tower, _ = make_parts()
    ran = []
    for index, layer in enumerate(tower.encoder.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    encode_frames(tower, config, raw_frames(1))
    assert ran == [0, 1]


def test_average_pooling_and_no_pooling():
    config, tower, _ = make_parts(spatial_pool_mode="average")
    pixels = torch.randn(2, 3, 20, 20, dtype=torch.float64)
    with torch.no_grad():
        pooled = encode_frames(tower, config, pixels)
        config.spatial_pool_stride = 1
        patches = encode_frames(tower, config, pixels)
    assert patches.shape == (2, 25, 12)
    torch.testing.assert_close(pooled[:, 0], patches[:, [0, 1, 5, 6]].mean(1))
    torch.testing.assert_close(pooled[:, -1], patches[:, 24])  # the odd corner is alone in its window


def test_raw_pixels_are_scaled_and_normalised_as_the_clip_processor_does():
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    config, _, _ = make_parts()
    pixels = raw_frames(2)
    theirs = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)(list(pixels), return_tensors="pt")
    ours = normalise_pixels(pixels, config, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(ours, theirs["pixel_values"].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frames", [1, 3, 4, 5, 9])
def test_chunks_do_not_change_the_rows(frames):
    config, tower, projector = make_parts()
    with torch.no_grad():
        chunked = video_rows(tower, projector, config, raw_frames(frames), recompute=True)
        whole = projector(encode_frames(tower, config, raw_frames(frames))).flatten(0, 1)
    assert chunked.shape == (frames * config.tokens_per_frame, 10)
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frames", [1, 5, 7])
@pytest.mark.parametrize(
    ("frozen", "among_text"),
    [(f, t) for f in ("nothing", "tower", "projector", "both") for t in (False, True) if (f, t) != ("both", False)],
)
def test_recomputed_gradients_equal_plain_autograd(frozen, frames, among_text):
    config, tower, projector = make_parts()
    config.vision_chunk_frames = 12  # 3 frames a chunk when the tower trains
    tower.requires_grad_(frozen not in ("tower", "both"))
    freeze_unused_tower_parameters(tower, config)
    projector.requires_grad_(frozen not in ("projector", "both"))
    rows = frames * config.tokens_per_frame
    layout, text = None, None
    if among_text:
        total = rows + 5
        text_rows = torch.tensor([0, 2, 9, total - 2, total - 1])  # text also inside the run of features
        keep = torch.ones(total, dtype=torch.bool)
        keep[text_rows] = False
        layout = RowLayout(total, torch.device("cpu"), keep.nonzero()[:, 0], text_rows)
        text = torch.randn(5, 10, dtype=torch.float64, requires_grad=True)
    parameters = [p for p in [*tower.parameters(), *projector.parameters()] if p.requires_grad]
    asked = parameters + ([text] if among_text else [])
    results = []
    for recompute in (False, True):
        out = video_rows(tower, projector, config, raw_frames(frames), recompute=recompute, layout=layout, text=text)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        results.append((out.detach(), torch.autograd.grad((out * weight).sum(), asked)))
    (plain, plain_grads), (again, again_grads) = results
    torch.testing.assert_close(again, plain, rtol=1e-12, atol=1e-12)
    for ours, expected in zip(again_grads, plain_grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)


def test_gradient_with_respect_to_normalised_pixels():
    config, tower, projector = make_parts()
    grads = []
    for recompute in (False, True):
        pixels = torch.linspace(-1, 1, 3 * 3 * 400, dtype=torch.float64).view(3, 3, 20, 20).requires_grad_()
        video_rows(tower, projector, config, pixels, recompute=recompute).square().sum().backward()
        grads.append(pixels.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-10, atol=1e-12)


def test_recomputation_replays_dropout():
    config, tower, projector = make_parts()
    tower.train()
    for layer in tower.encoder.layers:
        layer.self_attn.dropout = 0.5
    torch.manual_seed(3)
    rows = video_rows(tower, projector, config, raw_frames(3), recompute=True)
    after_forward = torch.get_rng_state()
    rows.square().sum().backward()
    assert torch.equal(torch.get_rng_state(), after_forward), "backward must not advance the random state"
    ours = projector.linear_1.weight.grad.clone()

    projector.zero_grad()
    torch.manual_seed(3)
    plain = [projector(encode_frames(tower, config, frame)) for frame in raw_frames(3).split(1)]
    torch.cat(plain).square().sum().backward()
    torch.testing.assert_close(ours, projector.linear_1.weight.grad, rtol=1e-5, atol=1e-6)


def test_every_parameter_gets_its_gradient_once_per_backward():
    config, tower, projector = make_parts()
    calls = []
    for parameter in [*tower.parameters(), *projector.parameters()]:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: calls.append(id(p)))
    video_rows(tower, projector, config, raw_frames(5), recompute=True).sum().backward()
    assert len(calls) == len(set(calls))
    expected = {id(p) for p in [*tower.parameters(), *projector.parameters()] if p.requires_grad}
    assert set(calls) == expected, "a trainable parameter without a gradient stops DDP"


def test_half_precision_gradients_are_summed_in_fp32():
    config, tower, projector = make_parts()
    exact = {}
    video_rows(tower, projector, config, raw_frames(64), recompute=True).sum().backward()
    for name, parameter in projector.named_parameters():
        exact[name], parameter.grad = parameter.grad.clone(), None
    tower.bfloat16(), projector.bfloat16()
    video_rows(tower, projector, config, raw_frames(64), recompute=True).sum().backward()
    # d sum / d bias of the last layer is the number of rows: 576, which a bf16 running sum of 64 chunks cannot reach
    assert projector.linear_2.bias.grad.tolist() == exact["linear_2.bias"].tolist() == [576.0] * 10


def test_autocast_is_restored_in_backward():
    config, tower, projector = make_parts()
    tower.float(), projector.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = video_rows(tower, projector, config, raw_frames(2), recompute=True)
        plain = video_rows(tower, projector, config, raw_frames(2), recompute=False)
    assert rows.dtype == plain.dtype == torch.bfloat16
    assert torch.equal(rows, plain)
    rows.float().square().sum().backward()
    ours = projector.linear_1.weight.grad.clone()
    projector.zero_grad()
    plain.float().square().sum().backward()
    torch.testing.assert_close(ours, projector.linear_1.weight.grad, rtol=2e-2, atol=2e-2)


def test_bad_pixels_are_errors_that_say_what_is_wrong():
    config, tower, projector = make_parts()
    good = torch.randn(2, 3, 20, 20)
    holed = good.clone()
    holed[1, 2, 3, 4] = float("nan")
    for pixels, message in [
        (holed, "NaN"),
        (good[:, :1], "shape"),
        (good[0], "shape"),
        (good.to(torch.int64), "uint8"),
    ]:
        with pytest.raises(ValueError, match=message):
            video_rows(tower, projector, config, pixels, recompute=False)
