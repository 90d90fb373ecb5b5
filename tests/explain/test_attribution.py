"""Attribution through checkpointing against plain autograd, and occlusion against reading the shortened video."""

import pytest
import torch

from video_ma2mba.explain import attribution, occlusion, relevance
from video_ma2mba.explain.attribution import VideoReading, as_function, frame_sums, integrated_gradients
from video_ma2mba.explain.read_features import read_features
from video_ma2mba.modeling_video_ma2mba.recompute_plan import RecomputeSettings

ANSWER = torch.tensor([70, 71, 0])


def plain(model, prompt, features):
    """Log-probability of ANSWER and its gradient (F, T, D), the whole prompt in one autograd graph."""
    features = features.clone().requires_grad_()
    embed = model.get_input_embeddings()
    parts = [embed(prompt.opening), features.flatten(0, 1), embed(torch.cat([prompt.asked, ANSWER[:-1]]))]
    hidden, _ = model.model.language_model._run_segments(torch.cat(parts)[None], None, _layout(), None)
    scores = model.lm_head(hidden[0, -len(ANSWER) :]).log_softmax(-1)
    total = scores.gather(-1, ANSWER[:, None]).sum()
    return total, torch.autograd.grad(total, features)[0]


def _layout():
    from video_ma2mba.modeling_video_ma2mba.stack_token_layout import TokenLayout

    return TokenLayout()


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 13])
@pytest.mark.parametrize("cell", [(1, 3), (1, 16), (2, 7), (2, 1000)])
def test_gradients_are_those_of_plain_autograd(parts, clip, monkeypatch, frames: int, cell: tuple[int, int]):
    model, processor = parts
    layers, segment = cell
    cut = lambda **_: RecomputeSettings(layers_per_block=layers, segment_length=segment, offload=False)  # noqa: E731
    monkeypatch.setattr("video_ma2mba.explain.attribution.RecomputeSettings", cut)
    prompt = read_features(model, processor, clip(frames), "What is it?")
    assert prompt.features.shape == (frames, 4, 16)
    with as_function(model):
        reading = VideoReading(model, prompt, prompt.features)
        scores = reading.log_probability(ANSWER)
        found = reading.gradient(scores.sum())
    total, expected = plain(model, prompt, prompt.features)
    torch.testing.assert_close(scores.sum(), total.float(), check_dtype=False)
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)
    sums = (expected * prompt.features).sum(dim=(1, 2))
    torch.testing.assert_close(frame_sums(found, prompt.features), sums, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(("memory", "segment"), [(None, 512), ("30MB", 512), ("10MB", None)])
def test_cells_on_a_cpu_are_short_where_their_states_fit(parts, memory: str | None, segment: int | None):
    language = parts[0].model.language_model
    x = torch.zeros(1, 1, 16, dtype=torch.float64).expand(1, 40_000, 16).requires_grad_()
    with as_function(parts[0]):
        found = attribution._settings(language, x, torch.zeros(1, 40_000, dtype=torch.bool), memory)
    assert found.segment_length == segment


def test_features_do_not_depend_on_the_chunks_of_the_tower(parts, clip, monkeypatch):
    model, processor = parts
    whole = model.get_video_features(torch.from_numpy(clip(7)).permute(0, 3, 1, 2)).detach()
    for size in (1, 2, 3, 7, 50):
        monkeypatch.setattr(model.config, "vision_chunk_frames", size)
        seen = []
        prompt = read_features(
            model, processor, clip(7), "What?", on_frames=lambda n, of, seen=seen: seen.append((n, of))
        )
        torch.testing.assert_close(prompt.features.flatten(0, 1), whole)
        assert seen[-1] == (7, 7) and len(seen) == -(-7 // size)


def test_integrated_gradients_add_up_to_the_difference_from_a_still_video(parts, clip):
    model, processor = parts
    prompt = read_features(model, processor, clip(5), "What is it?")
    with as_function(model):
        found = sum(integrated_gradients(model, prompt, ANSWER, 32))
    still = prompt.features.mean(dim=0, keepdim=True).expand(5, -1, -1)
    difference = plain(model, prompt, prompt.features)[0] - plain(model, prompt, still)[0]
    assert abs(difference) > 1e-4
    torch.testing.assert_close(found.sum(), difference.detach(), rtol=0.01, atol=1e-5)


@pytest.mark.parametrize(("frames_out", "rows"), [(1, 3), (1, 50), (2, 1), (3, 2)])
def test_occlusion_equals_reading_the_video_without_the_segment(parts, clip, frames_out: int, rows: int):
    model, processor = parts
    prompt = read_features(model, processor, clip(7), "What is it?")
    found = occlusion(model, prompt, ANSWER, frames_out, rows)
    whole = plain(model, prompt, prompt.features)[0].item()
    expected = []
    for first in range(0, 7, frames_out):
        rest = torch.cat([prompt.features[:first], prompt.features[first + frames_out :]])
        expected.append(whole - plain(model, prompt, rest)[0].item())
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="leaves nothing"):
        occlusion(model, prompt, ANSWER, 7)
    with pytest.raises(ValueError, match="rows=0"):
        occlusion(model, prompt, ANSWER, 1, 0)


def test_the_model_is_left_as_it_was(parts, clip):
    model, processor = parts
    model.train()
    model.model.multi_modal_projector.linear_1.weight.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    try:
        relevance(model, processor, clip(3), "What?", "ab", steps=1)
        assert [p.requires_grad for p in model.parameters()] == before and any(before)
        assert model.training and all(p.grad is None for p in model.parameters())
        assert not any(layer.mixer.in_proj._forward_hooks for layer in model.model.language_model.layers)
    finally:
        model.eval()
        model.model.multi_modal_projector.linear_1.weight.requires_grad_(True)


@pytest.mark.gpu
def test_a_gpu_finds_the_same(tiny_checkpoint, clip):
    from video_ma2mba import VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor

    model = VideoMa2mbaForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    processor = VideoMa2mbaProcessor.from_pretrained(tiny_checkpoint)
    expected = relevance(model, processor, clip(9), "What is it?", "ab", steps=2)
    found = relevance(model.to("cuda"), processor, clip(9), "What is it?", "ab", steps=2)
    for name in ("gradient_x_input", "integrated_gradients", "decay"):
        one, two = torch.from_numpy(getattr(found, name)), torch.from_numpy(getattr(expected, name))
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
    assert relevance(model, processor, clip(9), "What is it?", steps=0, max_new_tokens=4).answer
    prompt = read_features(model, processor, clip(9), "What is it?")
    on_gpu = occlusion(model, prompt, ANSWER, 2, 3)
    torch.testing.assert_close(on_gpu, occlusion(model.to("cpu"), prompt, ANSWER, 2, 3), rtol=1e-3, atol=1e-5)
