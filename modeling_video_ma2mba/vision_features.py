"""From pixels to rows of the language model's input: vision tower, 2x2 pooling, projector, in chunks of frames.

Frames (or clips of frames, where the tower looks at several together) are independent of each other, so they are the
third axis along which activations can be recomputed: the tower sees a few at a time in forward, and again in backward
when something before the language model trains. Peak memory is that of one chunk plus the rows themselves, which may
live in host memory.

Shapes: F frames, T tokens per frame, D model width, N rows in all.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .recompute_chunks import ChunkedRows, ChunkJob, RowLayout, fill_rows
from .stack_weights import execution_device, sent
from .vision_towers import tower_adapter


class VideoMa2mbaMultiModalProjector(nn.Module):
    """Two linear layers around an activation (LLaVA's `mlp2x_gelu`): `(..., vision width) -> (..., D)`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, width)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(features)))


def used_tower_modules(tower: nn.Module, config: Any) -> Iterator[nn.Module]:
    """The parts of a tower that the features depend on."""
    return tower_adapter(config.vision_config).used_modules(tower, config)


def freeze_unused_tower_parameters(tower: nn.Module, config: Any) -> None:
    """Take gradients off the tail that never runs: DDP stops with an error on parameters without a gradient."""
    used = {id(p) for module in used_tower_modules(tower, config) for p in module.parameters()}
    for parameter in tower.parameters():
        if id(parameter) not in used:
            parameter.requires_grad_(False)


def normalise_pixels(pixels: Tensor, config: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Move a chunk to `device` and bring it to the tower's scale.

    Args:
        pixels: `(F, 3, h, w)`; uint8 is raw RGB 0..255, floating point is already normalised.

    Raises:
        ValueError: a channel count other than 3, an integer type other than uint8, or NaN/inf among the values.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(
            f"pixel_values_videos must have the shape (frames, 3, height, width), not {tuple(pixels.shape)}"
        )
    pixels = sent(pixels, device)
    if pixels.dtype == torch.uint8:
        # Made on the host and sent without waiting, so that a GPU busy with earlier frames does not hold up these.
        scale = sent(torch.tensor([config.image_mean, config.image_std]), device)
        mean, std = scale.view(2, 1, 3, 1, 1)
        return ((pixels.float() / 255 - mean) / std).to(dtype)
    if not pixels.is_floating_point():
        raise ValueError(f"pixel_values_videos must be uint8 (0..255) or floating point, not {pixels.dtype}")
    if not torch.compiler.is_compiling() and not bool(torch.isfinite(pixels.detach()).all()):
        raise ValueError("pixel_values_videos holds NaN or infinite values: check the frames that were decoded")
    return pixels.to(dtype)


def pool_patches(features: Tensor, side: int, stride: int, mode: str) -> Tensor:
    """`(F, side * side, C) -> (F, ceil(side / stride)**2, C)`, rows in raster order (paper 3.4, "2x2 bilinear")."""
    if stride == 1:
        return features
    frames, _, width = features.shape
    grid = features.transpose(1, 2).reshape(frames, width, side, side)
    if mode == "average":
        pooled = F.avg_pool2d(grid, stride, ceil_mode=True)
    else:
        pooled = F.interpolate(grid, size=(math.ceil(side / stride),) * 2, mode="bilinear")
    return pooled.flatten(2).transpose(1, 2)


def encode_frames(tower: nn.Module, config: Any, pixels: Tensor, clips: Sequence[int] | None = None) -> Tensor:
    """Frames `(F, 3, h, w)`, clip after clip (None: one clip) -> pooled patch features `(F, T, vision width)`."""
    adapter = tower_adapter(config.vision_config)
    pixels = normalise_pixels(pixels, config, execution_device(tower), adapter.input_dtype(tower))
    rows = adapter.encode(tower, config, pixels, clips or [len(pixels)])
    return pool_patches(rows, config.patches_per_side, config.spatial_pool_stride, config.spatial_pool_mode)


def whole_clips(frames: Sequence[int], clip: int, most: int) -> list[list[int]]:
    """Lengths of the clips of videos of `frames` frames each, dealt out to chunks of about `most` frames.

    A clip is `clip` frames, at the end of a video fewer; no chunk cuts one.
    """
    lengths = [min(clip, count - start) for count in frames for start in range(0, count, clip)]
    chunks: list[list[int]] = []
    for length in lengths:
        if chunks and sum(chunks[-1]) + length <= most:
            chunks[-1].append(length)
        else:
            chunks.append([length])
    return chunks


def _trainable(*modules: nn.Module) -> list[Tensor]:
    return [p for module in modules for p in module.parameters() if p.requires_grad]


def video_rows(
    tower: nn.Module,
    projector: nn.Module,
    config: Any,
    pixels: Tensor,
    *,
    recompute: bool,
    layout: RowLayout | None = None,
    text: Tensor | None = None,
    num_frames: Sequence[int] | None = None,
    on_features: Callable[[Tensor, Tensor], object] | None = None,
) -> Tensor:
    """Run frames through tower, pooling and projector and lay the rows out, by themselves or among text embeddings.

    Args:
        pixels: `(F, 3, h, w)`, on any device; chunks are moved to the tower's.
        recompute: when something here needs a gradient, keep no activations and run each chunk again in backward;
            otherwise autograd keeps the activations of all frames.
        layout: where rows go; None puts the F * T feature rows alone on the tower's device.
        text: `(text rows, D)` embeddings to be laid out between the features.
        num_frames: frames of each video, where a tower looks at clips; None: they are all of one.
        on_features: where nothing is differentiated, called with the tower's rows (F', T, C) of some frames after the
            other, and with these frames (F', 3, h, w).

    Returns:
        `(total rows, D)`. In bounded memory beside the result unless `recompute` is off in training.
    """
    tower_parameters = _trainable(*used_tower_modules(tower, config))
    projector_parameters = _trainable(projector)
    device = execution_device(projector)
    if layout is None:
        layout = RowLayout(len(pixels) * config.tokens_per_frame, device)
    # Rows may be the largest tensor of a step: under autocast they take the lower precision they were computed in.
    own = (p.dtype for p in projector.parameters() if p.is_floating_point())  # none where quantised
    dtype = text.dtype if text is not None else next(own, torch.get_default_dtype())
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)

    tower_trains = bool(tower_parameters) or pixels.requires_grad
    training = torch.is_grad_enabled() and (
        tower_trains or bool(projector_parameters) or (text is not None and text.requires_grad)
    )
    # A chunk that is differentiated holds the activations of every layer, so it is smaller (the paper's code used 8).
    most = max(1, config.vision_chunk_frames // 4) if training and tower_trains else config.vision_chunk_frames
    chunks = whole_clips([len(pixels)] if num_frames is None else num_frames, config.clip_frames, most)
    sizes = [sum(clips) for clips in chunks]
    clips_at = dict(zip(itertools.accumulate(sizes, initial=0), chunks, strict=False))

    def encode(piece: Tensor, first: int) -> Tensor:
        return encode_frames(tower, config, piece, clips_at[first])

    def project(piece: Tensor, first: int) -> Tensor:
        return projector(piece.to(device)).flatten(0, 1)

    def both(piece: Tensor, first: int) -> Tensor:
        features = encode(piece, first)
        if on_features is not None:
            on_features(features, piece)
        return project(features, first)

    def job(run: Callable[[Tensor, int], Tensor]) -> ChunkJob:
        devices = list({device, execution_device(tower)})
        return ChunkJob(run, sizes, config.tokens_per_frame, config.text_config.hidden_size, dtype, layout, devices)

    if not training:
        with torch.no_grad():
            return fill_rows(job(both), pixels, text)
    if not recompute:
        rows = torch.cat([both(piece, first) for first, piece in job(both).pieces(pixels)])
        return _interleave(rows.to(dtype), text, layout)
    if tower_trains:
        return ChunkedRows.apply(job(both), pixels, text, *tower_parameters, *projector_parameters)
    # With a frozen tower its pooled output is kept beside the rows (it is no larger than they are): backward needs
    # the projector only, and the tower never runs twice.
    with torch.no_grad():
        kept = torch.cat([encode(piece, first).to(layout.device) for first, piece in job(encode).pieces(pixels)])
    return ChunkedRows.apply(job(project), kept, text, *projector_parameters)


def _interleave(features: Tensor, text: Tensor | None, layout: RowLayout) -> Tensor:
    features = features.to(layout.device)
    if layout.computed_rows is None:
        return features
    out = features.new_zeros(layout.total_rows, features.shape[1])
    out = out.index_copy(0, layout.computed_rows.to(layout.device), features)
    if text is None or layout.text_rows is None:
        return out
    return out.index_copy(0, layout.text_rows.to(layout.device), text.to(layout.device, out.dtype))
