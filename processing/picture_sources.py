"""Frames that are pictures already: PIL images, arrays, tensors, image files, a directory of images."""

import re
import warnings
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from .frame_fitting import MAX_FRAME_PIXELS, check_frame_pixels

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def is_picture(value: Any) -> bool:
    """Whether `value` is one picture in memory: a PIL image or an array or tensor of three axes."""
    return isinstance(value, Image.Image) or (isinstance(value, np.ndarray | torch.Tensor) and value.ndim == 3)


def list_directory(directory: Path) -> list[Path]:
    """Image files of a directory in natural order (`frame2` before `frame10`).

    Raises:
        ValueError: there is none.
    """

    def natural(path: Path) -> list:
        return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", path.name)]

    files = [path for path in directory.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "."]
    if not files:
        raise ValueError(f"{directory}: the directory contains no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return sorted((path for path in files if path.is_file()), key=natural)


def split_array(frames: np.ndarray | torch.Tensor, name: str) -> Sequence[np.ndarray | torch.Tensor]:
    """Views an array of one or more frames as `(F, H, W, 3)` without copying it.

    Args:
        frames: `(F, H, W, 3)`, `(F, 3, H, W)`, `(H, W, 3)` or `(3, H, W)`; where both fit, channels come last.

    Raises:
        ValueError: any other shape, or no frames.
    """
    if frames.ndim == 3:
        frames = frames[None]
    if frames.ndim != 4 or 3 not in (frames.shape[-1], frames.shape[1]):
        raise ValueError(
            f"{name}: frames must have the shape (frames, height, width, 3) or (frames, 3, height, width), "
            f"not {tuple(frames.shape)}"
        )
    if 0 in frames.shape:
        raise ValueError(f"{name}: the shape {tuple(frames.shape)} holds no frames")
    if frames.shape[-1] != 3:
        frames = frames.permute(0, 2, 3, 1) if isinstance(frames, torch.Tensor) else frames.transpose(0, 2, 3, 1)
    return frames


def array_pixels(frame: np.ndarray | torch.Tensor, name: str) -> np.ndarray:
    """One frame `(H, W, 3)` as contiguous uint8: whole numbers are read as 0..255, fractions as 0..1.

    Raises:
        ValueError: NaN, infinite or out of range values.
    """
    if isinstance(frame, torch.Tensor):
        frame = frame.detach().cpu()
        frame = (frame.float() if frame.is_floating_point() else frame).numpy()
    check_frame_pixels(frame.shape[1], frame.shape[0], name)
    if frame.dtype == np.uint8:
        return np.ascontiguousarray(frame)
    if np.issubdtype(frame.dtype, np.floating):
        if not np.isfinite(frame).all():
            raise ValueError(f"{name}: the pixels contain NaN or infinite values")
        low, high = float(frame.min()), float(frame.max())
        if low < -1e-3 or high > 1 + 1e-3:
            raise ValueError(
                f"{name}: floating-point pixels must lie between 0 and 1, not {low:g} and {high:g}; "
                "pass uint8 pixels, or divide by 255"
            )
        return np.ascontiguousarray(np.rint(np.clip(frame, 0, 1) * 255).astype(np.uint8))
    if np.issubdtype(frame.dtype, np.integer):
        if frame.min() < 0 or frame.max() > 255:
            raise ValueError(f"{name}: whole-number pixels must lie between 0 and 255")
        return np.ascontiguousarray(frame.astype(np.uint8))
    raise ValueError(f"{name}: pixels of type {frame.dtype} are not supported; use uint8 or floating point")


def image_pixels(image: Image.Image, name: str) -> np.ndarray:
    """A PIL image as uint8 `(H, W, 3)` RGB, turned upright by its EXIF orientation."""
    check_frame_pixels(image.width, image.height, name)
    if getattr(image, "n_frames", 1) > 1:
        raise ValueError(f"{name}: animated images are not supported as pictures; convert to mp4 or gif first")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey instead of scaling it
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return np.asarray(image.convert("RGB"))


def file_pixels(file: Path | bytes, name: str) -> np.ndarray:
    """Decode one image file (or its bytes) to uint8 `(H, W, 3)` RGB.

    Raises:
        ValueError: not an image, damaged, or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # check_frame_pixels is the limit
            with Image.open(BytesIO(file) if isinstance(file, bytes) else file) as image:
                return image_pixels(image, name)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: the image is larger than the limit of {MAX_FRAME_PIXELS} pixels") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{name}: not a readable image ({error})") from error


def is_image_bytes(data: bytes) -> bool:
    """Whether the bytes start like a still image that Pillow reads (GIFs are videos here)."""
    magics = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"MM\0*")
    return data.startswith(magics) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


class PictureSource:
    """Frames that exist as pictures: `len()` of them, converted one at a time.

    Args:
        pictures: PIL images, arrays `(H, W, 3)` or `(3, H, W)`, or paths of image files, one entry a frame.
        name: for messages.
        skip_unreadable: leave unreadable files out with a warning (directories) instead of failing.
    """

    def __init__(self, pictures: Sequence[Any], name: str, skip_unreadable: bool = False):
        if len(pictures) == 0:
            raise ValueError(f"{name}: there are no frames")
        self.pictures = pictures
        self.name = name
        self.skip_unreadable = skip_unreadable

    def __len__(self) -> int:
        return len(self.pictures)

    def pixels(self, index: int) -> np.ndarray:
        """Frame `index` as uint8 `(H, W, 3)`."""
        picture = self.pictures[index]
        if isinstance(picture, Image.Image):
            return image_pixels(picture, self.name)
        if isinstance(picture, np.ndarray | torch.Tensor):
            return array_pixels(split_array(picture, self.name)[0], self.name)
        return file_pixels(picture, self.name if isinstance(picture, bytes) else str(picture))

    def read(self, wanted: np.ndarray, problems: list[str]) -> Iterator[tuple[np.ndarray, int]]:
        """Yield `(pixels, index)` for the wanted indices, noting skipped pictures in `problems`."""
        for index in wanted.tolist():
            try:
                pixels = self.pixels(index)
            except ValueError as error:
                if not self.skip_unreadable:
                    raise
                problems.append(f"skipped an image: {error}")
                continue
            yield pixels, index
