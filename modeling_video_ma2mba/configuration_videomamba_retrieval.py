"""Configuration of VideoMamba's retrieval model: clips and texts in one space, and a head that matches them."""

from collections.abc import Sequence
from typing import Any

from transformers import BertConfig, PreTrainedConfig

from .configuration_fields import positive_int, require
from .configuration_videomamba import VideoMambaConfig


class VideoMambaRetrievalConfig(PreTrainedConfig):
    """VideoMamba beside a BERT whose last layers look at the clip. Without arguments: as released (M and BERT-base).

    Args:
        vision_config: of the encoder of clips, `VideoMambaConfig` or its fields; tubelets of one frame.
        text_config: of BERT, `BertConfig` or its fields.
        fusion_layers: how many of BERT's last layers have cross-attention to the clip; the others read text alone.
        projection_dim: of the space in which clips and texts are compared.
        initial_temperature: by which similarities are divided, where training begins; it is learnt.
        temperature_range: smallest and largest temperature that training may reach.
        max_text_length: tokens of a text that are read.
    """

    model_type = "videomamba_retrieval"
    sub_configs = {"vision_config": VideoMambaConfig, "text_config": BertConfig}
    has_no_defaults_at_init = False

    def __init__(
        self,
        vision_config: VideoMambaConfig | dict[str, Any] | None = None,
        text_config: BertConfig | dict[str, Any] | None = None,
        fusion_layers: int = 3,
        projection_dim: int = 512,
        initial_temperature: float = 0.07,
        temperature_range: Sequence[float] = (0.001, 0.5),
        max_text_length: int = 32,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        if vision_config is None:
            vision_config = VideoMambaConfig.preset("m")
        if text_config is None or isinstance(text_config, dict):
            text_config = BertConfig(**(text_config or {}))
        self.vision_config: Any = (
            VideoMambaConfig(**vision_config) if isinstance(vision_config, dict) else vision_config
        )
        self.text_config: Any = text_config
        self.fusion_layers = fusion_layers
        self.projection_dim = projection_dim
        self.initial_temperature = initial_temperature
        self.temperature_range = list(temperature_range)
        self.max_text_length = max_text_length
        self.initializer_range = initializer_range
        super().__init__(**kwargs)
        self._check()

    def _check(self) -> None:
        width = self.projection_dim
        require(positive_int(width), "projection_dim", width, "it must be a positive integer")
        layers = self.text_config.num_hidden_layers
        fits = positive_int(self.fusion_layers) and self.fusion_layers < layers
        rule = f"it must be within 1..{layers - 1}: BERT has {layers} layers"
        require(fits, "fusion_layers", self.fusion_layers, rule)
        first, between = self.initial_temperature, self.temperature_range
        fits = len(between) == 2 and 0 < between[0] <= first <= between[1]
        require(fits, "initial_temperature", first, f"it must lie within temperature_range={between}")
        most = self.text_config.max_position_embeddings
        fits = positive_int(self.max_text_length) and 2 < self.max_text_length <= most
        require(fits, "max_text_length", self.max_text_length, f"it must be within 3..{most}, BERT's positions")
        tubelet = self.vision_config.tubelet_size
        require(tubelet == 1, "tubelet_size", tubelet, "a retrieval model's tokens span one frame each")

    @property
    def num_hidden_layers(self) -> int:
        """Blocks of the encoder of clips."""
        return self.vision_config.num_hidden_layers


VideoMambaRetrievalConfig.register_for_auto_class()
