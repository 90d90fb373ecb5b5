"""A tiny random model in fp64 with its processor: what is explained must not depend on how it is computed."""

import pytest
import torch


@pytest.fixture(scope="session")
def parts(tiny_checkpoint):
    """Model (2 layers, 4 tokens a frame, chunks of 4 frames, segments of 16 tokens) and processor."""
    from video_ma2mba import VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor

    model = VideoMa2mbaForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float64).eval()
    return model, VideoMa2mbaProcessor.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="session")
def clip():
    """Factory of random videos uint8 (F, 16, 16, 3)."""
    import numpy as np

    return lambda frames, seed=0: np.random.default_rng(seed).integers(0, 256, (frames, 16, 16, 3), dtype=np.uint8)
