"""The first stage: the vision tower alone learns to say what stands in each cell of a frame.

Video-Ma2mba starts from a CLIP tower that already sees; this stage gives the small tower the same start, in a minute.
Single frames of training videos go through the tower and its pooling; linear heads, thrown away afterwards, name for
each of the pooled cells the colour, the shape and the place of the thing in it, the sign on the card and the sun.
A tower that looks at clips gets clips, whose frames follow each other.

Shapes: F frames, C pooled cells of a frame in raster order (the tokens of a frame), W vision width.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .. import BUNDLED_CHECKPOINT
from ..modeling_video_ma2mba.vision_features import encode_frames, used_tower_modules, whole_clips
from ..trainer.setting_names import BUNDLED
from . import World, WorldDataset
from .batches import imitate_mp4, only_item
from .world import CARD_SYMBOLS, COLOURS, SHAPES, SKY

_FRAMES_PER_VIDEO = 8
_CLASSES = {"colour": len(COLOURS) + 1, "shape": len(SHAPES) + 1, "sign": len(CARD_SYMBOLS) + 1, "sun": 2}
_COLOURS, _SHAPES = tuple(COLOURS), SHAPES
IGNORED = -100


def cell_labels(world: World, time: float, side: int) -> tuple[np.ndarray, np.ndarray]:
    """What the `side` x `side` cells of the frame at `time` show.

    Returns:
        classes, int64 (C, 4): colour, shape, sign, sun, 0 for none; and places, float32 (C, 2): where the thing's
        centre lies from the cell's, in cells (NaN where there is none). A cell shows the thing that covers its middle
        or whose centre it holds; a cell that a thing only touches is left out (-100).
    """
    classes = np.zeros((side * side, len(_CLASSES)), np.int64)
    places = np.full((side * side, 2), np.nan, np.float32)
    middles = (np.arange(side) + 0.5) / side
    y, x = (grid.ravel() for grid in np.meshgrid(middles, middles, indexing="ij"))
    card = world.card is not None and world.card.start <= time < world.card.start + 1
    if card:
        classes[:, 2] = CARD_SYMBOLS.index(world.card.symbol) + 1
    for thing in world.things:
        if not thing.start <= time < thing.end:
            continue
        at_x, at_y = thing.position(time)
        off_x, off_y = (at_x - x) * side, (at_y - y) * side
        away = np.maximum(np.abs(off_x), np.abs(off_y))
        reach = thing.radius * side
        touched, held = away < 0.5 + reach, away < max(0.5, 0.8 * reach)
        classes[touched & ~held, :2] = np.where(
            classes[touched & ~held, :2] == 0, IGNORED, classes[touched & ~held, :2]
        )
        classes[held, 0], classes[held, 1] = _COLOURS.index(thing.colour) + 1, _SHAPES.index(thing.shape) + 1
        places[held] = np.stack([off_x[held], off_y[held]], axis=1)
    if card:  # it hides the middle; what shows at its edges is not asked for
        classes[:, :2], places[:] = IGNORED, np.nan
    if world.sun:
        progress = (time + 0.5) / world.seconds
        top = y < max(SKY, 1 / side)
        classes[top & (x - 0.5 / side <= progress) & (progress < x + 0.5 / side), 3] = 1
    return classes, places


class TowerFrames(IterableDataset):
    """Endless batches of frames, `clip` that follow each other together, with the labels of their cells."""

    def __init__(self, frames_per_batch: int, side: int, seed: int, resolution: int, clip: int = 1):
        self.clip = clip
        self.frames_per_batch, self.side, self.seed = frames_per_batch, side, seed
        self.dataset = WorldDataset("train", 10**9, frames=(4, 24), seed=seed, resolution=resolution)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        torch.set_num_threads(1)
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        number = worker
        while True:
            yield self.batch(random.Random(f"tower {self.seed} {number}"))
            number += workers

    def batch(self, rng: random.Random) -> dict[str, Tensor]:
        """Random frames of random videos: uint8 pictures and, for each cell of each frame, what stands in it."""
        from . import WorldRenderer

        pictures, classes, places = [], [], []
        for _ in range(max(self.frames_per_batch // _FRAMES_PER_VIDEO, 1)):
            index = int(rng.random() * len(self.dataset))
            world = self.dataset.world(index)
            starts = [int(rng.random() * world.seconds) for _ in range(max(_FRAMES_PER_VIDEO // self.clip - 1, 0))]
            starts.append(world.card.start if world.card else 0)  # a frame in two dozens: too rare by itself
            latest = max(world.seconds - self.clip, 0)
            starts = [min(start, latest) for start in starts] if self.clip > 1 else starts
            times = [min(start + i, world.seconds - 1) for start in starts for i in range(self.clip)]
            frames = WorldRenderer(world, self.dataset.resolution).frames(times)
            pictures.append(imitate_mp4(frames, index % 2**32) if rng.random() < 0.5 else frames)
            for moment in times:
                seen = cell_labels(world, moment, self.side)
                classes.append(seen[0])
                places.append(seen[1])
        return {
            "pixels": torch.from_numpy(np.concatenate(pictures)).permute(0, 3, 1, 2).contiguous(),
            "classes": torch.from_numpy(np.stack(classes)),
            "places": torch.from_numpy(np.stack(places)),
        }


class TowerHeads(nn.Module):
    """Linear readings of a cell's features; `forward` returns the loss and the share of right cells per reading."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.readings = nn.ModuleDict({name: nn.Linear(width, count) for name, count in _CLASSES.items()})
        self.place = nn.Linear(width, 2)

    def forward(self, features: Tensor, classes: Tensor, places: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """features (F, C, W), classes (F, C, 4), places (F, C, 2)."""
        features = self.norm(features)
        loss, right = features.new_zeros((), dtype=torch.float32), {}
        for column, (name, reading) in enumerate(self.readings.items()):
            wanted = classes[..., column]
            logits = reading(features).float()
            # Most cells are empty: a cell with something in it counts as much as many empty ones.
            each = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none")
            weight = torch.where(wanted.flatten() > 0, 1.0, 0.15) * (wanted.flatten() != IGNORED)
            loss = loss + (each * weight).sum() / weight.sum().clamp(min=1)
            there = wanted > 0
            right[name] = (logits.argmax(-1) == wanted)[there].float().mean()
        known = ~places.isnan().any(-1)
        error = (self.place(features).float()[known] - places[known]).abs().mean()
        right["place_error"] = error
        return loss + error, {name: value.detach() for name, value in right.items()}


def clips_of(config: Any, frames: int) -> list[int]:
    """Lengths of the clips that `frames` frames in a row are to the tower."""
    return whole_clips([frames], config.clip_frames, frames)[0]


def tower_costs(model: Any, pixels: Tensor, repeats: int = 5) -> dict[str, float]:
    """Frames per second of the tower forward, and forward and backward, and (CUDA) the peak bytes a frame of each.

    Args:
        pixels: uint8 (F, 3, h, w).
    """
    config, tower = model.config, model.model.vision_tower
    cuda = pixels.device.type == "cuda"
    clips, found = clips_of(config, len(pixels)), {}
    for name in ("forward", "training"):
        seconds = []
        for _ in range(repeats):
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            begun = time.monotonic()
            with torch.set_grad_enabled(name == "training"), torch.autocast(pixels.device.type, torch.bfloat16, cuda):
                features = encode_frames(tower, config, pixels, clips)
            if name == "training":
                features.float().square().mean().backward()
            if cuda:
                torch.cuda.synchronize()
                found[f"{name} bytes a frame"] = (torch.cuda.max_memory_allocated() - before) / len(pixels)
            del features
            seconds.append(time.monotonic() - begun)
        found[f"{name} frames/s"] = len(pixels) / sorted(seconds)[repeats // 2]
    tower.zero_grad(set_to_none=True)
    return found


def take_tower_(model: Any, source: str, frames: int, seed: int) -> Tensor:
    """Give `model` the tower of the trained model `source`, a folder or `bundled`; returns the pixels of a batch of
    `frames` frames, uint8 (F, 3, h, w).

    Raises:
        ValueError: that tower is of another kind or size.
    """
    folder = BUNDLED_CHECKPOINT if source == BUNDLED else source
    other = type(model).from_pretrained(folder, dtype=torch.float32)
    tower, wanted = other.model.vision_tower.state_dict(), model.model.vision_tower.state_dict()
    if {name: value.shape for name, value in tower.items()} != {name: value.shape for name, value in wanted.items()}:
        raise ValueError(f"tower_from={source}: its vision tower is of another kind or size than this model's")
    model.model.vision_tower.load_state_dict(tower)
    config = model.config
    side = math.isqrt(config.tokens_per_frame)
    batches = TowerFrames(frames, side, seed, config.vision_config.image_size, config.clip_frames)
    pixels = batches.batch(random.Random(f"tower {seed}"))["pixels"]
    return pixels.to(next(model.parameters()).device)


def train_tower(
    model: Any, *, seconds: float, steps: int | None, frames_per_batch: int, workers: int, seed: int, rate: float
) -> Tensor:
    """Train `model`'s tower in place until `seconds` have passed or `steps` are done; returns the last batch's pixels,
    uint8 (F, 3, h, w)."""
    config, tower = model.config, model.model.vision_tower
    device = next(tower.parameters()).device
    side = math.isqrt(config.tokens_per_frame)
    heads = TowerHeads(config.vision_config.hidden_size).to(device)
    used = [p for module in used_tower_modules(tower, config) for p in module.parameters()]
    parameters = [*used, *heads.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.02, fused=device.type == "cuda"
    )
    frames = TowerFrames(frames_per_batch, side, seed, config.vision_config.image_size, config.clip_frames)
    loader = iter(
        DataLoader(frames, batch_size=1, collate_fn=only_item, num_workers=workers, pin_memory=device.type == "cuda")
    )
    begun, step, right = time.monotonic(), 0, {}
    while True:
        spent = (time.monotonic() - begun) / seconds if seconds else 0.0
        progress = max(spent, step / steps if steps else 0.0)
        if progress >= 1:
            break
        for group in optimizer.param_groups:  # warm-up, then a straight line down
            group["lr"] = rate * min((step + 1) / 100, 1.0) * max(1 - progress, 0.02)
        batch = {name: value.to(device, non_blocking=True) for name, value in next(loader).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            features = encode_frames(tower, config, batch["pixels"], clips_of(config, len(batch["pixels"])))
            loss, right = heads(features, batch["classes"], batch["places"])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 200 == 0:
            shown = " ".join(f"{name} {float(value):.3f}" for name, value in right.items())
            print(
                f"tower step {step} seconds {time.monotonic() - begun:.0f} loss {float(loss.detach()):.3f} {shown}",
                flush=True,
            )
    return batch["pixels"]
