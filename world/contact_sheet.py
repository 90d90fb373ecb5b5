"""Pictures to look at: the frames of a rendered video side by side, with its questions printed below."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .dataset import WorldSample

_LINE = 14
_MARGIN = 4


def contact_sheet(sample: WorldSample, columns: int = 8, enlarge: int = 2, text: bool = True) -> Image.Image:
    """All frames of `sample` in reading order, `enlarge` times as large, and its questions with answers below."""
    frames = sample.frames.repeat(enlarge, axis=1).repeat(enlarge, axis=2)
    count, height, width = frames.shape[:3]
    columns = min(columns, count)
    rows = -(-count // columns)
    lines = [f"{q.text}  ->  {q.answer}" for q in sample.questions] if text else []
    sheet = np.zeros(
        (rows * (height + _MARGIN) + len(lines) * _LINE + _MARGIN, columns * (width + _MARGIN), 3), np.uint8
    )
    for number, frame in enumerate(frames):
        top, left = number // columns * (height + _MARGIN), number % columns * (width + _MARGIN)
        sheet[top : top + height, left : left + width] = frame
    picture = Image.fromarray(sheet)
    pen = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        pen.text((_MARGIN, rows * (height + _MARGIN) + number * _LINE), line, fill=(255, 255, 255))
    return picture


def save_contact_sheet(path: str | Path, sample: WorldSample, columns: int = 8, enlarge: int = 2) -> None:
    """Write `contact_sheet` as a picture file (the suffix decides the format)."""
    contact_sheet(sample, columns, enlarge).save(path)
