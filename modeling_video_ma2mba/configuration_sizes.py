"""What configurations of Video-Ma2mba consist of: fields, defaults, checks, and sizes that follow from them.

Needs neither torch nor transformers: `configuration_video_ma2mba` makes configurations of transformers of it, and a
plan is made of these classes by themselves (`read_sizes`).
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .configuration_fields import Fields, positive_int, require
from .vision_towers import TOWERS, tower_adapter


class Ma2mbaTextSizes(Fields):
    """Mamba-2 language model. Field names are those of transformers' `Mamba2Config`, so its files load by name.

    Args:
        vocab_size: rows of the embedding (50,288 for the state-spaces checkpoints: 50,277 padded to a multiple of 16).
        hidden_size: model width D.
        num_hidden_layers: number of blocks L.
        state_size: SSM state size N.
        head_dim: head width P.
        num_heads: heads H; `num_heads * head_dim` must equal `expand * hidden_size`. None derives it.
        expand: inner width over model width.
        n_groups: groups that share B and C.
        conv_kernel: width W of the causal depthwise convolution.
        chunk_size: tokens per chunk of the SSD scan (affects speed and rounding, never the result).
        time_step_limit: clamp of the step size after softplus.
        residual_in_fp32: keep the residual stream in fp32, as the pre-trained models were.
    """

    model_type = "video_ma2mba_text"

    def __init__(
        self,
        vocab_size: int = 50288,
        hidden_size: int = 2560,
        num_hidden_layers: int = 64,
        state_size: int = 128,
        head_dim: int = 64,
        num_heads: int | None = None,
        expand: int = 2,
        n_groups: int = 1,
        conv_kernel: int = 4,
        chunk_size: int = 256,
        hidden_act: str = "silu",
        layer_norm_epsilon: float = 1e-5,
        residual_in_fp32: bool = True,
        use_bias: bool = False,
        use_conv_bias: bool = True,
        time_step_min: float = 0.001,
        time_step_max: float = 0.1,
        time_step_floor: float = 1e-4,
        time_step_limit: Sequence[float] = (0.0, float("inf")),
        initializer_range: float = 0.1,
        rescale_prenorm_residual: bool = True,
        pad_token_id: int | None = 0,
        bos_token_id: int | None = 0,
        eos_token_id: int | None = 0,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.state_size = state_size
        self.head_dim = head_dim
        self.expand = expand
        self.num_heads = num_heads if num_heads is not None else (expand * hidden_size) // head_dim
        self.n_groups = n_groups
        self.conv_kernel = conv_kernel
        self.chunk_size = chunk_size
        self.hidden_act = hidden_act
        self.layer_norm_epsilon = layer_norm_epsilon
        self.residual_in_fp32 = residual_in_fp32
        self.use_bias = use_bias
        self.use_conv_bias = use_conv_bias
        self.time_step_min = time_step_min
        self.time_step_max = time_step_max
        self.time_step_floor = time_step_floor
        # JSON has no infinity: older files hold it as a string or as {"__float__": "Infinity"}.
        self.time_step_limit = [_as_float(v) for v in time_step_limit]
        self.initializer_range = initializer_range
        self.rescale_prenorm_residual = rescale_prenorm_residual
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
        self._check()

    def _check(self) -> None:
        for field in ("vocab_size", "hidden_size", "num_hidden_layers", "state_size", "head_dim", "num_heads"):
            require(positive_int(getattr(self, field)), field, getattr(self, field), "it must be a positive integer")
        for field in ("expand", "n_groups", "chunk_size"):
            require(positive_int(getattr(self, field)), field, getattr(self, field), "it must be a positive integer")
        require(
            self.num_heads * self.head_dim == self.expand * self.hidden_size,
            "num_heads",
            self.num_heads,
            f"num_heads * head_dim must equal expand * hidden_size = {self.expand * self.hidden_size}",
        )
        require(self.num_heads % self.n_groups == 0, "n_groups", self.n_groups, "it must divide num_heads")
        require(
            isinstance(self.conv_kernel, int) and 2 <= self.conv_kernel <= 4,
            "conv_kernel",
            self.conv_kernel,
            "it must be 2, 3 or 4 (what the convolution kernels support)",
        )
        require(self.hidden_act in ("silu", "swish"), "hidden_act", self.hidden_act, "Mamba-2 uses 'silu'")
        low_high = self.time_step_limit
        require(
            len(low_high) == 2 and 0.0 <= low_high[0] < low_high[1],
            "time_step_limit",
            low_high,
            "it must be two numbers, 0 <= lowest < highest",
        )
        require(self.layer_norm_epsilon > 0, "layer_norm_epsilon", self.layer_norm_epsilon, "it must be positive")

    @property
    def inner_size(self) -> int:
        """Width E of the inner stream: `expand * hidden_size`."""
        return self.expand * self.hidden_size

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: x, B and C together."""
        return self.inner_size + 2 * self.n_groups * self.state_size


def _as_float(value: Any) -> float:
    if isinstance(value, dict):
        value = value.get("__float__", "nan")
    number = float(value)
    if math.isnan(number):
        raise ValueError(f"time_step_limit={value!r} is not a number")
    return number


class VideoMa2mbaSizes(Fields):
    """Vision tower, projector and language model together.

    Args:
        text_config: a `Ma2mbaTextConfig`, or its dictionary (a transformers `Mamba2Config` dictionary works too).
        vision_config: a configuration of one of the kinds in `vision_towers`, or its dictionary. None is CLIP ViT-L/14
            at 336 pixels.
        video_token_id: id of the placeholder that every visual token takes in the prompt.
        vision_feature_layer: which hidden state of the tower feeds the projector (paper: the penultimate, -2).
        spatial_pool_stride: side of the square of patch tokens pooled into one (paper: 2, 576 -> 144 tokens a frame).
        spatial_pool_mode: "bilinear" (paper) or "average".
        projector_hidden_act: activation between the projector's two layers.
        image_mean, image_std: normalisation of pixels scaled to 0..1; None takes those of the tower's kind.
        vision_chunk_frames: frames that run through the tower together; bounds the memory of vision.
        prefill_segment_length: tokens that run through the language model together outside of training (on a CPU at
            most 512).
        frame_times: how times of frames enter the prompt: "none", or a time stamp in front of the first frame of every
            `frame_times_every` seconds, as "text" (`[1:20]`), or as "learned" embeddings of tokens of their own (one
            of the minute, one of the second). `set_frame_times` of a model changes it.
    """

    model_type = "video_ma2mba"

    def __init__(
        self,
        text_config: Any = None,
        vision_config: Any = None,
        video_token_id: int = 50277,
        vision_feature_layer: int = -2,
        spatial_pool_stride: int = 2,
        spatial_pool_mode: str = "bilinear",
        projector_hidden_act: str = "gelu",
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        vision_chunk_frames: int = 32,
        prefill_segment_length: int = 8192,
        tie_word_embeddings: bool = True,
        frame_times: str = "none",
        frame_times_every: float = 4.0,
        **kwargs: Any,
    ) -> None:
        self.text_config = self._text_of(text_config)
        self.vision_config = self._vision_of(vision_config)
        self.video_token_id = video_token_id
        self.vision_feature_layer = vision_feature_layer
        self.spatial_pool_stride = spatial_pool_stride
        self.spatial_pool_mode = spatial_pool_mode
        self.projector_hidden_act = projector_hidden_act
        tower = tower_adapter(self.vision_config)
        self.image_mean = list(tower.image_mean if image_mean is None else image_mean)
        self.image_std = list(tower.image_std if image_std is None else image_std)
        self.vision_chunk_frames = vision_chunk_frames
        self.prefill_segment_length = prefill_segment_length
        self.frame_times = frame_times
        self.frame_times_every = frame_times_every
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            kwargs.setdefault(name, getattr(self.text_config, name, None))
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        self._check()

    def _check(self) -> None:
        for field in ("spatial_pool_stride", "vision_chunk_frames", "prefill_segment_length"):
            require(positive_int(getattr(self, field)), field, getattr(self, field), "it must be a positive integer")
        require(
            isinstance(self.video_token_id, int) and 0 <= self.video_token_id < self.text_config.vocab_size,
            "video_token_id",
            self.video_token_id,
            f"it must be a row of the embedding (0 to {self.text_config.vocab_size - 1})",
        )
        layers = self.vision_config.num_hidden_layers
        require(
            isinstance(self.vision_feature_layer, int) and -layers - 1 <= self.vision_feature_layer <= layers,
            "vision_feature_layer",
            self.vision_feature_layer,
            f"the tower has hidden states {-layers - 1} to {layers}",
        )
        require(
            self.spatial_pool_mode in ("bilinear", "average"),
            "spatial_pool_mode",
            self.spatial_pool_mode,
            "it must be 'bilinear' (the paper) or 'average'",
        )
        modes = ("none", "text", "learned")
        require(self.frame_times in modes, "frame_times", self.frame_times, f"it must be one of {', '.join(modes)}")
        require(self.frame_times_every > 0, "frame_times_every", self.frame_times_every, "it must be more than 0 s")
        for field in ("image_mean", "image_std"):
            require(len(getattr(self, field)) == 3, field, getattr(self, field), "it needs three numbers (R, G, B)")
        require(all(s > 0 for s in self.image_std), "image_std", self.image_std, "every number must be positive")

    @property
    def patches_per_side(self) -> int:
        """Patch tokens along one side of a frame."""
        return tower_adapter(self.vision_config).patches_per_side(self.vision_config)

    @property
    def clip_frames(self) -> int:
        """Frames that the tower looks at together (1: every frame by itself)."""
        return tower_adapter(self.vision_config).clip_frames(self.vision_config)

    @property
    def tokens_per_frame(self) -> int:
        """Visual tokens one frame takes in the prompt (144 at 336 pixels)."""
        return math.ceil(self.patches_per_side / self.spatial_pool_stride) ** 2

    @property
    def read_chunk_frames(self) -> int:
        """Frames that a video is read by: whole clips, as many as fill one segment of the language model."""
        frames = self.prefill_segment_length // self.tokens_per_frame
        return max(1, frames // self.clip_frames) * self.clip_frames

    @staticmethod
    def make_text(**fields: Any) -> Any:
        """The language model's part of this."""
        return Ma2mbaTextSizes(**fields)

    @staticmethod
    def make_vision(kind: str, **fields: Any) -> Any:
        """The tower's part of this, of the `model_type` `kind`."""
        return tower_adapter(kind).make_sizes(**fields)

    def _text_of(self, config: Any) -> Any:
        if config is None:
            return self.make_text()
        if not isinstance(config, dict):
            config = config.to_dict() if config.model_type != Ma2mbaTextSizes.model_type else config
        if isinstance(config, dict):
            # Only this model's own type may be written back; every other key of a Mamba2Config has the same meaning.
            left_out = ("model_type", "architectures", "auto_map", "layer_types")
            return self.make_text(**{name: value for name, value in config.items() if name not in left_out})
        return config

    def _vision_of(self, config: Any) -> Any:
        if config is None:
            config = {
                "model_type": "clip_vision_model",
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": 336,
                "patch_size": 14,
                "projection_dim": 768,
            }
        if isinstance(config, dict):
            fields = dict(config)
            config = self.make_vision(fields.pop("model_type", "clip_vision_model"), **fields)
        tower_adapter(config)
        return config


def read_sizes(folder: str | Path) -> Ma2mbaTextSizes | VideoMa2mbaSizes | None:
    """The sizes of a saved model, from its config.json alone, as transformers' configuration would have them.

    None where anything in it is unusual (another kind of model, a wrong type or value, no file): transformers
    understands more, and says what is wrong.
    """
    try:
        fields = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        kind = fields.pop("model_type")
        if kind == "mamba2":
            return VideoMa2mbaSizes(text_config=fields, video_token_id=0).text_config
        if kind == Ma2mbaTextSizes.model_type:
            return Ma2mbaTextSizes(**fields)
        found = VideoMa2mbaSizes(**fields) if kind == VideoMa2mbaSizes.model_type else None
        return found if found is not None and _usual(found.vision_config) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _usual(vision: Any) -> bool:
    """Whether a tower's sizes are what its own configuration would let stand: positive whole numbers that divide."""
    numbers = TOWERS[vision.model_type].defaults
    return all(positive_int(getattr(vision, name)) for name, value in numbers.items() if type(value) is int) and (
        not hasattr(vision, "num_attention_heads") or vision.hidden_size % vision.num_attention_heads == 0
    )
