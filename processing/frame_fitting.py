"""Fits one picture to the size a model takes: the single place where frames are resized.

Every source of frames (decoded video, image files, arrays) goes through `fit_frame`, so the same picture gives the
same pixels whichever way it comes in. The filter is Pillow's antialiased bicubic, that of CLIP's own preprocessing.
"""

import numpy as np
from PIL import Image

RESIZE_MODES = ("squash", "crop", "pad")

MAX_FRAME_PIXELS = 2**26
"""Largest picture that is decoded (8K is 33 million pixels): a small damaged or hostile file may claim gigabytes."""


def check_frame_pixels(width: int, height: int, name: str) -> None:
    """Refuse pictures too large to decode, from the size their header claims.

    Raises:
        ValueError: `width * height` is more than `MAX_FRAME_PIXELS`.
    """
    if width * height > MAX_FRAME_PIXELS:
        raise ValueError(
            f"{name}: frames of {width}x{height} pixels are more than the limit of {MAX_FRAME_PIXELS} pixels; "
            "scale the video down first"
        )


def check_resize(size: tuple[int, int] | None, resize_mode: str) -> tuple[int, int] | None:
    """Validate a `(height, width)` in pixels (None keeps the native size) and the name of a resize mode."""
    if resize_mode not in RESIZE_MODES:
        raise ValueError(f"resize_mode must be one of {', '.join(RESIZE_MODES)}, not {resize_mode!r}")
    if size is None:
        return None
    height, width = (int(side) for side in size)
    if height < 1 or width < 1:
        raise ValueError(f"size must be (height, width) of at least 1 pixel, not {tuple(size)}")
    check_frame_pixels(width, height, "size")
    return height, width


def fit_frame(pixels: np.ndarray, size: tuple[int, int] | None, resize_mode: str = "squash") -> np.ndarray:
    """Resize one RGB picture.

    Args:
        pixels: uint8 `(height, width, 3)`.
        size: `(height, width)` to reach; None returns the picture as it is.
        resize_mode: "squash" scales both sides freely (nothing is lost, proportions change), "crop" keeps proportions
            and cuts the middle out, "pad" keeps proportions and fills the rest with black.

    Returns:
        uint8 `(size[0], size[1], 3)`.
    """
    if size is None or pixels.shape[:2] == tuple(size):
        return pixels
    height, width = size
    image = Image.fromarray(pixels)
    if resize_mode == "squash":
        return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    if resize_mode == "crop":
        scale = min(image.width / width, image.height / height)
        left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
        box = (left, top, left + width * scale, top + height * scale)
        return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box))
    scale = min(width / image.width, height / image.height)
    inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize(inner, Image.Resampling.BICUBIC), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return np.asarray(canvas)
