"""Augmentation of clips: crops, flips, RandAugment and random erasing of frames, mixup and cutmix of batches.

All frames of a clip share their random numbers. Pictures are changed by Pillow, which the package stands on anyway.
Libraries that have RandAugment were weighed: torchvision and timm (which imports it) are not to be needed; kornia (31
MB) counts magnitudes otherwise than the recipes do and draws for every picture of a batch; albumentations is no longer
kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

_GREY = (124, 116, 104)  # ImageNet's mean colour, which fills what a shift uncovers
_TOP = 10.0  # magnitude at which an operation is at its strongest
_SCALES = (1.0, 0.875, 0.75, 0.66)  # of a multi-scale crop

Change = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training clip.

    Args:
        size: side of the result in pixels.
        crop: "random" (a part of 8 to 100 % of the picture, sides 3:4 to 4:3), "gentle" (50 to 100 %), "scales" (a
            square of 1, 7/8, 3/4 or 0.66 of the shorter side at a corner, an edge or the middle; sides may differ by
            one step) or "none" (the middle).
        flip: mirror half of the clips; not where left and right matter, as in Something-Something.
        randaugment_ops: operations a clip, each applied with probability 1/2; 0 is none. randaugment_magnitude: 0..10,
            around which each is drawn with deviation randaugment_std.
        erase: probability that a rectangle is replaced by noise.
    """

    size: int
    crop: str = "random"
    flip: bool = True
    randaugment_ops: int = 0
    randaugment_magnitude: float = 9.0
    randaugment_std: float = 0.5
    erase: float = 0.0

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise ValueError(f"crop={self.crop!r} is not valid: use one of {', '.join(CROPS)}")
        for name in ("erase", "randaugment_magnitude"):
            most = 1 if name == "erase" else _TOP
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)} is not valid: it must be within 0..{most:g}")

    def __call__(self, frames: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
        """Augment frames, uint8 (height, width, 3) each and of one size: uint8 (frames, size, size, 3)."""
        height, width = frames[0].shape[:2]
        box = CROPS[self.crop](height, width, rng)
        mirrored = self.flip and rng.random() < 0.5
        changes = draw_randaugment(
            rng, self.randaugment_ops, self.randaugment_magnitude, self.randaugment_std, self.size
        )
        erased = draw_erasing(rng, self.size) if rng.random() < self.erase else None
        done = []
        for frame in frames:
            picture = Image.fromarray(frame).resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
            if mirrored:
                picture = ImageOps.mirror(picture)
            for change in changes:
                picture = change(picture)
            done.append(np.asarray(picture))
        clip = np.stack(done)
        if erased is not None:
            top, left, tall, wide = erased
            noise = rng.normal(0.45, 0.225, size=(len(clip), tall, wide, 3))  # of normalised pixels: about N(0, 1)
            clip[:, top : top + tall, left : left + wide] = (noise * 255).clip(0, 255).astype(np.uint8)
        return clip


Box = tuple[float, float, float, float]


def _random_part(height: int, width: int, rng: np.random.Generator, least: float) -> Box:
    """Left, top, right, bottom of a part of a picture with at least `least` of its area."""
    for _ in range(10):
        area = height * width * rng.uniform(least, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        wide, tall = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if wide <= width and tall <= height:
            left, top = rng.uniform(0, width - wide), rng.uniform(0, height - tall)
            return left, top, left + wide, top + tall
    return _middle(height, width)


def _middle(height: int, width: int, rng: np.random.Generator | None = None) -> Box:
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _scaled(height: int, width: int, rng: np.random.Generator) -> Box:
    side = min(height, width)
    first = int(rng.integers(len(_SCALES)))
    second = int(np.clip(first + rng.integers(-1, 2), 0, len(_SCALES) - 1))
    wide, tall = side * _SCALES[first], side * _SCALES[second]
    left = (width - wide) * int(rng.integers(5)) / 4
    top = (height - tall) * int(rng.integers(5)) / 4
    return left, top, left + wide, top + tall


CROPS: dict[str, Callable[[int, int, np.random.Generator], Box]] = {
    "random": lambda height, width, rng: _random_part(height, width, rng, 0.08),
    "gentle": lambda height, width, rng: _random_part(height, width, rng, 0.5),
    "scales": _scaled,
    "none": _middle,
}


def draw_erasing(rng: np.random.Generator, size: int) -> tuple[int, int, int, int]:
    """Top, left, height, width of a rectangle of 2 to 33 % of a square picture, sides 0.3:1 to 1:0.3."""
    while True:
        area, ratio = size * size * rng.uniform(0.02, 1 / 3), math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        tall, wide = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < tall < size and 0 < wide < size:
            return int(rng.integers(size - tall + 1)), int(rng.integers(size - wide + 1)), tall, wide


# ------------------------------------------------------------------------------------------- RandAugment
def _moved(matrix: Callable[[float], tuple[float, ...]]) -> Callable[[float], Change]:
    def of(amount: float) -> Change:
        return lambda picture: picture.transform(
            picture.size, Image.Transform.AFFINE, matrix(amount), Image.Resampling.BICUBIC, fillcolor=_GREY
        )

    return of


def _enhanced(kind: Callable[[Image.Image], ImageEnhance.Color]) -> Callable[[float], Change]:
    return lambda amount: lambda picture: kind(picture).enhance(max(0.1, 1 + 0.9 * amount))


def _solarize_add(amount: float) -> Change:
    added = int(abs(amount) * 110)
    table = [min(255, value + added) if value < 128 else value for value in range(256)] * 3
    return lambda picture: picture.point(table)


def operations(size: int) -> dict[str, Callable[[float], Change]]:
    """Every operation on pictures of `size` pixels, of a strength -1..1; those without direction take its size."""
    return {
        "auto_contrast": lambda amount: ImageOps.autocontrast,
        "equalize": lambda amount: ImageOps.equalize,
        "invert": lambda amount: ImageOps.invert,
        "rotate": lambda amount: lambda p: p.rotate(30 * amount, Image.Resampling.BICUBIC, fillcolor=_GREY),
        "posterize": lambda amount: lambda p: ImageOps.posterize(p, max(1, 4 - int(4 * abs(amount)))),
        "solarize": lambda amount: lambda p: ImageOps.solarize(p, 256 - int(256 * abs(amount))),
        "solarize_add": _solarize_add,
        "color": _enhanced(ImageEnhance.Color),
        "contrast": _enhanced(ImageEnhance.Contrast),
        "brightness": _enhanced(ImageEnhance.Brightness),
        "sharpness": _enhanced(ImageEnhance.Sharpness),
        "shear_x": _moved(lambda amount: (1, 0.3 * amount, 0, 0, 1, 0)),
        "shear_y": _moved(lambda amount: (1, 0, 0, 0.3 * amount, 1, 0)),
        "translate_x": _moved(lambda amount: (1, 0, 0.45 * amount * size, 0, 1, 0)),
        "translate_y": _moved(lambda amount: (1, 0, 0, 0, 1, 0.45 * amount * size)),
    }


OPERATIONS = tuple(operations(1))


def draw_randaugment(rng: np.random.Generator, ops: int, magnitude: float, std: float, size: int) -> list[Change]:
    """The changes that one clip undergoes: `ops` are drawn, and each is applied with probability 1/2.

    A change's strength is drawn around `magnitude` (0..10) with deviation `std` and grows with it; its sign is random.
    """
    known, changes = operations(size), []
    for number in rng.integers(len(OPERATIONS), size=ops):
        strength = float(np.clip(rng.normal(magnitude, std), 0, _TOP)) / _TOP
        sign = 1 if rng.random() < 0.5 else -1
        if rng.random() < 0.5:
            changes.append(known[OPERATIONS[number]](sign * strength))
    return changes


# ------------------------------------------------------------------------------------------ whole batches
def soft_labels(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Class numbers (B,) as probabilities fp32 (B, classes): `smoothing` is spread over all classes."""
    off = smoothing / classes
    soft = torch.full((len(labels), classes), off, device=labels.device)
    return soft.scatter_(1, labels.view(-1, 1), 1 - smoothing + off)


def mix_batch(
    pixels: Tensor, targets: Tensor, mixup: float, cutmix: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Mix every clip with its counterpart from the end of the batch, all by the same share.

    Args:
        pixels: floating point (B, T, channels, H, W). targets: (B, classes) probabilities.
        mixup: parameter of the Beta distribution that the share is drawn from where clips are blended; 0: never.
        cutmix: the same where a rectangle, the same in all frames, is taken from the other; 0: never. Where both are
            wanted, half of the batches get each.
    """
    if mixup <= 0 and cutmix <= 0:
        return pixels, targets
    cut = cutmix > 0 and (mixup <= 0 or rng.random() < 0.5)
    share = float(rng.beta(cutmix, cutmix) if cut else rng.beta(mixup, mixup))
    other = pixels.flip(0)
    if cut:
        height, width = pixels.shape[-2:]
        tall, wide = int(height * math.sqrt(1 - share)), int(width * math.sqrt(1 - share))
        y, x = int(rng.integers(height)), int(rng.integers(width))
        top, bottom = max(0, y - tall // 2), min(height, y + tall // 2)
        left, right = max(0, x - wide // 2), min(width, x + wide // 2)
        pixels = pixels.clone()
        pixels[..., top:bottom, left:right] = other[..., top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        pixels = share * pixels + (1 - share) * other
    return pixels, share * targets + (1 - share) * targets.flip(0)
