"""Configuration of VideoMamba, the attention-free video encoder of Li et al. (arXiv 2403.06977)."""

from typing import Any

from transformers import PreTrainedConfig

from .configuration_videomamba_sizes import VideoMambaSizes

# Layers and width of the paper's sizes. B is published for images only: on videos it overfits.
PRESETS = {"ti": (24, 192), "s": (24, 384), "m": (32, 576), "b": (24, 768)}


class VideoMambaConfig(VideoMambaSizes, PreTrainedConfig):
    """VideoMamba; arguments as of `VideoMambaSizes`."""

    has_no_defaults_at_init = False
    __init__ = VideoMambaSizes.__init__

    @classmethod
    def preset(cls, size: str, **changes: Any) -> "VideoMambaConfig":
        """The paper's sizes: "Ti", "S", "M" or "B", also in small letters; `changes` are fields of the configuration.

        Raises:
            ValueError: no such size.
        """
        if str(size).lower() not in PRESETS:
            raise ValueError(f"there is no VideoMamba of the size {size!r}: use one of {', '.join(PRESETS)}")
        layers, width = PRESETS[str(size).lower()]
        return cls(**{"hidden_size": width, "num_hidden_layers": layers, **changes})

    @property
    def layer_types(self) -> list[str]:
        """What the field's tools look at to recognise a recurrent stack."""
        return ["linear_attention"] * self.num_hidden_layers


VideoMambaConfig.register_for_auto_class()
