"""What configurations of VideoMamba consist of: fields, defaults, checks, and sizes that follow from them.

Needs neither torch nor transformers, as `configuration_sizes`.
"""

import math
from collections.abc import Sequence
from typing import Any

from .configuration_fields import Fields, positive_int, require

# What every released checkpoint was trained with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PROBLEM_TYPES = (None, "single_label_classification", "multi_label_classification", "regression")
SCAN_ORDERS = (
    "spatial_first",
    "temporal_first",
    "spatiotemporal_v1",
    "spatiotemporal_v2",
    "spatial_then_temporal",
    "temporal_then_spatial",
    "alternating",
)


class VideoMambaSizes(Fields):
    """VideoMamba. Without arguments: size Ti on 8 frames of 224 x 224 pixels, as fine-tuned on Kinetics-400.

    Args:
        hidden_size: width C of tokens. num_hidden_layers: number of blocks.
        state_size: state per channel N. expand: inner width over C. conv_kernel: width of the causal convolution.
        time_step_rank: rank of the step size's projection; None is ceil(C / 16).
        image_size, patch_size: sides in pixels; patch_size divides image_size.
        num_frames: frames of a clip. tubelet_size: frames that one token spans; None makes an image model (one frame,
            a two-dimensional patch embedding, no temporal positions).
        scan_order: order in which the tokens of a clip are scanned. "spatial_first" (released checkpoints): frame
            after frame; "temporal_first": place after place; "spatiotemporal_v1": spatial forwards, temporal back;
            "spatiotemporal_v2": four scans, both orders in both directions; "spatial_then_temporal" and the reverse:
            one order in the first half of the layers, the other in the second; "alternating": layer by layer.
        share_scan_weights: whether the temporal scans of "spatiotemporal_v2" use the weights of the spatial ones (our
            reading; the paper does not say) or have their own.
        hidden_dropout_prob: after the spatial positions. classifier_dropout: before the head.
        drop_path_rate: rate at the last block; it grows linearly from 0 (stochastic depth).
        residual_in_fp32: keep the residual stream in fp32 in a 16-bit model.
        time_step_range: smallest and largest step sizes of fresh weights, log-uniform between them: a channel
            remembers about 1 / step tokens. None starts as the released models do, at 0.69: they forget a token
            within a few others, and trained from nothing on clips do not learn (Mamba starts with 0.001, 0.1).
        initializer_range: standard deviation of fresh linear layers and positions.
        image_mean, image_std: of the normalisation of pixels scaled to 0..1.
    """

    model_type = "videomamba"

    def __init__(
        self,
        hidden_size: int = 192,
        num_hidden_layers: int = 24,
        state_size: int = 16,
        expand: int = 2,
        conv_kernel: int = 4,
        time_step_rank: int | None = None,
        image_size: int = 224,
        patch_size: int = 16,
        num_channels: int = 3,
        num_frames: int = 8,
        tubelet_size: int | None = 1,
        scan_order: str = "spatial_first",
        share_scan_weights: bool = True,
        hidden_dropout_prob: float = 0.0,
        classifier_dropout: float = 0.0,
        drop_path_rate: float = 0.0,
        residual_in_fp32: bool = True,
        layer_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        time_step_range: Sequence[float] | None = None,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        **kwargs: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.state_size = state_size
        self.expand = expand
        self.conv_kernel = conv_kernel
        self.time_step_rank = math.ceil(hidden_size / 16) if time_step_rank is None else time_step_rank
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.tubelet_size = tubelet_size
        self.num_frames = 1 if tubelet_size is None else num_frames
        self.scan_order = scan_order
        self.share_scan_weights = share_scan_weights
        self.hidden_dropout_prob = hidden_dropout_prob
        self.classifier_dropout = classifier_dropout
        self.drop_path_rate = drop_path_rate
        self.residual_in_fp32 = residual_in_fp32
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        self.time_step_range = None if time_step_range is None else list(time_step_range)
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        # Before what comes from elsewhere is set, which looks at the number of layers itself.
        self._check()
        super().__init__(**kwargs)
        kind = getattr(self, "problem_type", None)
        require(kind in PROBLEM_TYPES, "problem_type", kind, f"use one of {', '.join(map(str, PROBLEM_TYPES))}")

    def _check(self) -> None:
        names = "hidden_size num_hidden_layers state_size expand conv_kernel time_step_rank image_size patch_size"
        for name in (*names.split(), "num_channels", "num_frames"):
            value = getattr(self, name)
            require(positive_int(value), name, value, "it must be a positive integer")
        rule = f"it must divide image_size={self.image_size}"
        require(self.image_size % self.patch_size == 0, "patch_size", self.patch_size, rule)
        if self.tubelet_size is not None:
            fits = isinstance(self.tubelet_size, int) and self.tubelet_size > 0
            fits = fits and self.num_frames % self.tubelet_size == 0
            require(fits, "tubelet_size", self.tubelet_size, f"it must divide num_frames={self.num_frames}")
        require(self.scan_order in SCAN_ORDERS, "scan_order", self.scan_order, f"use one of {', '.join(SCAN_ORDERS)}")
        for name in ("hidden_dropout_prob", "classifier_dropout", "drop_path_rate"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "it must be at least 0 and less than 1")
        if (steps := self.time_step_range) is not None:
            fits = len(steps) == 2 and 0 < steps[0] <= steps[1]
            require(fits, "time_step_range", steps, "it needs the smallest and the largest step, both more than 0")
        spread = self.initializer_range
        require(spread >= 0, "initializer_range", spread, "a standard deviation is at least 0")
        for name in ("image_mean", "image_std"):
            fits = len(getattr(self, name)) == self.num_channels
            require(fits, name, getattr(self, name), f"it needs one number for each of {self.num_channels} channels")

    @property
    def is_video(self) -> bool:
        """Whether clips go in; else single pictures."""
        return self.tubelet_size is not None

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a frame; a frame has the square of it."""
        return self.image_size // self.patch_size

    @property
    def grid(self) -> tuple[int, int]:
        """Token frames of a clip, and tokens of each."""
        return self.num_frames // (self.tubelet_size or 1), self.patches_per_side**2

    @property
    def inner_size(self) -> int:
        """Channels E of the mixer."""
        return self.expand * self.hidden_size

    @property
    def scan_weight_sets(self) -> int:
        """Sets of weights of a mixer's scans."""
        return 4 if self.scan_order == "spatiotemporal_v2" and not self.share_scan_weights else 2
