"""The trainer on a GPU: predicted and reached peak, and a step that really runs out of memory."""

import gc

import pytest
import torch
from tensor_chats import VIDEO, losses, settings, tiny_processor

from video_ma2mba import VideoMa2mbaConfig, VideoMa2mbaForConditionalGeneration
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


def run(out) -> VideoMa2mbaTrainer:
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 4, "projection_dim": 16}
    text = {"vocab_size": 512, "hidden_size": 1024, "num_hidden_layers": 6, "pad_token_id": 1}
    torch.manual_seed(0)
    model = VideoMa2mbaForConditionalGeneration(
        VideoMa2mbaConfig(text_config=text, vision_config=vision, video_token_id=VIDEO)
    )
    trainer = VideoMa2mbaTrainer(
        model,
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
