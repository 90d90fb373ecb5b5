"""From pixels to rows of the language model's input: vision tower, 2x2 pooling, projector, in chunks of frames.

Frames are independent of each other, so they are the third axis along which activations can be recomputed: the tower
sees a few frames at a time in forward, and again in backward when something before the language model trains. Peak
memory is that of one chunk plus the rows themselves, which may live in host memory.

Shapes: F frames, T tokens per frame, D model width, N rows in all.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers.activations import ACT2FN


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


def used_layer_count(config: Any) -> int:
    """Encoder layers below hidden state `config.vision_feature_layer` (transformers counts the embedding as 0)."""
    layer = config.vision_feature_layer
    return layer if layer >= 0 else config.vision_config.num_hidden_layers + 1 + layer


def used_tower_modules(tower: nn.Module, config: Any) -> Iterator[nn.Module]:
    """The parts of a CLIP or SigLIP tower that the features depend on."""
    yield tower.embeddings
    if hasattr(tower, "pre_layrnorm"):
        yield tower.pre_layrnorm
    yield from tower.encoder.layers[: used_layer_count(config)]


def freeze_unused_tower_parameters(tower: nn.Module, config: Any) -> None:
    """Take gradients off the tail that never runs: DDP stops with an error on parameters without a gradient."""
    used = {id(p) for module in used_tower_modules(tower, config) for p in module.parameters()}
    for parameter in tower.parameters():
        if id(parameter) not in used:
            parameter.requires_grad_(False)


def execution_device(module: nn.Module) -> torch.device:
    """Where `module` computes; under `device_map` with offloading its weights may be elsewhere (accelerate's hook)."""
    for part in module.modules():
        hook_device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if hook_device is not None:
            return torch.device(hook_device if not isinstance(hook_device, int) else f"cuda:{hook_device}")
    return next(module.parameters()).device


def normalise_pixels(pixels: Tensor, config: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Move a chunk to `device` and bring it to the tower's scale.

    Args:
        pixels: `(F, 3, h, w)`; uint8 is raw RGB 0..255, floating point is already normalised.

    Raises:
        ValueError: a channel count other than 3, an integer type other than uint8, or NaN/inf among the values.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixel_values_videos must have the shape (frames, 3, height, width), not {tuple(pixels.shape)}")
    pixels = pixels.to(device, non_blocking=True)
    if pixels.dtype == torch.uint8:
        mean = torch.tensor(config.image_mean, device=device).view(1, 3, 1, 1)
        std = torch.tensor(config.image_std, device=device).view(1, 3, 1, 1)
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


def encode_frames(tower: nn.Module, config: Any, pixels: Tensor) -> Tensor:
    """One chunk of frames `(F, 3, h, w)` -> pooled patch features `(F, T, vision width)`.

    The layers are walked here instead of calling the tower, so that what lies above the wanted hidden state is not
    computed; the result equals `tower(pixels, output_hidden_states=True).hidden_states[config.vision_feature_layer]`.
    """
    device = execution_device(tower)
    dtype = tower.embeddings.patch_embedding.weight.dtype
    hidden = tower.embeddings(normalise_pixels(pixels, config, device, dtype))
    if hasattr(tower, "pre_layrnorm"):
        hidden = tower.pre_layrnorm(hidden)
    for layer in tower.encoder.layers[: used_layer_count(config)]:
        hidden = layer(hidden, None)
    if hasattr(tower.embeddings, "class_embedding"):
        hidden = hidden[:, 1:]  # CLIP's class token says nothing about a place in the frame
    return pool_patches(hidden, config.patches_per_side, config.spatial_pool_stride, config.spatial_pool_mode)


@dataclass
class RowLayout:
    """Where feature and text rows go in the output of `(total_rows, D)`; positions are int64 on the CPU.

    `None` positions mean that features fill the whole output in order.
    """

    total_rows: int
    device: torch.device
    feature_rows: Tensor | None = None
    text_rows: Tensor | None = None

    def select(self, first: int, last: int) -> slice | Tensor:
        """Output rows of features `first..last`: a slice where they are consecutive, which is nearly always."""
        if self.feature_rows is None:
            return slice(first, last)
        rows = self.feature_rows[first:last]
        if len(rows) and int(rows[-1] - rows[0]) == len(rows) - 1:
            return slice(int(rows[0]), int(rows[-1]) + 1)
        return rows.to(self.device)

    def empty(self, width: int, dtype: torch.dtype, pinned: bool) -> Tensor:
        return torch.empty(self.total_rows, width, dtype=dtype, device=self.device, pin_memory=pinned)


@dataclass
class _ChunkJob:
    """What `_ChunkedRows` needs beside its tensors. `run` maps a chunk of the source to `(items, T, D)`."""

    run: Callable[[Tensor], Tensor]
    chunk: int
    tokens: int
    width: int
    dtype: torch.dtype
    layout: RowLayout
    compute_device: torch.device


def _fill_rows(job: _ChunkJob, source: Tensor, text: Tensor | None, before_chunk: Callable[[], None]) -> Tensor:
    pinned = job.layout.device.type == "cpu" and job.compute_device.type == "cuda"
    out = job.layout.empty(job.width, job.dtype, pinned)
    if text is not None:
        out[job.layout.text_rows.to(out.device)] = text.to(out.device, out.dtype)
    for start in range(0, len(source), job.chunk):
        before_chunk()
        rows = job.run(source[start : start + job.chunk]).flatten(0, 1)
        target = job.layout.select(start * job.tokens, start * job.tokens + len(rows))
        out[target] = rows.to(out.device, out.dtype)
    return out


class _ChunkedRows(torch.autograd.Function):
    """Fill the rows chunk by chunk without a graph; recompute each chunk in backward.

    Parameters are inputs, their gradients are summed over chunks in fp32 and handed to autograd once, so that the
    hooks of DDP, ZeRO and FSDP fire once per backward. Every chunk runs again with the random state it had.
    """

    @staticmethod
    def forward(ctx: Any, job: _ChunkJob, source: Tensor, text: Tensor | None, *parameters: Tensor) -> Tensor:
        kind = job.compute_device.type
        ctx.autocast = {
            "device_type": kind,
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
            # A weight cast here, without a graph, must not be found in the cache by code that wants its gradient.
            "cache_enabled": False,
        }
        ctx.random_states = []

        def keep_random_state() -> None:
            probe = torch.empty(0, device=job.compute_device)
            ctx.random_states.append((torch.get_rng_state(), get_device_states(probe)))

        with torch.autocast(**ctx.autocast):
            out = _fill_rows(job, source, text, keep_random_state)
        ctx.job, ctx.parameters, ctx.text_like = job, parameters, None if text is None else text[:0]
        ctx.save_for_backward(source)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        job, parameters = ctx.job, ctx.parameters
        (source,) = ctx.saved_tensors
        grad_text = None
        if ctx.needs_input_grad[2]:
            rows = job.layout.text_rows.to(grad.device)
            grad_text = grad[rows].to(ctx.text_like.device, ctx.text_like.dtype)
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[3:]) if needed]
        grad_source = torch.empty_like(source) if ctx.needs_input_grad[1] else None
        if not wanted and grad_source is None:
            return (None, None, grad_text, *(None for _ in parameters))

        sums: list[Tensor | None] = [None] * len(parameters)
        devices = list(range(torch.cuda.device_count())) if job.compute_device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            for index, start in enumerate(range(0, len(source), job.chunk)):
                cpu_state, (device_ids, device_states) = ctx.random_states[index]
                torch.set_rng_state(cpu_state)
                set_device_states(device_ids, device_states, device_type=job.compute_device.type)
                piece = source[start : start + job.chunk].detach().requires_grad_(grad_source is not None)
                with torch.enable_grad(), torch.autocast(**ctx.autocast):
                    rows = job.run(piece).flatten(0, 1)
                target = job.layout.select(start * job.tokens, start * job.tokens + len(rows))
                asked = [parameters[i] for i in wanted] + ([piece] if grad_source is not None else [])
                found = torch.autograd.grad(rows, asked, grad[target].to(rows.device, rows.dtype), allow_unused=True)
                for i, gradient in zip(wanted, found, strict=False):
                    if gradient is not None:
                        sums[i] = gradient.float() if sums[i] is None else sums[i].add_(gradient)
                if grad_source is not None:
                    grad_source[start : start + job.chunk] = found[-1]
        grads = [None if s is None else s.to(p.dtype) for s, p in zip(sums, parameters, strict=True)]
        return (None, grad_source, grad_text, *grads)


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
) -> Tensor:
    """Run frames through tower, pooling and projector and lay the rows out, by themselves or among text embeddings.

    Args:
        pixels: `(F, 3, h, w)`, on any device; chunks are moved to the tower's.
        recompute: when something here needs a gradient, keep no activations and run each chunk again in backward;
            otherwise autograd keeps the activations of all frames.
        layout: where rows go; None puts the F * T feature rows alone on the tower's device.
        text: `(text rows, D)` embeddings to be laid out between the features.

    Returns:
        `(total rows, D)`. In bounded memory beside the result unless `recompute` is off in training.
    """
    tower_parameters = _trainable(*used_tower_modules(tower, config))
    projector_parameters = _trainable(projector)
    device = execution_device(projector)
    if layout is None:
        layout = RowLayout(len(pixels) * config.tokens_per_frame, device)
    dtype = projector.linear_2.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if text is not None:
        dtype = text.dtype

    tower_trains = bool(tower_parameters) or pixels.requires_grad
    training = torch.is_grad_enabled() and (
        tower_trains or bool(projector_parameters) or (text is not None and text.requires_grad)
    )
    # A chunk that is differentiated holds the activations of every layer, so it is smaller (the paper's code used 8).
    chunk = max(1, config.vision_chunk_frames // 4) if training and tower_trains else config.vision_chunk_frames

    def encode(piece: Tensor) -> Tensor:
        return encode_frames(tower, config, piece)

    def project(piece: Tensor) -> Tensor:
        return projector(piece.to(device))

    def job(run: Callable[[Tensor], Tensor]) -> _ChunkJob:
        width = config.text_config.hidden_size
        return _ChunkJob(run, chunk, config.tokens_per_frame, width, dtype, layout, device)

    if not training:
        with torch.no_grad():
            return _fill_rows(job(lambda piece: project(encode(piece))), pixels, text, lambda: None)
    if not recompute:
        pieces = [project(encode(piece)).flatten(0, 1) for piece in pixels.split(chunk)]
        return _interleave(torch.cat(pieces).to(dtype), text, layout)
    if tower_trains:
        whole = job(lambda piece: project(encode(piece)))
        return _ChunkedRows.apply(whole, pixels, text, *tower_parameters, *projector_parameters)
    # With a frozen tower its pooled output is kept beside the rows (it is no larger than they are): backward needs
    # the projector only, and the tower never runs twice.
    with torch.no_grad():
        kept = torch.cat([encode(piece).to(layout.device) for piece in pixels.split(chunk)])
    return _ChunkedRows.apply(job(project), kept, text, *projector_parameters)


def _interleave(features: Tensor, text: Tensor | None, layout: RowLayout) -> Tensor:
    features = features.to(layout.device)
    if layout.feature_rows is None:
        return features
    out = features.new_zeros(layout.total_rows, features.shape[1])
    out = out.index_copy(0, layout.feature_rows.to(layout.device), features)
    if text is None:
        return out
    return out.index_copy(0, layout.text_rows.to(layout.device), text.to(layout.device, out.dtype))
