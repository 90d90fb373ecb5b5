"""Frames that are pictures already: PIL images, arrays, tensors, image files, a directory of images."""

import contextlib
import importlib
import warnings
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError, features

from .frame_fitting import MAX_FRAME_PIXELS, check_frame_pixels
from .frame_pixels import TRANSPARENT, on_black, picture_to_sdr
from .video_source_names import IMAGE_SUFFIXES

_HEAD = 4096
"""Bytes of a file that tell what it is."""


def is_picture(value: Any) -> bool:
    """Whether `value` is one picture in memory: a PIL image or an array or tensor of three axes."""
    return isinstance(value, Image.Image) or (isinstance(value, np.ndarray | torch.Tensor) and value.ndim == 3)


def split_array(frames: np.ndarray | torch.Tensor, name: str) -> np.ndarray | torch.Tensor:
    """Views an array of one or more frames as `(F, H, W, 3)` without copying it.

    Args:
        frames: `(F, H, W, 3)`, `(F, 3, H, W)`, `(H, W, 3)` or `(3, H, W)`, or with 1 instead of 3 for grey; where
            both fit, channels come last, and where both 3 and 1 do, there are 3.

    Raises:
        ValueError: any other shape, or no frames.
    """
    if frames.ndim == 3:
        frames = frames[None]
    channels = next((n for n in (3, 1) if frames.ndim == 4 and n in (frames.shape[-1], frames.shape[1])), None)
    if channels is None:
        raise ValueError(
            f"{name}: frames must have the shape (frames, height, width, 3) or (frames, 3, height, width), grey ones "
            f"1 instead of 3, not {tuple(frames.shape)}"
        )
    if 0 in frames.shape:
        raise ValueError(f"{name}: the shape {tuple(frames.shape)} holds no frames")
    if frames.shape[-1] != channels:
        frames = frames.permute(0, 2, 3, 1) if isinstance(frames, torch.Tensor) else frames.transpose(0, 2, 3, 1)
    if channels == 1:
        shape = (*frames.shape[:3], 3)
        frames = frames.expand(shape) if isinstance(frames, torch.Tensor) else np.broadcast_to(frames, shape)
    return frames


def refuse_ambiguous_array(array: np.ndarray | torch.Tensor, name: str) -> None:
    """Refuse an array `(3, H, W)`: it may be one picture, channels first, or three grey frames.

    Raises:
        ValueError: it is one.
    """
    if array.ndim == 3 and array.shape[0] == 3 != array.shape[-1]:
        raise ValueError(
            f"{name}: the shape {tuple(array.shape)} is one picture or three grey frames; pass `array[None]` for the "
            "picture, `array[..., None]` for the frames"
        )


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


def image_pixels(image: Image.Image, name: str, problems: list[str] | None = None) -> np.ndarray:
    """A PIL image as uint8 `(H, W, 3)` RGB, turned upright by its EXIF orientation, transparent parts on black.

    Of a photograph with further pictures in it (MPO: a preview, a gain map), the main one.

    Args:
        problems: told if parts are transparent.

    Raises:
        ValueError: it is animated, or too large.
    """
    check_frame_pixels(image.width, image.height, name)
    if getattr(image, "n_frames", 1) > 1:
        if image.format != "MPO":
            raise ValueError(f"{name}: animated images are not supported as pictures; convert to mp4 or gif first")
        image.seek(0)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # Pillow would clip 16-bit grey instead of scaling it
        values = np.asarray(image)
        image = Image.fromarray((values >> 8 if image.mode != "I" or values.max() > 255 else values).astype(np.uint8))
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        pixels = np.asarray(image.convert("RGBA"))
        pixels, covered = on_black(pixels[..., :3], pixels[..., 3:])
        if covered and problems is not None:
            problems.append(TRANSPARENT)
        return pixels
    return np.asarray(image.convert("RGB"))


def file_pixels(file: Path | bytes, name: str, problems: list[str] | None = None) -> np.ndarray:
    """Decode one image file (or its bytes) to uint8 `(H, W, 3)` RGB; see `image_pixels`.

    Raises:
        ValueError: not an image, damaged, or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # check_frame_pixels is the limit
            with Image.open(BytesIO(file) if isinstance(file, bytes) else file) as image:
                head = file[:_HEAD] if isinstance(file, bytes) else _head(file)
                return picture_to_sdr(image_pixels(image, name, problems), head)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: the image is larger than the limit of {MAX_FRAME_PIXELS} pixels") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{name}: not a readable image ({error})") from error


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD)


def is_image_bytes(data: bytes) -> bool:
    """Whether the bytes start like a still image that Pillow reads (GIFs and moving PNGs are videos here)."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return b"acTL" not in data[:_HEAD]
    if data[4:8] == b"ftyp":  # pictures coded like a video: FFmpeg would read one tile of them
        return _pillow_reads(data[8:12])
    return data.startswith((b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")) or (
        data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    )


def is_image_file(path: Path) -> bool:
    """Whether a file is a still image that Pillow reads, by its name and, where that leaves it open, its beginning."""
    suffix = path.suffix.lower()
    if suffix in (".avif", ".heic", ".heif", ".png"):
        head = _head(path)
        return is_image_bytes(head) or not (head[4:8] == b"ftyp" or b"acTL" in head)
    return suffix in IMAGE_SUFFIXES


def _pillow_reads(brand: bytes) -> bool:
    """Whether Pillow reads files of this brand: AVIF from 11.3 on, HEIC where pillow-heif is installed."""
    if brand == b"avif":
        with contextlib.suppress(ValueError):  # a Pillow that does not know the word
            return bool(features.check("avif"))
    if brand in (b"heic", b"heix", b"heim", b"heis", b"mif1"):
        with contextlib.suppress(ImportError):
            importlib.import_module("pillow_heif").register_heif_opener()
            return True
    return False


class PictureSource:
    """Frames that exist as pictures: `len()` of them, converted one at a time.

    Args:
        pictures: PIL images, arrays `(H, W, 3)` or `(3, H, W)`, or paths of image files, one entry a frame.
        name: for messages.
        skip_unreadable: leave unreadable files out with a warning (directories) instead of failing.
    """

    def __init__(self, pictures: Sequence[Any] | np.ndarray | torch.Tensor, name: str, skip_unreadable: bool = False):
        if len(pictures) == 0:
            raise ValueError(f"{name}: there are no frames")
        self.pictures = pictures
        self.name = name
        self.skip_unreadable = skip_unreadable

    def __len__(self) -> int:
        return len(self.pictures)

    def pixels(self, index: int, problems: list[str] | None = None) -> np.ndarray:
        """Frame `index` as uint8 `(H, W, 3)`; `problems` is told if parts of it are transparent."""
        picture = self.pictures[index]
        if isinstance(picture, Image.Image):
            return image_pixels(picture, self.name, problems)
        if isinstance(picture, np.ndarray | torch.Tensor):
            return array_pixels(split_array(picture, self.name)[0], self.name)
        return file_pixels(picture, self.name if isinstance(picture, bytes) else str(picture), problems)

    def read(self, wanted: np.ndarray, problems: list[str]) -> Iterator[tuple[np.ndarray, int]]:
        """Yield `(pixels, index)` for the wanted indices, noting skipped pictures in `problems`."""
        for index in wanted.tolist():
            try:
                pixels = self.pixels(index, problems)
            except ValueError as error:
                if not self.skip_unreadable:
                    raise
                problems.append(f"skipped an image: {error}")
                continue
            yield pixels, index


def split_videos(videos: Any) -> list[Any]:
    """List the videos in what a caller passes as `videos`: one, a list of them, or a list of lists (one a prompt).

    A list of pictures (PIL images or arrays of three axes) is one video; an array of five axes is a batch.
    """
    if isinstance(videos, np.ndarray | torch.Tensor) and videos.ndim == 5:
        return list(videos)
    if not isinstance(videos, list | tuple):
        return [videos]
    if len(videos) > 0 and all(is_picture(frame) for frame in videos):
        return [videos]
    return [video for item in videos for video in (split_videos(item) if isinstance(item, list | tuple) else [item])]
