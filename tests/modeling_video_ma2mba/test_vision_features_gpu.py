"""Vision rows on a GPU: kept in host memory, memory bounded by one chunk, the CPU's numbers."""

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from video_ma2mba import VideoMa2mbaConfig
from video_ma2mba.modeling_video_ma2mba.recompute_chunks import RowLayout
from video_ma2mba.modeling_video_ma2mba.vision_features import (
    VideoMa2mbaMultiModalProjector,
    freeze_unused_tower_parameters,
    video_rows,
)

pytestmark = pytest.mark.gpu


def parts(device: str, dtype: torch.dtype):
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=112,
        patch_size=14,
    )
    config = VideoMa2mbaConfig(
        {"hidden_size": 256, "num_hidden_layers": 1, "vocab_size": 300},
        vision,
        video_token_id=2,
        vision_chunk_frames=16,
    )
    tower = CLIPVisionModel(vision)
    projector = VideoMa2mbaMultiModalProjector(config)
    freeze_unused_tower_parameters(tower, config)
    return config, tower.to(device, dtype), projector.to(device, dtype)


def frames(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 112, 112), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("place", ["cuda", "cpu"])
def test_gradients_equal_those_of_the_cpu(place):
    found = []
    for device in ("cpu", "cuda"):
        config, tower, projector = parts(device, torch.float32)
        torch.backends.cuda.matmul.allow_tf32 = False
        total = 21 * config.tokens_per_frame + 3
        text_rows = torch.tensor([0, 40, total - 1])
        keep = torch.ones(total, dtype=torch.bool)
        keep[text_rows] = False
        target = torch.device(place if device == "cuda" else "cpu")
        layout = RowLayout(total, target, keep.nonzero()[:, 0], text_rows)
        text = torch.ones(3, 256, device=device, requires_grad=True)
        rows = video_rows(tower, projector, config, frames(21), recompute=True, layout=layout, text=text)
        assert rows.device.type == target.type
        if device == "cuda" and place == "cpu":
            assert rows.is_pinned()
        rows.square().mean().backward()
        found.append([rows.detach().cpu(), text.grad.cpu(), *(p.grad.cpu() for p in projector.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-6)


def test_memory_is_that_of_one_chunk():
    peaks = {}
    for count in (64, 512):
        config, tower, projector = parts("cuda", torch.bfloat16)
        layout = RowLayout(count * config.tokens_per_frame, torch.device("cpu"))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        rows = video_rows(tower, projector, config, frames(count), recompute=True, layout=layout)
        rows.float().sum().backward()
        peaks[count] = torch.cuda.max_memory_allocated() - before
    assert peaks[512] < 1.05 * peaks[64], f"peak bytes by frames: {peaks}"


def test_dropout_on_the_gpu_is_replayed():
    config, tower, projector = parts("cuda", torch.float32)
    tower.train()
    for layer in tower.encoder.layers:
        layer.self_attn.dropout = 0.5
    weight, losses = projector.linear_2.bias, []
    tower_weight = tower.encoder.layers[0].mlp.fc2.bias
    torch.manual_seed(3)
    video_rows(tower, projector, config, frames(9), recompute=True).square().sum().backward()
    expected = tower_weight.grad[0].item()
    for step in (1e-2, -1e-2):
        with torch.no_grad():
            tower_weight[0] += step
        torch.manual_seed(3)
        losses.append(video_rows(tower, projector, config, frames(9), recompute=True).square().sum().item())
        with torch.no_grad():
            tower_weight[0] -= step
    assert weight.grad is not None
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(expected, rel=0.05)
