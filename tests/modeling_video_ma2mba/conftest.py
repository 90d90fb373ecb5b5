"""A tiny model together with its processor; makes `stack_gradients.py` importable."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

sys.path.insert(0, str(Path(__file__).parent))


class Recorder(BaseStreamer):
    """Keeps the tokens that generation streams in `got`, and "end" after the last one."""

    def __init__(self) -> None:
        self.got: list[int | str] = []

    def put(self, value: torch.Tensor) -> None:
        self.got += value.flatten().tolist()

    def end(self) -> None:
        self.got.append("end")


@pytest.fixture(scope="session")
def make_recorder() -> type[Recorder]:
    return Recorder


@pytest.fixture(scope="session")
def make_processor() -> Callable:
    """Factory of processors for a configuration with the byte tokenizer (`<video>` is id 2)."""
    from video_ma2mba import VideoMa2mbaProcessor, VideoMa2mbaVideoProcessor
    from video_ma2mba.processing.byte_tokenizer import build_byte_tokenizer

    def make(config) -> VideoMa2mbaProcessor:
        side = config.vision_config.image_size
        video_processor = VideoMa2mbaVideoProcessor(size={"height": side, "width": side})
        return VideoMa2mbaProcessor(build_byte_tokenizer(), video_processor, tokens_per_frame=config.tokens_per_frame)

    return make


@pytest.fixture(scope="session")
def raw_pixels() -> Callable:
    """Factory of raw pixels at the model's size, `(F, 3, 16, 16)` uint8."""

    def make(frames: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 256, (frames, 3, 16, 16), dtype=torch.uint8, generator=generator)

    return make
