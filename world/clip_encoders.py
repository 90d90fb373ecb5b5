"""Fresh VideoMambas that learn from the rendered world's clips at once, and what reads clips for them."""

from __future__ import annotations

from typing import Any

import torch

from ..modeling_video_ma2mba.configuration_videomamba import VideoMambaConfig
from ..modeling_video_ma2mba.modeling_videomamba import VideoMambaModel
from ..processing.video_processing_videomamba import VideoMambaVideoProcessor
from .model import PIXEL_MEAN, PIXEL_STD

FRAME, SECONDS = 64, 8  # pixels of a side; a clip has a frame of every second


def eager_config(**fields: Any) -> VideoMambaConfig:
    """Of `hidden_size` and other fields; with weights that small models learn from, instead of the released start."""
    defaults = {
        "image_size": FRAME,
        "num_frames": SECONDS,
        # The class token stands before the first frame: at the released start it would not see the second one.
        "time_step_range": (0.001, 0.1),
        "initializer_range": fields["hidden_size"] ** -0.5,
        "image_mean": PIXEL_MEAN,
        "image_std": PIXEL_STD,
    }
    return VideoMambaConfig(**{**defaults, **fields})


def loud_positions_(encoder: VideoMambaModel) -> None:
    """Positions as loud as the content: half of what motion is about, and next to nothing in a fresh model."""
    with torch.no_grad():
        encoder.pos_embed.normal_(0.0, 0.2)
        encoder.temporal_pos_embedding.normal_(0.0, 0.2)


def clip_processor() -> VideoMambaVideoProcessor:
    """Reads videos as clips of the rendered world are."""
    return VideoMambaVideoProcessor(
        size=FRAME, num_frames=SECONDS, image_mean=list(PIXEL_MEAN), image_std=list(PIXEL_STD)
    )
