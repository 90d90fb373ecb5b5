"""Reads every sample as training would and keeps what was found out about each, so that a check can be continued."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ...files.append_log import AppendLog, read_log
from ...modeling_video_ma2mba.state_writing import write_whole
from .broken_samples import source_of
from .collator import describe
from .sample_encoding import EncodingSettings, encode_row

_EDGE = 1 << 16  # bytes at the beginning and end of a file by which its content is told


@dataclass(frozen=True)
class CheckedSample:
    """What came of reading one row. `error`: why it cannot be used, with a `remedy`; `notes`: damage it can be used
    with. `learnt`: labelled tokens. `row_key`, `video_key`: equal for rows, for video files, of the same content."""

    id: str
    source: str
    tokens: int = 0
    learnt: int = 0
    frames: int = 0
    wanted_frames: int = 0
    dropped_turns: int = 0
    notes: tuple[str, ...] = ()
    error: str | None = None
    remedy: str | None = None
    row_key: str = ""
    video_key: str = ""


def check_row(processor: Any, row: dict[str, Any], settings: EncodingSettings) -> CheckedSample:
    """Read one row completely, its frames not kept."""
    text = json.dumps(row.get("messages"), sort_keys=True, default=str)
    found: dict[str, Any] = {
        "id": str(row.get("id", "")),
        "source": source_of(row),
        "row_key": hashlib.sha256(text.encode()).hexdigest()[:16] if row.get("messages") else "",
        "video_key": content_key(source_of(row)),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are in the notes
        try:
            sample = encode_row(processor, row, settings, keep_pixels=False)
        except Exception as error:
            return CheckedSample(**found, error=describe(error), remedy=remedy(error))
    return CheckedSample(
        **found,
        tokens=len(sample.input_ids),
        learnt=int((sample.labels >= 0).sum()),
        frames=sum(sample.frames),
        wanted_frames=sample.wanted_frames,
        dropped_turns=sample.dropped_turns,
        notes=tuple(sample.notes),
    )


def content_key(path: str) -> str:
    """A digest of a file's size, beginning and end; empty where there is no such file."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(f"{size}|".encode() + file.read(_EDGE))
            file.seek(max(size - _EDGE, 0))
            digest.update(file.read(_EDGE))
    except (OSError, ValueError):
        return ""
    return digest.hexdigest()[:16]


def remedy(error: Exception) -> str:
    """What to do about a broken sample."""
    text = str(error)
    if re.match(r"the (question|answer|caption|text)\b", text):  # "… is empty" is said of files, too
        return "correct the row"
    if isinstance(error, FileNotFoundError) or "No such file" in text:
        return "put the video there, or name the folder of the videos with --base-dir"
    if isinstance(error, ConnectionError):
        return "download the video and name the file"
    if "max_length" in text:
        return "raise --max-length"
    if "beyond the end" in text or "must come before end" in text:
        return "correct start and end of the row"
    if any(word in text for word in ("header is damaged", "not one frame", "empty", "decoded", "no video in this")):
        return "download the file again, or convert it: ffmpeg -i IN -c:v libx264 -pix_fmt yuv420p OUT.mp4"
    return "correct the row"


class _Checks(TorchDataset):
    """Item i is the check of the i-th of `places`; for a data loader's workers."""

    def __init__(self, rows: Any, places: list[int], check: Callable[[Any], CheckedSample]):
        self.rows, self.places, self.check = rows, places, check

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> tuple[int, dict[str, Any]]:
        place = self.places[number]
        return place, asdict(self.check(self.rows[place]))


def check_rows(
    rows: Any, processor: Any, settings: EncodingSettings, *, workers: int = 0, partial: Path | None = None
) -> Iterator[tuple[int, CheckedSample]]:
    """Yield `(place, what was found)` of every row of a data set, those of an interrupted check first.

    Args:
        workers: processes that read; 0 reads here.
        partial: file in which what was found is kept while the check runs, and from which it continues. One that was
            begun with other rows or settings is begun anew.
    """
    check = functools.partial(_check_with, processor, settings)
    yield from run_checks(rows, check, _key(rows, processor, settings), workers=workers, partial=partial)


def _check_with(processor: Any, settings: EncodingSettings, row: dict[str, Any]) -> CheckedSample:
    return check_row(processor, row, settings)


def run_checks(
    rows: Any, check: Callable[[Any], CheckedSample], key: str, *, workers: int = 0, partial: Path | None = None
) -> Iterator[tuple[int, CheckedSample]]:
    """As `check_rows`, of any rows. key: by what rows and settings of an interrupted check are known again."""
    done = _done_before(partial, key) if partial is not None else {}
    yield from done.items()
    log = None if partial is None else AppendLog(partial)
    places = [place for place in range(len(rows)) if place not in done]
    checks = _Checks(rows, places, check)
    for place, found in DataLoader(checks, batch_size=None, num_workers=workers, collate_fn=_as_it_is):
        if log is not None:
            log.add([place, found])
        yield place, _sample(found)


def _as_it_is(item: Any) -> Any:
    return item


def _sample(found: dict[str, Any]) -> CheckedSample:
    return CheckedSample(**{**found, "notes": tuple(found["notes"])})


def _key(rows: Any, processor: Any, settings: EncodingSettings) -> str:
    sizes = [processor.tokens_per_frame, processor.video_processor.to_dict(), len(processor.tokenizer)]
    text = json.dumps([getattr(rows, "_fingerprint", None), len(rows), asdict(settings), sizes], default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _done_before(partial: Path, key: str) -> dict[int, CheckedSample]:
    """What an interrupted check of the same rows with the same settings has found; else a new file is begun."""
    first = f"{key}\n".encode()
    if not partial.is_file() or not partial.read_bytes().startswith(first):
        write_whole(partial, first)
        return {}
    done = {}
    for _, record in read_log(partial, skip_damaged=True):  # the key is no JSON
        try:
            place, found = record
            done[place] = _sample(found)
        except (ValueError, TypeError, KeyError):
            continue
    return done


PERCENTILES = {"shortest": 0, "median": 50, "95 %": 95, "longest": 100}


@dataclass(frozen=True)
class CheckReport:
    """What a check found, summed up. `samples` are in the order of the data set."""

    samples: Sequence[CheckedSample]

    @property
    def usable(self) -> list[CheckedSample]:
        """Samples that training can read."""
        return [sample for sample in self.samples if sample.error is None]

    @property
    def broken(self) -> list[CheckedSample]:
        """Samples that training would leave out, each with its `error`."""
        return [sample for sample in self.samples if sample.error is not None]

    @property
    def damaged(self) -> list[CheckedSample]:
        """Used in training, although parts of a video cannot be read."""
        return [sample for sample in self.usable if sample.notes]

    @property
    def shortened(self) -> list[CheckedSample]:
        """Whose last answers do not fit into max_length."""
        return [sample for sample in self.usable if sample.dropped_turns]

    @property
    def thinned(self) -> list[CheckedSample]:
        """Looked at in fewer frames than asked for, to fit into max_frames or max_length."""
        return [sample for sample in self.usable if sample.frames < sample.wanted_frames and not sample.notes]

    def distribution(self, name: str) -> dict[str, int]:
        """Percentiles of an attribute (tokens, learnt, frames) over the usable samples."""
        values = [getattr(sample, name) for sample in self.usable]
        if not values:
            return {}
        return {label: int(np.percentile(values, share, method="lower")) for label, share in PERCENTILES.items()}

    def of_length(self, label: str) -> CheckedSample | None:
        """The usable sample whose length in tokens is the named percentile."""
        ordered = sorted(self.usable, key=lambda sample: sample.tokens)
        return ordered[int((len(ordered) - 1) * PERCENTILES[label] / 100)] if ordered else None

    def duplicates(self, key: str) -> list[list[str]]:
        """Ids of samples of equal `row_key`, or sources of equal `video_key` under several names."""
        groups: dict[str, list[str]] = defaultdict(list)
        for sample in self.samples:
            name = sample.source if key == "video_key" else sample.id
            found = groups[getattr(sample, key)]
            if getattr(sample, key) and (key == "row_key" or name not in found):
                found.append(name)
        return [names for names in groups.values() if len(names) > 1]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "samples": len(self.samples),
            "usable": len(self.usable),
            "broken": [asdict(sample) for sample in self.broken],
            "damaged": [asdict(sample) for sample in self.damaged],
            "shortened": [asdict(sample) for sample in self.shortened],
            "thinned": len(self.thinned),
            "tokens": {**self.distribution("tokens"), "all": sum(sample.tokens for sample in self.usable)},
            "learnt_tokens": self.distribution("learnt"),
            "frames": self.distribution("frames"),
            "same_rows": self.duplicates("row_key"),
            "same_videos": self.duplicates("video_key"),
        }
