"""Reads every row of a list of clips as training would."""

from __future__ import annotations

import functools
import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...processing.video_processing_videomamba import read_clips
from ..data.checking import CheckedSample, content_key, remedy, run_checks
from ..data.collator import describe
from .clip_rows import ClipRow, ClipRows


def check_clip(row: ClipRow, num_frames: int) -> CheckedSample:
    """Decode the `num_frames` frames of one row that a test would look at."""
    source = str(row.source) if isinstance(row.source, str | os.PathLike) else ""
    part = f"{row.start or 0:g}-{row.end:g} s" if row.end is not None else "whole"
    found: dict[str, Any] = {
        "id": row.name,
        "source": source,
        "wanted_frames": num_frames,
        "row_key": f"{source} {part} {row.label}" if source else "",
        "video_key": content_key(source),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            frames, _ = read_clips(row.open(), num_frames, fit=np.shape, start=row.start, end=row.end)
        except Exception as error:
            return CheckedSample(**found, error=describe(error), remedy=remedy(error))
    return CheckedSample(**found, frames=len(frames))


def check_clips(
    rows: ClipRows, num_frames: int, *, workers: int = 0, partial: Path | None = None
) -> Iterator[tuple[int, CheckedSample]]:
    """Yield `(place, what was found)` of every row; `workers` and `partial` as for `check_rows`."""
    text = "\n".join(f"{row.name} {row.label} {row.end}" for row in rows.rows) + f"\n{num_frames}"
    key = hashlib.sha256(text.encode()).hexdigest()
    yield from run_checks(
        rows.rows, functools.partial(check_clip, num_frames=num_frames), key, workers=workers, partial=partial
    )


def label_counts(rows: ClipRows) -> dict[str, int]:
    """How many rows every class has; none where values are predicted."""
    counts = Counter(row.label for row in rows.rows)
    return {name: counts[number] for number, name in enumerate(rows.classes)}
