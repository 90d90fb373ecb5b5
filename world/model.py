"""The small model that is trained on the rendered world: sizes, configuration and processor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from ..modeling_video_ma2mba.configuration_video_ma2mba import VideoMa2mbaConfig
from ..modeling_video_ma2mba.modeling_video_ma2mba import VideoMa2mbaForConditionalGeneration
from ..modeling_video_ma2mba.vision_towers import tower_adapter
from ..processing.byte_tokenizer import VIDEO_TOKEN

# Chosen from the colours of the world: its frames are dark with a few bright spots, unlike CLIP's photographs.
PIXEL_MEAN = (0.25, 0.25, 0.25)
PIXEL_STD = (0.2, 0.2, 0.2)
_SLOWEST, _FASTEST = 0.004, 8.0  # decay rates A; a token multiplies a head's memory by exp(-A * step size)


@dataclass(frozen=True)
class WorldModelSize:
    """Widths and depths. `frame` and `patch` are in pixels; a VideoMamba tower looks at `clip` frames together."""

    hidden: int = 384
    layers: int = 7
    state: int = 128
    head: int = 64
    chunk: int = 128
    vision_hidden: int = 192
    vision_layers: int = 3
    vision_heads: int = 4
    videomamba_layers: int = 4
    clip: int = 4
    frame: int = 64
    patch: int = 8


SIZES = {
    "bundled": WorldModelSize(),
    "tiny": WorldModelSize(
        hidden=32, layers=2, state=16, head=16, vision_hidden=32, vision_layers=1, vision_heads=2, videomamba_layers=1
    ),
}
TOWERS = ("vit", "videomamba")


def _vision_config(size: WorldModelSize, tower: str) -> dict[str, Any]:
    sizes = {"hidden_size": size.vision_hidden, "image_size": size.frame, "patch_size": size.patch}
    if tower == "videomamba":
        layers = {"num_hidden_layers": size.videomamba_layers, "num_frames": size.clip}
        start = {"time_step_range": (0.001, 0.1), "initializer_range": size.vision_hidden**-0.5}  # from nothing
        return {"model_type": "videomamba", **sizes, **layers, **start}
    return {
        "model_type": "clip_vision_model",
        **sizes,
        "intermediate_size": 4 * size.vision_hidden,
        "num_hidden_layers": size.vision_layers,
        "num_attention_heads": size.vision_heads,
        "projection_dim": size.vision_hidden,
    }


def world_config(size: WorldModelSize, tokenizer: PreTrainedTokenizerFast, tower: str = "vit") -> VideoMa2mbaConfig:
    """Configuration of the small model with one of `TOWERS`; the embedding is padded to a multiple of 16 rows."""
    return VideoMa2mbaConfig(
        text_config={
            "vocab_size": -(-len(tokenizer) // 16) * 16,
            "hidden_size": size.hidden,
            "num_hidden_layers": size.layers,
            "state_size": size.state,
            "head_dim": size.head,
            "chunk_size": size.chunk,
            "initializer_range": 0.02,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config=_vision_config(size, tower),
        video_token_id=tokenizer.convert_tokens_to_ids(VIDEO_TOKEN),
        vision_feature_layer=-1,
        image_mean=PIXEL_MEAN,
        image_std=PIXEL_STD,
        vision_chunk_frames=64,
        tie_word_embeddings=False,  # inputs as loud as the rows of frames, outputs as small as a softmax wants
    )


@torch.no_grad()
def start_for_recall_(model: VideoMa2mbaForConditionalGeneration) -> None:
    """Initialise what decides how soon a small model learns to remember, in place.

    Mamba-2's usual start forgets within about 1,000 tokens at best, less than a video here; so the heads of each
    layer get decay rates A spread evenly over orders of magnitude, from keeping everything to keeping a few tokens.
    Positions in the frame start as loud as its content: they are half of what a question about motion needs. Words
    and rows of frames enter as loud as what the mixers add to them; at 0.02, the usual start, they drown in it.
    """
    for layer in model.model.language_model.layers:
        rates = layer.mixer.A_log
        rates.copy_(torch.linspace(math.log(_SLOWEST), math.log(_FASTEST), rates.numel()))
    for positions in tower_adapter(model.config.vision_config).position_embeddings(model.model.vision_tower):
        positions.normal_(0.0, 0.2)
    model.get_input_embeddings().weight.normal_(0.0, 0.5)
    projector = model.model.multi_modal_projector
    for linear in (projector.linear_1, projector.linear_2):
        linear.weight.normal_(0.0, linear.in_features**-0.5)


@torch.no_grad()
def fit_projector_(model: VideoMa2mbaForConditionalGeneration, features: torch.Tensor) -> None:
    """Make the projector read `features` (..., W), a sample of what the tower gives, as if they were standardised."""
    linear = model.model.multi_modal_projector.linear_1
    features = features.flatten(0, -2).float()
    mean, spread = features.mean(0), features.std(0).clamp(min=1e-3)
    linear.weight.div_(spread)
    linear.bias.sub_(linear.weight @ mean)


def world_processor(config: VideoMa2mbaConfig, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The processor that belongs to `world_config`."""
    from ..processing.processing_video_ma2mba import VideoMa2mbaProcessor
    from ..processing.video_processing_video_ma2mba import VideoMa2mbaVideoProcessor

    side = config.vision_config.image_size
    video_processor = VideoMa2mbaVideoProcessor(
        size={"height": side, "width": side},
        image_mean=config.image_mean,
        image_std=config.image_std,
    )
    return VideoMa2mbaProcessor(
        video_processor=video_processor,
        tokenizer=tokenizer,
        tokens_per_frame=config.tokens_per_frame,
        frame_times=config.frame_times,
        frame_times_every=config.frame_times_every,
    )
