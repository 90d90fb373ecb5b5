"""VideoMamba: an attention-free encoder of pictures and clips, and its classifier, as transformers models.

Shapes: B batch, T frames of a clip, t token frames (T / tubelet), P patches of a frame, S = 1 + t P tokens, C width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils import can_return_tuple

from .configuration_videomamba import VideoMambaConfig
from .mixer_mamba1 import VideoMambaMixer, add_norm_mix, init_mixer_
from .stack_weights import sent

# The optimizer of the released models leaves these without weight decay, beside biases and vectors.
NO_DECAY = ("pos_embed", "cls_token", "temporal_pos_embedding")


def drop_path_rates(config: VideoMambaConfig) -> list[float]:
    """Rate on what enters each block, and last the rate on what leaves the last one.

    Block i drops the output of block i - 1: `[0] + linspace(0, rate, depth)`; nothing is dropped before the first.
    """
    steps = max(config.num_hidden_layers - 1, 1)
    return [0.0, *(config.drop_path_rate * i / steps for i in range(config.num_hidden_layers))]


def drop_path(delta: Tensor, rate: float, training: bool) -> Tensor:
    """Set `delta` (B, S, C) to zero for a random part `rate` of the samples, scaling up the others."""
    if rate == 0 or not training:
        return delta
    keep = delta.new_empty(len(delta), 1, 1).bernoulli_(1 - rate)
    return delta * (keep / (1 - rate))


def temporal_order(frames: int, patches: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Permutation of the tokens of a clip to place after place, and its inverse; the class token stays first.

    Token `1 + f * patches + p` goes to `1 + p * frames + f`.
    """
    numbers = 1 + torch.arange(frames * patches, device=device).view(frames, patches)
    first = torch.zeros(1, dtype=torch.int64, device=device)
    order = torch.cat([first, numbers.T.flatten()])
    return order, torch.argsort(order)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """An optimizer's parameter groups as the released models were trained: matrices and convolutions decay, `A_log`
    (a matrix) among them; vectors, biases, positions and the class token do not."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            free = parameter.ndim <= 1 or name.endswith(".bias") or name.rpartition(".")[2] in NO_DECAY
            (plain if free else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


class VideoMambaRMSNorm(nn.Module):
    """RMS norm, computed in fp32 at least."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        work = torch.promote_types(x.dtype, torch.float32)
        normed = x.to(work)
        normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight.to(work)).to(self.weight.dtype)


class VideoMambaPatchEmbed(nn.Module):
    """Pixels to tokens: (B, T, channels, H, W) -> (B, t, P, C) by one convolution with stride equal to its size."""

    def __init__(self, config: VideoMambaConfig) -> None:
        super().__init__()
        side = config.patch_size
        self.proj: nn.Conv2d | nn.Conv3d
        if config.tubelet_size is not None:
            size = (config.tubelet_size, side, side)
            self.proj = nn.Conv3d(config.num_channels, config.hidden_size, size, size)
        else:
            self.proj = nn.Conv2d(config.num_channels, config.hidden_size, side, side)

    def forward(self, pixels: Tensor) -> Tensor:
        # A stride equal to the kernel makes it a matrix product over patches, faster than a 3-D convolution.
        tubelet = self.proj.kernel_size[0] if self.proj.weight.ndim == 5 else 1
        side = self.proj.kernel_size[-1]
        batch, frames, channels, height, width = pixels.shape
        patches = pixels.reshape(
            batch, frames // tubelet, tubelet, channels, height // side, side, width // side, side
        ).permute(0, 1, 4, 6, 3, 2, 5, 7)
        return F.linear(patches.flatten(4).flatten(2, 3), self.proj.weight.flatten(1), self.proj.bias)


class VideoMambaBlock(GradientCheckpointingLayer):
    """Add, norm, mix: `residual += drop_path(delta)`, `delta = mixer(norm(residual))`."""

    def __init__(self, config: VideoMambaConfig, layer: int) -> None:
        super().__init__()
        self.norm = VideoMambaRMSNorm(config.hidden_size, config.layer_norm_eps)
        self.mixer = VideoMambaMixer(config, layer)
        self.drop_path_rate = drop_path_rates(config)[layer]
        self.residual_in_fp32 = config.residual_in_fp32

    def forward(
        self, delta: Tensor, residual: Tensor | None, temporal: Tensor | None, spatial: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """delta: what the block before added (the first: the tokens). Returns this block's delta, and the residual
        stream before it."""
        delta = drop_path(delta, self.drop_path_rate, self.training)
        if self.residual_in_fp32 and (both := add_norm_mix(self.mixer, self.norm, delta, residual)) is not None:
            return both
        residual = add_to_residual(residual, delta, self)
        return self.mixer(self.norm(residual), temporal, spatial), residual


def add_to_residual(residual: Tensor | None, delta: Tensor, settings: Any) -> Tensor:
    """The residual stream with `delta`, in fp32 where `settings.residual_in_fp32`."""
    if settings.residual_in_fp32:
        delta = delta.to(torch.promote_types(delta.dtype, torch.float32))
    return delta if residual is None else residual + delta


class VideoMambaPreTrainedModel(PreTrainedModel):
    """Loading rules, initialisation and the code that travels with a checkpoint."""

    config: VideoMambaConfig
    config_class = VideoMambaConfig
    base_model_prefix = "videomamba"
    main_input_name = "pixel_values"
    input_modalities = ("video",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a batch's mean: transformers' Trainer divides by the batches of a step
    _no_split_modules = ["VideoMambaBlock"]
    _supports_sdpa = True  # there is no attention: as a tower it takes whatever a model asks of all its parts
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d | nn.Conv3d):  # as PyTorch's own convolutions
            bound = module.weight[0].numel() ** -0.5
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, VideoMambaRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, VideoMambaMixer):
            init_mixer_(module, self.config, init)
        elif isinstance(module, VideoMambaModel):
            init.zeros_(module.cls_token)
            init.trunc_normal_(module.pos_embed, std=std)
            if module.temporal_pos_embedding is not None:
                init.zeros_(module.temporal_pos_embedding)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers.

        Raises:
            ValueError: the weights have other sizes than the configuration says.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
        again = {**kwargs, "ignore_mismatched_sizes": True, "output_loading_info": True}
        _, info = super().from_pretrained(pretrained_model_name_or_path, *args, **again)
        name, saved, wanted = min(info["mismatched_keys"])
        if all(each[0].startswith("head.") for each in info["mismatched_keys"]):
            said = f"its head has {saved[0]} classes, not {wanted[0]}: ignore_mismatched_sizes=True makes a fresh one"
        else:
            sizes = f"{name} is {tuple(saved)}, not {tuple(wanted)}"
            said = f"its weights are of another size than its configuration: {sizes}"
        raise ValueError(f"{pretrained_model_name_or_path}: {said}")

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """As in transformers; `config.json` also says which class of the travelling code serves which auto class."""
        head = "AutoModelForVideoClassification" if self.config.is_video else "AutoModelForImageClassification"
        own = {
            "AutoModel": "modeling_videomamba.VideoMambaModel",
            head: "modeling_videomamba.VideoMambaForVideoClassification",
        }
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **own}
        super().save_pretrained(save_directory, **kwargs)


class VideoMambaModel(VideoMambaPreTrainedModel):
    """The encoder: a clip in, its tokens out."""

    def __init__(self, config: VideoMambaConfig) -> None:
        super().__init__(config)
        width, (frames, patches) = config.hidden_size, config.grid
        self.patch_embed = VideoMambaPatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, width))
        self.temporal_pos_embedding = nn.Parameter(torch.zeros(1, frames, width)) if config.is_video else None
        blocks = [VideoMambaBlock(config, layer) for layer in range(config.num_hidden_layers)]
        self.temporal = any(each.order == "temporal" for block in blocks for each in block.mixer.passes)
        self.layers = nn.ModuleList(blocks)
        self.norm_f = VideoMambaRMSNorm(width, config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.patch_embed

    def embed(self, pixel_values: Tensor, temporal: bool = True) -> Tensor:
        """Tokens (B, S, C) of clips (B, T, channels, H, W), positions and class token included; temporal ones unless
        `temporal` is False (a picture beside clips).

        Fewer frames than `config.num_frames` take the first temporal positions; T must be a multiple of the tubelet.
        """
        tokens = self.patch_embed(normalise(pixel_values, self.config, self.cls_token))
        batch, frames = tokens.shape[:2]
        positions = self.pos_embed
        tokens = tokens + positions[:, 1:]
        first = (self.cls_token + positions[:, :1]).expand(batch, -1, -1)
        rate = self.config.hidden_dropout_prob
        tokens, first = F.dropout(tokens, rate, self.training), F.dropout(first, rate, self.training)
        if temporal and self.temporal_pos_embedding is not None:
            tokens = tokens + self.temporal_pos_embedding[:, :frames, None]
        return torch.cat([first, tokens.flatten(1, 2)], dim=1)

    def run_blocks(
        self, tokens: Tensor, layers: int | None = None, seen: list[Tensor] | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """`embed`'s tokens through the first `layers` blocks (default: all): residual stream and the last delta; the
        stream after the blocks is their sum. `seen` takes the stream before each of the blocks."""
        temporal = spatial = None
        if self.temporal:
            patches = self.config.grid[1]
            temporal, spatial = temporal_order((tokens.shape[1] - 1) // patches, patches, tokens.device)
        delta, residual = tokens, None
        for block in self.layers[:layers]:
            if seen is not None:
                seen.append(add_to_residual(residual, delta, self.config).to(tokens.dtype))
            delta, residual = block(delta, residual, temporal, spatial)
        return residual, delta

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Encode clips of exactly `config.num_frames` frames.

        Args:
            pixel_values: (B, T, 3, H, W), for an image model also (B, 3, H, W); uint8 is raw RGB, floating point is
                already normalised.
            output_hidden_states: give `hidden_states`; None: as the configuration says.

        Returns:
            `last_hidden_state` (B, S, C), class token first; `pooler_output` (B, C), the class token; `hidden_states`,
            the stream before the first block and after each, (B, S, C) without the last norm.

        Raises:
            ValueError: another number of frames, or frames of another size.
        """
        tokens = self.embed(check_clip(pixel_values, self.config))
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        seen: list[Tensor] | None = [] if wanted else None
        residual, delta = self.run_blocks(tokens, seen=seen)
        delta = drop_path(delta, drop_path_rates(self.config)[-1], self.training)
        stream = add_to_residual(residual, delta, self.config)
        hidden = self.norm_f(stream)
        states = None if seen is None else (*seen, stream.to(hidden.dtype))
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=hidden[:, 0], hidden_states=states)


class VideoMambaForVideoClassification(VideoMambaPreTrainedModel):
    """The encoder with a linear head on the class token; of pictures where the configuration is an image model's."""

    def __init__(self, config: VideoMambaConfig) -> None:
        super().__init__(config)
        self.videomamba = VideoMambaModel(config)
        self.head = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        """Classify clips.

        Args:
            pixel_values: as in `VideoMambaModel`, or several views of each clip, (B, views, T, 3, H, W): their
                softmaxes (sigmoids, values of a regression) are averaged, and `logits` are those of the average.
            labels: (B,) class numbers or (B, classes) probabilities, or as `config.problem_type` says.
            kwargs: `output_hidden_states`, as in `VideoMambaModel`.

        Returns:
            `loss` where labels are given; `logits` (B, classes); `hidden_states` of all views.
        """
        views = 1
        if pixel_values.ndim == 6:
            views = pixel_values.shape[1]
            pixel_values = pixel_values.flatten(0, 1)
        found = self.videomamba(pixel_values, output_hidden_states=kwargs.get("output_hidden_states"))
        logits = self.head(F.dropout(found.pooler_output, self.config.classifier_dropout, self.training))
        if views > 1:
            logits = average_views(logits.unflatten(0, (-1, views)), self.config.problem_type)
        loss = None
        if labels is not None:
            loss = classification_loss(logits, labels, self.config)
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=found.hidden_states)


def average_views(logits: Tensor, problem_type: str | None) -> Tensor:
    """(B, views, classes) -> (B, classes): the logits of the views' mean probability (regression: the mean)."""
    if problem_type == "regression":
        return logits.mean(1)
    work = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if problem_type == "multi_label_classification":
        return torch.logit(torch.sigmoid(work).mean(1)).to(logits.dtype)
    return (torch.logsumexp(F.log_softmax(work, dim=-1), dim=1) - torch.tensor(logits.shape[1]).log()).to(logits.dtype)


def classification_loss(logits: Tensor, labels: Tensor, config: Any) -> Tensor:
    """Cross-entropy; squared error or binary cross-entropy where `config.problem_type` says so.

    Raises:
        ValueError: a class number that the head does not have, or labels of another shape than the logits.
    """
    if config.problem_type in ("regression", "multi_label_classification"):
        if labels.numel() != logits.numel():
            raise ValueError(f"labels have the shape {tuple(labels.shape)}, the model's output {tuple(logits.shape)}")
        wanted = labels.view_as(logits).to(logits.dtype)
        square = config.problem_type == "regression"
        return F.mse_loss(logits, wanted) if square else F.binary_cross_entropy_with_logits(logits, wanted)
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < config.num_labels:
        raise ValueError(
            f"labels go from {int(labels.min())} to {int(labels.max())}, the model has {config.num_labels} classes "
            "(0 first): set num_labels, and ignore_mismatched_sizes=True to load a checkpoint with another head"
        )
    shares = labels.is_floating_point()
    if labels.shape != (logits.shape if shares else logits.shape[:1]):
        kind = "classes, as whole numbers (or a share for every class)"
        raise ValueError(f"labels must be {len(logits)} {kind}, not {tuple(labels.shape)} of {labels.dtype}")
    return F.cross_entropy(logits.float(), labels.float() if shares else labels.long())


def check_clip(pixels: Tensor, config: VideoMambaConfig) -> Tensor:
    """Clips as (B, T, channels, H, W).

    Raises:
        ValueError: not the shape that `config` is for.
    """
    if not config.is_video and pixels.ndim == 4:
        pixels = pixels.unsqueeze(1)
    side, channels, frames = config.image_size, config.num_channels, config.num_frames
    if pixels.ndim != 5 or pixels.shape[2] != channels:
        shape = f"(batch, {frames}, {channels}, {side}, {side})"
        raise ValueError(f"pixel_values must have the shape {shape}, not {tuple(pixels.shape)}")
    if pixels.shape[1] != frames:
        raise ValueError(
            f"a clip of {pixels.shape[1]} frames was given, this model takes {frames}: sample that many, or convert "
            f"the checkpoint with --num-frames {pixels.shape[1]}, which interpolates its temporal positions"
        )
    if pixels.shape[3:] != (side, side):
        height, width = pixels.shape[3:]
        raise ValueError(
            f"frames of {height} x {width} pixels were given, this model takes {side} x {side}: resize them, or "
            f"convert the checkpoint with --image-size, which interpolates its spatial positions"
        )
    return pixels


def normalise(pixels: Tensor, config: VideoMambaConfig, like: Tensor) -> Tensor:
    """Clips (B, T, channels, H, W) on the device and in the type of `like`; uint8 is scaled and normalised.

    Raises:
        ValueError: an integer type other than uint8.
    """
    pixels = sent(pixels, like.device)
    if pixels.dtype == torch.uint8:
        scale = sent(torch.tensor([config.image_mean, config.image_std]), like.device)
        mean, std = scale.view(2, 1, 1, -1, 1, 1)
        pixels = (pixels.float() / 255 - mean) / std
    elif not pixels.is_floating_point():
        raise ValueError(f"pixel_values must be uint8 (0..255) or floating point, not {pixels.dtype}")
    return pixels.to(like.dtype)


VideoMambaModel.register_for_auto_class("AutoModel")
VideoMambaForVideoClassification.register_for_auto_class("AutoModelForVideoClassification")
