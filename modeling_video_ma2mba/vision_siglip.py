"""SigLIP's vision tower: patches only."""

from typing import Any

from .vision_adapter import EncoderTower, TowerAdapter


class SiglipAdapter(TowerAdapter[EncoderTower]):
    """transformers' `SiglipVisionModel`."""

    model_type = "siglip_vision_model"
    no_split_modules = ("SiglipVisionEmbeddings", "SiglipEncoderLayer")
    defaults = {
        **TowerAdapter.defaults, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "vision_use_head": True,
    }  # fmt: skip

    def around_layers(self, vision_config: Any) -> tuple[int, int]:
        width, hidden = vision_config.hidden_size, vision_config.intermediate_size
        pixels = vision_config.num_channels * vision_config.patch_size**2
        below = width * (pixels + 1 + self.patches_per_side(vision_config) ** 2)
        # A probe, attention, a norm and an MLP make up the head.
        head = width + 4 * (width * width + width) + 2 * width + 2 * width * hidden + hidden + width
        return below, 2 * width + (head if vision_config.vision_use_head else 0)

    def head_sides(self, vision_config: Any) -> int:
        width, hidden = vision_config.hidden_size, vision_config.intermediate_size
        return 2 * width + 2 * (width + hidden) if vision_config.vision_use_head else 0
