"""Keeps count of samples that could not be used, across the processes of a data loader, and lists them in a file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ...files.append_log import AppendLog, read_log
from ...processing.video_source_names import shown_name

_PLACES = 1 << 14  # counters of a process are found by its id: two that meet may lose a count, never a listing
_COUNTS = ("seen", "broken", "damaged", "thinned", "shortened")
KINDS = _COUNTS[1:]


class TooManyBrokenError(ValueError):
    """So many samples are broken that something is wrong with all of them."""


class BrokenSamples:
    """What was wrong with samples: counted in memory that worker processes share, listed in a file they append to.

    Kinds: "broken" (left out), "damaged" (used, but parts of a video could not be read), "thinned" (fewer frames than
    asked for, to keep within `max_frames` or `max_length`; only counted), "shortened" (last turns left out, for
    `max_length`).

    Args:
        path: JSONL file, one object a line: `kind`, `id`, `source`, `error`. It is continued, not begun anew; a sample
            that is met again (in the next epoch) is listed once. None keeps no list: workers then only warn.
        limit_share, after: raise as soon as more than this share of at least `after` samples is broken.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, limit_share: float = 0.2, after: int = 50):
        if not 0 <= limit_share <= 1 or after < 1:
            raise ValueError(f"limit_share={limit_share} must be within 0..1 and after={after} at least 1")
        self.path = None if path is None else Path(path)
        self.limit_share, self.after = limit_share, after
        self._counts = torch.zeros(_PLACES, len(_COUNTS), dtype=torch.int64).share_memory_()
        self._listed: set[tuple[str, ...]] = set()
        self._process: int | None = None  # whose listing `_listed` is
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return self.broken

    def _count(self, name: str) -> int:
        return int(self._counts[:, _COUNTS.index(name)].sum())

    @property
    def seen(self) -> int:
        """Samples met so far, in all workers, broken ones included."""
        return self._count("seen")

    @property
    def broken(self) -> int:
        """Samples left out so far because they could not be read, in all workers."""
        return self._count("broken")

    @property
    def counts(self) -> dict[str, int]:
        """How often each kind came up, in all workers; the same sample counts again in the next epoch."""
        return {name: self._count(name) for name in _COUNTS}

    def count(self, name: str) -> None:
        """Count a sample that was met ("seen") or that is of some kind, without listing it."""
        self._counts[os.getpid() % _PLACES, _COUNTS.index(name)] += 1

    def add(self, kind: str, row: dict[str, Any], error: str, counts: bool = True) -> None:
        """List one sample, and count it unless it was no draw of its own.

        Raises:
            TooManyBrokenError: more than `limit_share` of the samples are broken by now.
        """
        if counts:
            self.count(kind)
        if self._process != os.getpid():  # a new worker, of the next epoch perhaps: others may have listed samples
            self._process = os.getpid()
            self._listed |= {(entry["kind"], entry["id"], entry["source"]) for entry in self.entries()}
        name, source = str(row.get("id", "")), source_of(row)
        if (kind, name, source) not in self._listed:
            self._listed.add((kind, name, source))
            entry = {"kind": kind, "id": name, "source": source, "error": error}
            if self.path is not None:
                AppendLog(self.path).add(entry)
            if kind in ("broken", "damaged"):
                fate = "left out" if kind == "broken" else "damaged"
                warnings.warn(f"sample {name!r} is {fate}: {error}", stacklevel=2)
        if kind == "broken" and counts:
            self._check_share()

    def _check_share(self) -> None:
        seen, broken = self.seen, self.broken
        if seen >= self.after and broken > self.limit_share * seen:
            latest = list(self.entries())[-1:] if self.path else []
            raise TooManyBrokenError(
                f"{broken} of {seen} samples are broken, more than {self.limit_share:.0%}"
                + (f"; they are listed in {self.path}, the last one: {latest[0]['error']}" if latest else "")
                + ". Look at them with `video-ma2mba data check`; often base_dir (where the videos are) is wrong"
            )

    def entries(self) -> Iterator[dict[str, str]]:
        """The listed samples, in the order in which they were met. Half a line, left by a crash, is passed over."""
        if self.path is None or not self.path.exists():
            return
        yield from (record for _, record in read_log(self.path, skip_damaged=True))


def source_of(row: dict[str, Any]) -> str:
    """The first video or image of a row, for people."""
    for message in row.get("messages") or ():
        for part in message["content"] if isinstance(message["content"], list) else ():
            for key in ("video", "image", "frames"):
                if part.get(key):
                    return shown_name(part[key])[:500]
    return ""
