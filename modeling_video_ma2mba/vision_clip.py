"""CLIP's vision tower: a class token, and a norm in front of the layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from .vision_adapter import EncoderTower, TowerAdapter

if TYPE_CHECKING:
    from torch import Tensor, nn


class ClipTower(EncoderTower, Protocol):
    """With the norm in front, spelt as in the checkpoints."""

    pre_layrnorm: nn.Module


class ClipAdapter(TowerAdapter[ClipTower]):
    """transformers' `CLIPVisionModel`."""

    model_type = "clip_vision_model"
    image_mean = (0.48145466, 0.4578275, 0.40821073)
    image_std = (0.26862954, 0.26130258, 0.27577711)
    leading_rows = 1
    no_split_modules = ("CLIPVisionEmbeddings", "CLIPEncoderLayer")
    no_decay = ("class_embedding",)
    defaults = {**TowerAdapter.defaults, "patch_size": 32, "hidden_act": "quick_gelu"}

    def used_modules(self, tower: ClipTower, config: Any) -> Iterator[nn.Module]:
        embeddings, *layers = super().used_modules(tower, config)
        yield from (embeddings, tower.pre_layrnorm, *layers)

    def embed(self, tower: ClipTower, pixels: Tensor) -> Tensor:
        return tower.pre_layrnorm(tower.embeddings(pixels))

    def around_layers(self, vision_config: Any) -> tuple[int, int]:
        width, pixels = vision_config.hidden_size, vision_config.num_channels * vision_config.patch_size**2
        places = self.patches_per_side(vision_config) ** 2 + 1
        return width * (1 + pixels + places + 2), 2 * width  # class, patches, places, a norm; a norm
