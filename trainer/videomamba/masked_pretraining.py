"""Masked pre-training beside a frozen CLIP (UMT): the student sees some patches of a clip, and its features there
become those of a teacher that sees every frame whole.

Shapes: B batch, T frames, P patches of a frame (side x side), V visible patches of a clip, C width, E the teacher's
projected width, K aligned layers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...modeling_video_ma2mba.modeling_videomamba import VideoMambaModel, add_to_residual, drop_path, normalise
from .self_distillation import cosine_distance
from .training_settings import VideoMambaTrainingConfig

MASKS = ("random", "tube", "frame_row", "clip_row", "attention")


def visible_patches(
    kind: str,
    batch: int,
    frames: int,
    side: int,
    ratio: float,
    *,
    attention: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which patches each of `batch` clips shows.

    Args:
        kind: "random" hides `int(T P ratio)` patches of the clip; "tube" the same `int(P ratio)` places in all frames;
            "frame_row" `int(side ratio)` whole rows of every frame; "clip_row" `T int(side ratio)` rows anywhere in
            it; "attention" all but `P - int(P ratio)` patches of every frame, drawn without putting back with the
            probabilities of `attention`.
        attention: (B, T, P), not negative.

    Returns:
        int64 (B, V), increasing: numbers `t P + p`.

    Raises:
        ValueError: no such mask, or nothing would be left.
    """
    places, cells = side * side, frames * side * side

    def drawn(rows: int, of: int, kept: int, weights: Tensor | None = None) -> Tensor:
        if kept < 1:
            raise ValueError(f"mask_ratio={ratio} leaves nothing of {of} to see: make it smaller")
        if weights is None:
            weights = torch.ones(rows, of, device=device)
        return torch.multinomial(weights, kept, generator=generator)

    if kind == "random":
        found = drawn(batch, cells, cells - int(cells * ratio))
    elif kind == "tube":
        place = drawn(batch, places, places - int(places * ratio))
        found = (place[:, None] + places * torch.arange(frames, device=place.device)[:, None]).flatten(1)
    elif kind == "frame_row":
        row = drawn(batch * frames, side, side - int(side * ratio)).view(batch, frames, -1)
        row = row + side * torch.arange(frames, device=row.device)[:, None]
        found = _cells_of(row.flatten(1), side)
    elif kind == "clip_row":
        found = _cells_of(drawn(batch, frames * side, frames * (side - int(side * ratio))), side)
    elif kind == "attention":
        if attention is None:
            raise ValueError("mask=attention needs the teacher's attention")
        weights = attention.reshape(batch * frames, places).float().clamp(min=1e-8)
        place = drawn(0, places, places - int(places * ratio), weights).view(batch, frames, -1)
        found = (place + places * torch.arange(frames, device=place.device)[:, None]).flatten(1)
    else:
        raise ValueError(f"mask={kind!r} is not valid: use one of {', '.join(MASKS)}")
    return found.sort(dim=1).values


def _cells_of(rows: Tensor, side: int) -> Tensor:
    """Patches of rows (B, R) that are numbered through the clip: (B, R side)."""
    return (rows[..., None] * side + torch.arange(side, device=rows.device)).flatten(1)


def sine_positions(count: int, width: int) -> Tensor:
    """Fixed positions (count, width): sines of a place at even, cosines at odd channels."""
    place = torch.arange(count, dtype=torch.float64)[:, None]
    channel = torch.arange(width, dtype=torch.float64)
    angle = place / 10000 ** (2 * (channel // 2) / width)
    return torch.where(channel.long() % 2 == 0, angle.sin(), angle.cos()).float()


class ClipTeacher(nn.Module):
    """A frozen CLIP of transformers (`CLIPVisionModelWithProjection`) as teacher of clips.

    Args:
        clip: the model. layers: how many of its last layers are given.
    """

    def __init__(self, clip: nn.Module, layers: int) -> None:
        super().__init__()
        self.clip, self.layers = clip.eval().requires_grad_(False), layers
        self._seen: dict[str, Tensor] = {}
        last = self.encoder_layers[-1].self_attn
        for name in ("q_proj", "k_proj"):
            getattr(last, name).register_forward_hook(
                lambda _, __, output, name=name: self._seen.__setitem__(name, output)
            )

    @property
    def encoder_layers(self) -> nn.ModuleList:
        """The blocks of the vision transformer."""
        return next(part for name, part in self.clip.named_modules() if name.endswith("encoder.layers"))

    def check(self, config: Any) -> None:
        """ValueError unless a student with `config` sees the same patches."""
        patches = (self.clip.config.image_size // self.clip.config.patch_size) ** 2
        if patches != config.grid[1] or self.clip.config.image_size != config.image_size:
            raise ValueError(
                f"the teacher sees {patches} patches of frames of {self.clip.config.image_size} pixels, the student "
                f"{config.grid[1]} of {config.image_size}: choose image_size and patch_size alike"
            )

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Features and attention of clips (B, T, 3, H, W), normalised as the student's (the release does so, too).

        Returns:
            (K, B, 1 + T P, E): what the last layers say of the class token, its mean over frames, and of the patches;
            before CLIP's last norm, through its projection. (B, T, P): how much the class token looks at a patch in
            the last layer, mean over heads.
        """
        batch, frames = pixels.shape[:2]
        outputs = self.clip(pixel_values=pixels.flatten(0, 1), output_hidden_states=True)
        features = []
        for hidden in outputs.hidden_states[-self.layers :]:
            mapped = self.clip.visual_projection(hidden).unflatten(0, (batch, frames))
            features.append(torch.cat([mapped[:, :, 0].mean(1, keepdim=True), mapped[:, :, 1:].flatten(1, 2)], 1))
        heads = self.clip.config.num_attention_heads
        query, key = (self._seen.pop(name).float().unflatten(-1, (heads, -1)) for name in ("q_proj", "k_proj"))
        scores = torch.einsum("nhd,nphd->nhp", query[:, 0], key) / math.sqrt(query.shape[-1])
        attention = scores.softmax(-1).mean(1)[:, 1:]
        return torch.stack(features), attention.unflatten(0, (batch, frames))


class MaskedVideoMamba(nn.Module):
    """A VideoMamba that computes visible patches only, with a head for each aligned layer.

    Args:
        encoder: what is pre-trained. width: of the teacher's features. layers: aligned layers, the last ones.
        before_last_mixer: align the residual stream as it enters a layer's mixer, without norm (the release; the last
            mixer and the final norm then never learn); else what comes out of it, normed.

    Raises:
        ValueError: tokens in another order than frame after frame, or tubelets of several frames.
    """

    def __init__(self, encoder: VideoMambaModel, width: int, layers: int, before_last_mixer: bool) -> None:
        super().__init__()
        config = encoder.config
        if config.scan_order != "spatial_first" or config.tubelet_size != 1:
            raise ValueError("masked pre-training knows scan_order=spatial_first and tubelet_size=1 only")
        if not 1 <= layers <= config.num_hidden_layers:
            raise ValueError(f"align_layers={layers} is not valid: there are {config.num_hidden_layers} layers")
        self.config, self.videomamba, self.before = config, encoder, before_last_mixer
        heads = (nn.Linear(config.hidden_size, width) for _ in range(layers))
        self.heads = nn.ModuleList(nn.Sequential(head, nn.LayerNorm(width)) for head in heads)
        for head in self.heads:
            nn.init.xavier_uniform_(head[0].weight)
            nn.init.zeros_(head[0].bias)
        table = sine_positions(1 + config.grid[0] * config.grid[1], config.hidden_size)
        self.register_buffer("positions", table, persistent=False)
        if before_last_mixer:
            self.unused.requires_grad_(False)

    @property
    def unused(self) -> nn.ModuleList:
        """What has no part in the loss where the stream before the last mixer is aligned."""
        last = self.videomamba.layers[-1]
        return nn.ModuleList([last.mixer, last.norm, self.videomamba.norm_f])

    def forward(self, pixel_values: Tensor, visible: Tensor) -> Tensor:
        """Features (K, B, 1 + V, E) of the class token and the patches `visible` (B, V) of clips (B, T, 3, H, W)."""
        encoder = self.videomamba
        tokens = encoder.embed(pixel_values)
        chosen = F.pad(visible + 1, (1, 0))  # the class token is always there
        delta = tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[-1]))
        residual, features, depth = None, [], len(encoder.layers)
        for number, block in enumerate(encoder.layers):
            aligned = number >= depth - len(self.heads)
            if aligned and self.before and number == depth - 1:
                residual = add_to_residual(
                    residual, drop_path(delta, block.drop_path_rate, self.training), self.config
                )
            else:
                delta, residual = block(delta, residual, None, None)
            if aligned:
                feature = residual
                if not self.before:
                    feature = encoder.norm_f(add_to_residual(residual, delta, self.config))
                features.append(feature)
        positions = self.positions[chosen]
        return torch.stack([head(feature + positions) for head, feature in zip(self.heads, features, strict=True)])


class MaskedAlignment:
    """Mean of `2 - 2 cos` between the student's features at what it sees and the teacher's there."""

    def __init__(self, args: VideoMambaTrainingConfig, config: Any, teacher: ClipTeacher) -> None:
        self.args, self.config, self.teacher = args, config, teacher
        teacher.check(config)

    def loss(self, model: nn.Module, inputs: dict[str, Any], progress: float) -> tuple[Tensor, dict[str, float]]:
        """See `Objective`."""
        pixels = inputs["pixel_values"]
        pixels = normalise(pixels, self.config, torch.empty(0, device=pixels.device))
        wanted, attention = self.teacher.to(pixels.device)(pixels)
        visible = visible_patches(
            *(self.args.mask, len(pixels), self.config.grid[0], self.config.patches_per_side, self.args.mask_ratio),
            attention=attention,
            device=pixels.device,
        )
        found = model(pixel_values=pixels, visible=visible)
        chosen = F.pad(visible + 1, (1, 0))[None, ..., None].expand(len(wanted), -1, -1, wanted.shape[-1])
        return cosine_distance(found, wanted.gather(2, chosen)), {}
