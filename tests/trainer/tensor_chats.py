"""Tiny training material shared by the trainer's tests and the processes they start: tensors, no files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from video_ma2mba import VideoMa2mbaConfig, VideoMa2mbaForConditionalGeneration
from video_ma2mba.trainer.training_config import VideoMa2mbaTrainingConfig
from video_ma2mba.trainer.video_trainer import VideoMa2mbaTrainer

VIDEO, PER_FRAME, WORDS = 2, 4, (6, 40)
ACCUMULATED = {"max_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
CELLS = {"segment_length": 5, "layers_per_block": 1, "offload": False}  # multi-axis checkpointing, whatever fits


def tiny_model(seed: int = 0) -> VideoMa2mbaForConditionalGeneration:
    """Two layers, 16 wide; frames of 16x16 pixels make 4 tokens."""
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "projection_dim": 16,
    }
    text = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 8, "head_dim": 8}
    text |= {"chunk_size": 8, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = VideoMa2mbaConfig(
            text_config=text,
            vision_config=vision,
            video_token_id=VIDEO,
            vision_chunk_frames=4,
            tie_word_embeddings=False,
        )
        return VideoMa2mbaForConditionalGeneration(config)


class TensorChats(torch.utils.data.Dataset):
    """Items with tensors: a video of 1 to 4 frames, some words, the last ones labelled."""

    def __init__(self, count: int = 16) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(index)
        frames = 1 + index % 4
        words = torch.randint(*WORDS, (8,), generator=draw)
        ids = torch.cat([torch.full((frames * PER_FRAME,), VIDEO), words])
        pixels = torch.randint(0, 256, (frames, 3, 16, 16), dtype=torch.uint8, generator=draw)
        labelled = 2 + index % 5
        labels = torch.where(torch.arange(len(ids)) >= len(ids) - labelled, ids, -100)
        return {"input_ids": ids, "labels": labels, "pixel_values_videos": pixels}


def collate(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Padded on the right."""

    def padded(name: str, fill: int) -> torch.Tensor:
        rows = [item[name] for item in items]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)

    lengths = torch.tensor([len(item["input_ids"]) for item in items])
    ids = padded("input_ids", 1)
    return {
        "input_ids": ids,
        "labels": padded("labels", -100),
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        "pixel_values_videos": torch.cat([item["pixel_values_videos"] for item in items]),
        "num_frames": torch.tensor([len(item["pixel_values_videos"]) for item in items]),
    }


def tiny_processor() -> Any:
    """A processor that fits `tiny_model`; the tests' data come as tensors, so it only gets saved along."""
    from video_ma2mba import VideoMa2mbaProcessor, VideoMa2mbaVideoProcessor
    from video_ma2mba.processing.byte_tokenizer import build_byte_tokenizer

    return VideoMa2mbaProcessor(
        build_byte_tokenizer(),
        VideoMa2mbaVideoProcessor(size={"height": 16, "width": 16}),
        tokens_per_frame=PER_FRAME,
    )


def settings(out: Path | str, **overrides: Any) -> VideoMa2mbaTrainingConfig:
    """Six steps of two samples on the CPU, fp32, logged one by one."""
    fields = {
        "output_dir": str(out),
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "vision_learning_rate": 1e-3,
        "weight_decay": 0.05,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return VideoMa2mbaTrainingConfig(**(fields | overrides))


def make_trainer(out: Path | str, model: Any = None, data: Any = None, **overrides: Any) -> VideoMa2mbaTrainer:
    """A trainer on `TensorChats`; `overrides` are settings, and `peft_config`, `callbacks`, `eval_dataset`."""
    others = {name: overrides.pop(name) for name in ("peft_config", "callbacks", "eval_dataset") if name in overrides}
    return VideoMa2mbaTrainer(
        tiny_model() if model is None else model,
        settings(out, **overrides),
        train_dataset=TensorChats() if data is None else data,
        data_collator=collate,
        processing_class=tiny_processor(),
        **others,
    )


def adapters() -> Any:
    """PEFT's configuration of a recipe's adapters, without dropout."""
    from video_ma2mba.trainer.recipe import Recipe
    from video_ma2mba.trainer.train_run import lora_config

    return lora_config(Recipe(lora_rank=4, lora_dropout=0.0, lora_vision=True))


def losses(trainer: Any) -> list[float]:
    """Every logged training loss."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model: Any) -> dict[str, torch.Tensor]:
    """A copy of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


class FullMemory:
    """Raises OutOfMemoryError where an accelerator would: in one micro-batch, in forward or backward."""

    def __init__(self, model, call: int, backward: bool, times: int = 1) -> None:
        self.call, self.backward, self.times, self.calls = call, backward, times, 0
        self.raised = []
        model.model.register_forward_pre_hook(self.count)
        model.model.multi_modal_projector.register_forward_hook(self)

    def count(self, *_):
        self.calls += 1

    def fail(self, *_):
        if len(self.raised) < self.times:
            self.raised.append(self.calls)
            raise torch.OutOfMemoryError("out of memory (simulated)")

    def __call__(self, module, arguments, output):
        if self.calls >= self.call:
            if not self.backward:
                self.fail()
            elif output.requires_grad:
                output.register_hook(self.fail)
