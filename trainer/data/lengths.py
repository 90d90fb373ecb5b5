"""Lengths of samples, estimated from the headers of the videos alone, to put samples of like length into a batch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ...files.append_log import AppendLog, read_log
from ...files.progress import counted
from ...processing.video_decoding import open_stream
from ...processing.video_source_names import is_address, local_path
from ...processing.video_subtitles import read_subtitles
from .sample_encoding import EncodingSettings, conversation_of, lay_out, media_of

_DEFAULT_SECONDS = 60.0  # of a video that does not say how long it is, or is an address
_RATE = 30.0  # frames per second of a video that does not say
_RATES = (0.01, 1000.0)
Timing = tuple[float, float]
"""Seconds that a video lasts, and its frames per second."""


class TimingCache:
    """Durations and rates of videos, as their headers say, kept in a JSONL file by path, size and time of change."""

    def __init__(self, path: str | os.PathLike[str] | None = None):
        self.path = None if path is None else Path(path)
        self._known: dict[str, Timing | None] = {}
        if self.path is not None and self.path.exists():
            for _, record in read_log(self.path, skip_damaged=True):
                try:
                    key, value = record
                    self._known[key] = value and (float(value[0]), float(value[1]))
                except (ValueError, TypeError, IndexError):
                    continue

    def timing(self, source: str) -> Timing | None:
        """Timing of a file; None where it cannot be opened (reading it will say why)."""
        try:
            status = os.stat(source)
        except OSError:
            return None
        key = f"{source}|{status.st_size}|{status.st_mtime_ns}"
        if key not in self._known:
            self._known[key] = header_timing(source)
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                AppendLog(self.path).add([key, self._known[key]])
        return self._known[key]


def header_timing(source: str) -> Timing | None:
    """Duration and rate as the container's header says; None where it cannot be read."""
    try:
        with open_stream(Path(source), source) as (container, stream):
            rate = float(stream.average_rate or 0)
            rate = rate if _RATES[0] <= rate <= _RATES[1] else _RATE
            if stream.duration and stream.time_base:
                return float(stream.duration * stream.time_base), rate
            return (container.duration / 1e6 if container.duration else _DEFAULT_SECONDS), rate
    except (ValueError, OSError):
        return None


def estimated_lengths(
    dataset: Iterable[dict[str, Any]],
    processor: Any,
    *,
    labels: str = "answers",
    fps: float | None = None,
    num_frames: int | None = None,
    max_frames: int | None = None,
    max_length: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> list[int]:
    """Tokens of every sample, for transformers' `LengthGroupedSampler` or as a column `length` of the data set.

    Text is counted exactly, frames from the durations in the headers (no packet is read). A sample that is broken
    has length 1. `cache`: a file that keeps the durations; the other arguments are those of `VideoChatCollator`.

    Raises:
        TypeError: the data set streams: its samples cannot be sorted.
    """
    if not hasattr(dataset, "__len__"):
        raise TypeError("a data set that streams has no lengths to group by: load it with streaming=False")
    settings = EncodingSettings(labels, fps, num_frames, max_frames, max_length)
    timings = TimingCache(cache)
    return [
        estimated_length(row, processor, settings, timings)
        for row in counted(dataset, "lengths", "samples", shown=progress)
    ]


def estimated_length(row: dict[str, Any], processor: Any, settings: EncodingSettings, timings: TimingCache) -> int:
    """Tokens of one row's sample, about; 1 of a broken one."""
    try:
        messages = conversation_of(row)
        times = [_times(processor, part, settings, timings) for part in media_of(messages)]
        told = [_told(processor, part, moments) for part, moments in zip(media_of(messages), times, strict=True)]
        layout = lay_out(processor, messages, [len(moments) for moments in times], settings, told)
        return layout.length(processor.tokens_per_frame)
    except (ValueError, OSError):
        return 1


def _told(processor: Any, part: dict[str, Any], times: np.ndarray) -> int:
    """Tokens between the frames; those of a track inside of a video are not known without reading it."""
    if part["type"] == "image":
        return 0
    text, given = processor.frame_text(), part.get("subtitles")
    if given is not None and given != "auto":
        text = replace(text, cues=tuple(read_subtitles(given).cues))
    return len(text.row(times, 0, 0))


def _times(processor: Any, part: dict[str, Any], settings: EncodingSettings, timings: TimingCache) -> np.ndarray:
    """Seconds of the frames that will be looked at."""
    if part["type"] == "image":
        return np.zeros(1)
    source = part["video"]
    window = {"start": part.get("start"), "end": part.get("end")}
    if is_address(source):
        return _of_timing(processor, (_DEFAULT_SECONDS, _RATE), window, settings)
    source = local_path(source) if isinstance(source, str) else source
    if not isinstance(source, os.PathLike) or not os.path.isfile(
        source
    ):  # frames in memory, folders: counted as they are
        options = {"fps": settings.fps, "num_frames": settings.num_frames}
        return np.asarray(processor.video_processor.open(source, **options, **window).frame_times)
    timing = timings.timing(str(source))
    if timing is None:
        raise ValueError(f"{source} cannot be opened")
    return _of_timing(processor, timing, window, settings)


def _of_timing(processor: Any, timing: Timing, window: dict[str, Any], settings: EncodingSettings) -> np.ndarray:
    duration, rate = timing
    sampling = processor.video_processor.sampling(fps=settings.fps, num_frames=settings.num_frames, **window)
    moments = np.arange(max(1, round(duration * rate))) / rate
    return moments[sampling.choose(moments, duration, "the video")]
