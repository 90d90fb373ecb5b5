"""The trainer on a GPU: predicted and reached peak, and a step that really runs out of memory."""

import gc
from unittest.mock import patch

import pytest
import torch
from tensor_chats import VIDEO, losses, settings, tiny_processor

from video_ma2mba import VideoMa2mbaConfig, VideoMa2mbaForConditionalGeneration
from video_ma2mba.modeling_video_ma2mba import mixer_mamba2
from video_ma2mba.modeling_video_ma2mba.ops_registry import force_backend
from video_ma2mba.trainer.video_trainer import VideoMa2mbaTrainer

TOKENS = 24_000

pytestmark = pytest.mark.gpu


class LongChats(torch.utils.data.Dataset):
    """Two frames and many words."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(index)
        ids = torch.cat([torch.full((8,), VIDEO), torch.randint(6, 500, (TOKENS - 8,), generator=draw)])
        pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=draw)
        labels = torch.where(torch.arange(TOKENS) >= TOKENS - 64, ids, -100)
        return {"input_ids": ids[None], "labels": labels[None], "pixel_values_videos": pixels}


def tiny_model_of(layers: int) -> VideoMa2mbaForConditionalGeneration:
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 4, "projection_dim": 16}
    text = {"vocab_size": 512, "hidden_size": 1024, "num_hidden_layers": layers, "pad_token_id": 1}
    return VideoMa2mbaForConditionalGeneration(
        VideoMa2mbaConfig(text_config=text, vision_config=vision, video_token_id=VIDEO)
    )


def run(out) -> VideoMa2mbaTrainer:
    torch.manual_seed(0)
    trainer = VideoMa2mbaTrainer(
        tiny_model_of(layers=6),
        settings(out, use_cpu=False, bf16=True, max_steps=2, per_device_train_batch_size=1, learning_rate=1e-4),
        train_dataset=LongChats(),
        data_collator=lambda items: items[0],
        processing_class=tiny_processor(),
    )
    trainer.train()
    return trainer


def test_a_real_shortage_of_memory_is_survived_with_the_same_losses(tmp_path):
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    free = run(tmp_path / "free")
    assert free._retry.planner.last.plan is None, "without a limit nothing is recomputed"
    assert free._retry.planner.last.segment == 32_768, "and nothing is cut up more than need be"
    logs = [entry for entry in free.state.log_history if "gpu_peak_gb" in entry]
    assert len(logs) == 2
    needed = logs[0]["gpu_peak_gb"] * 1e9
    expected = losses(free)
    del free
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((before + 0.92 * needed) / total)
    try:
        tight = run(tmp_path / "tight")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert tight.throughput.oom_retries == 1, "the second step is planned within what the first one learned"
    assert tight._retry.planner.last.plan is not None
    assert losses(tight) == pytest.approx(expected, rel=0.01)
    for entry in logs:
        assert entry["predicted_peak_gb"] == pytest.approx(entry["gpu_peak_gb"], rel=0.15), entry


def gradients_of(model, ids, backend) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients under autocast and the bytes that autograd keeps."""
    model.zero_grad()
    before = torch.cuda.memory_allocated()
    with force_backend(backend), torch.autocast("cuda", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, kept


def test_master_weights_in_fp32_run_on_the_kernels_too():
    """Under autocast the fused norm serves fp32 weights: the same gradients as PyTorch's, in less memory."""
    torch.manual_seed(0)
    model = tiny_model_of(layers=2).cuda().train()
    ids = torch.randint(6, 500, (1, 3000), device="cuda")
    expected, _ = gradients_of(model, ids, "torch")
    found, kept = gradients_of(model, ids, None)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).norm() / value.norm().clamp(min=1e-6)
        assert error < 0.1, f"{name}: {error:.3f}"
    with patch.object(mixer_mamba2, "_compute_dtype", lambda weight, kind: weight.dtype):
        _, unfused = gradients_of(model, ids, None)
    assert kept < 0.9 * unfused
