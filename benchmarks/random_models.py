"""Models of the paper's sizes with random weights, the same for every script beside this one."""

from typing import Any

import torch
from torch import nn

from video_ma2mba import VideoMa2mbaProcessor, VideoMa2mbaVideoProcessor
from video_ma2mba.conversion.compose import PRESETS as SIZES
from video_ma2mba.modeling_video_ma2mba.configuration_video_ma2mba import Ma2mbaTextConfig, VideoMa2mbaConfig
from video_ma2mba.modeling_video_ma2mba.modeling_video_ma2mba import VideoMa2mbaForConditionalGeneration
from video_ma2mba.modeling_video_ma2mba.stack_language_model import Ma2mbaTextModel
from video_ma2mba.processing.byte_tokenizer import VIDEO_TOKEN, build_byte_tokenizer

__all__ = ["SIZES", "TINY_TOWER", "processor_of", "round_weights_", "text_config", "text_model", "video_model"]

TINY_TOWER = {"model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 2}  # fmt: skip
"""Vision configuration for measurements of the language model alone."""


def text_config(size: str, **settings: Any) -> Ma2mbaTextConfig:
    """Configuration of a language model of `SIZES`, but for `settings`."""
    width, layers = SIZES[size]
    return Ma2mbaTextConfig(**{"hidden_size": width, "num_hidden_layers": layers, **settings})


def round_weights_(model: nn.Module, dtype: torch.dtype) -> None:
    """Weights in `dtype`, in place; step-size and decay parameters stay in fp32, as `from_pretrained` keeps them."""
    for name, parameter in model.named_parameters():
        if not name.endswith(("A_log", "D", "dt_bias")):
            parameter.data = parameter.data.to(dtype)


def text_model(size: str, dtype: torch.dtype = torch.bfloat16, device: Any = "cuda") -> Ma2mbaTextModel:
    """A language model without its head, in evaluation mode."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Ma2mbaTextModel(text_config(size))
    round_weights_(model, dtype)
    return model.eval()


def video_model(
    size: str,
    dtype: torch.dtype = torch.bfloat16,
    device: Any = "cuda",
    text: dict[str, Any] | None = None,
    **settings: Any,
) -> VideoMa2mbaForConditionalGeneration:
    """A whole model with the byte tokenizer's placeholder, in evaluation mode.

    Args:
        text: settings of the language model other than those of its size.
        settings: of `VideoMa2mbaConfig`; the tower is CLIP ViT-L/14-336 unless they say otherwise.
    """
    settings.setdefault("video_token_id", build_byte_tokenizer().convert_tokens_to_ids(VIDEO_TOKEN))
    torch.manual_seed(0)
    with torch.device(device):
        model = VideoMa2mbaForConditionalGeneration(
            VideoMa2mbaConfig(text_config=text_config(size, **(text or {})), **settings)
        )
    round_weights_(model, dtype)
    return model.eval()


def processor_of(config: VideoMa2mbaConfig) -> VideoMa2mbaProcessor:
    """The processor of a model made here: byte tokenizer, frames of the tower's size."""
    side = config.vision_config.image_size
    frames = VideoMa2mbaVideoProcessor(size={"height": side, "width": side})
    return VideoMa2mbaProcessor(build_byte_tokenizer(), frames, tokens_per_frame=config.tokens_per_frame)
