"""SigLIP's vision tower: patches only."""

from .vision_adapter import EncoderTower, TowerAdapter


class SiglipAdapter(TowerAdapter[EncoderTower]):
    """transformers' `SiglipVisionModel`."""

    model_type = "siglip_vision_model"
    no_split_modules = ("SiglipVisionEmbeddings", "SiglipEncoderLayer")
