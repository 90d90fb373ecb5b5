"""What a run will take, told before it begins: work that is counted, times a speed measured on a little of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ..files.progress import clock_text
from .lmms_requests import Job

_TRIED_FRAMES = 32
_LOOKED_AT = 8
_WORTH_IT = 1000  # frames; less is through before an estimate helps


def needle_estimate(reader: Any, haystack: Any, missing: Mapping[int, Sequence[float]], read: int) -> str:
    """How many cells are to be measured, and about how long that takes.

    Args:
        reader: a `NeedleReader`. haystack: from `open_haystack`.
        missing: the depths to measure for each length. read: frames that the language model will read for them.
    """
    cells, seen = sum(map(len, missing.values())), sum(missing)
    told = f"{cells} cells: {seen:,} frames of haystacks, {read:,} frames for the language model"
    if read < _WORTH_IT:
        return told
    pixels = next(iter(haystack.chunks(min(*missing, _TRIED_FRAMES))))
    features = reader.features(pixels)  # the first time, libraries are set up
    began = time.perf_counter()
    reader.features(next(iter(haystack.chunks(len(pixels)))))
    look = (time.perf_counter() - began) / len(pixels)
    reader.advance(reader.opening(), features)
    state, began = reader.opening(), time.perf_counter()
    reader.advance(state, features)
    each = (time.perf_counter() - began) / len(pixels)
    reader.frames_read = 0
    return f"{told}; about {clock_text(look * seen + each * read)} (by {len(pixels)} frames tried)"


def benchmark_estimate(pipe: Any, reading: Any, media: Sequence[tuple[int, Any]], questions: int) -> str:
    """How many questions about how many videos are left, and about how long reading those takes.

    Args:
        reading: a `Reading`, how frames are chosen.
        media: for each video its bytes and its `Medium`; a few are looked at, to tell frames from bytes.
    """
    told = f"{questions:,} questions about {len(media):,} video{'' if len(media) == 1 else 's'}"
    some = media[:: max(1, len(media) // _LOOKED_AT)][:_LOOKED_AT]
    frames, weight, tried = 0, 0, None
    for size, medium in some:
        with suppress(ValueError, OSError):  # a video that cannot be read is told when its turn comes
            part = {"start": medium.start, "end": medium.end}
            with pipe.processor.video_processor.open(medium.source, **reading.chosen, **part) as reader:
                frames, weight, tried = frames + reader.expected_frames, weight + size, tried or medium
    if tried is None or not weight:
        return told
    total = round(frames * sum(size for size, _ in media) / weight)
    told += f", about {total:,} frames (by {len(some)} of them)"
    if total < _WORTH_IT:
        return told
    part = {"start": tried.start, "end": tried.end, **reading.chosen}
    if reading.num_frames is None:
        last = (tried.start or 0.0) + _TRIED_FRAMES / reading.fps
        part["end"] = last if tried.end is None else min(last, tried.end)
    for _ in range(2):  # the first time, libraries are set up
        began = time.perf_counter()
        read = int(pipe.read(tried.source, **part).metadata["frames"])
        each = (time.perf_counter() - began) / read
    return f"{told}; reading them takes about {clock_text(each * total)} (by {read} frames tried), answers come on top"


def media_left(works: Iterable[Any], todo: Mapping[str, Job], document: Callable[[Job], Any]) -> list[tuple[int, Any]]:
    """Bytes and `Medium` of what `works` (of `lmms_ranks`) look at, where that is a file."""
    found = []
    for work in works:
        if work.label is not None and work.weight:
            job = todo[work.keys[0]]
            found += [(medium.weight(), medium) for medium in job.prompt(document(job)).media[:1]]
    return found
