"""Rows as batches of clips: decoded and augmented in worker processes, in an order that every resumed run repeats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ...processing.frame_fitting import fit_frame
from ...processing.video_processing_videomamba import VideoMambaVideoProcessor, read_clips
from ..data.broken_samples import BrokenSamples
from ..data.collator import describe
from .augmentation import Augmentation
from .clip_rows import ClipRow, ClipRows

_TRIES = 10  # rows after a broken one that may take its place
Row = TypeVar("Row", bound=Any)


def _bounded(size: int) -> Any:
    """Shrinks pictures to twice `size` on the shorter side: 64 frames of a large film are gigabytes otherwise."""

    def fit(frame: np.ndarray) -> np.ndarray:
        height, width = frame.shape[:2]
        scale = 2 * size / min(height, width)
        return frame if scale >= 1 else fit_frame(frame, (round(height * scale), round(width * scale)))

    return fit


def training_clip(
    row: ClipRow, num_frames: int, augmentation: Augmentation, repeats: int, rng: np.random.Generator
) -> Tensor:
    """`repeats` clips of one video, decoded once and augmented apart: uint8 (repeats, frames, 3, size, size)."""
    fit = _bounded(augmentation.size)
    frames, places = read_clips(row.open(), num_frames, repeats, fit=fit, rng=rng, start=row.start, end=row.end)
    clips = [augmentation([frames[place] for place in clip], rng) for clip in places]
    return torch.from_numpy(np.stack(clips)).permute(0, 1, 4, 2, 3)


def first_readable(
    candidate: Callable[[int], Row], read: Callable[[Row], Tensor], report: BrokenSamples
) -> tuple[Row, Tensor]:
    """The first of `candidate(0)`, `candidate(1)`, … that can be read, and what `read` gives; those that cannot are
    listed in `report`.

    Raises:
        ValueError: none of `_TRIES` rows can.
    """
    report.count("seen")
    for step in range(_TRIES):
        row = candidate(step)
        try:
            return row, read(row)
        except Exception as error:
            report.add("broken", {"id": row.name}, describe(error), counts=step == 0)
    raise ValueError(f"{_TRIES} rows one after another cannot be read, {row.name} the last: look with `data check`")


class TrainingClips(Dataset[dict[str, Any]]):
    """Item `epoch * len(rows) + row` (see `EpochSampler`) is that row's clips in that epoch: `pixel_values`, uint8
    (repeats, frames, 3, size, size), and `labels`, where there are any.

    A row that cannot be read is listed in `report`, and the next one takes its place.
    """

    def __init__(
        self,
        rows: ClipRows,
        num_frames: int,
        augmentation: Augmentation,
        *,
        repeats: int = 1,
        seed: int = 0,
        report: BrokenSamples | None = None,
    ) -> None:
        self.rows, self.num_frames, self.augmentation = rows, num_frames, augmentation
        self.repeats, self.seed = repeats, seed
        self.report = BrokenSamples() if report is None else report

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: int) -> dict[str, Any]:
        place = draw % len(self)
        rng = np.random.default_rng((self.seed, draw))

        row, pixels = first_readable(
            lambda step: self.rows.rows[(place + step) % len(self)],
            lambda row: training_clip(row, self.num_frames, self.augmentation, self.repeats, rng),
            self.report,
        )
        return {"pixel_values": pixels, "labels": row.label}


class TestClips(Dataset[dict[str, Any]]):
    """The views of every row, as the paper tests: `pixel_values`, uint8 (views, frames, 3, size, size), and `labels`.

    A row that cannot be read counts as wrong: it is a black clip, and is listed in `report`.
    """

    __test__ = False  # this is no test of pytest's

    def __init__(
        self, rows: ClipRows, processor: VideoMambaVideoProcessor, *, report: BrokenSamples | None = None
    ) -> None:
        self.rows, self.processor = rows, processor
        self.report = BrokenSamples() if report is None else report

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        row = self.rows.rows[place]
        side, views = self.processor.size["height"], self.processor.num_segments * self.processor.num_crops
        self.report.count("seen")
        try:
            pixels = self.processor(row.open(), start=row.start, end=row.end)["pixel_values"][0]
        except Exception as error:
            self.report.add("broken", {"id": row.name}, describe(error))
            pixels = torch.zeros(views, self.processor.num_frames, 3, side, side, dtype=torch.uint8)
        return {"pixel_values": pixels.view(views, -1, 3, side, side), "labels": row.label}


def collate_training(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch (samples x repeats, frames, 3, size, size), the repeats of a video beside each other, and its labels."""
    batch = {"pixel_values": torch.cat([sample["pixel_values"] for sample in samples])}
    if samples[0]["labels"] is not None:
        labels = torch.tensor([sample["labels"] for sample in samples])
        batch["labels"] = labels.repeat_interleave(len(samples[0]["pixel_values"]))
    return batch


def collate_test(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch (samples, views, frames, 3, size, size), without views where there is one, and its labels."""
    pixels = torch.stack([sample["pixel_values"] for sample in samples])
    return {
        "pixel_values": pixels if pixels.shape[1] > 1 else pixels[:, 0],
        "labels": torch.tensor([sample["labels"] for sample in samples]),
    }


class EpochSampler(Sampler[int]):
    """A random order of the rows for every epoch, drawn from seed and epoch alone, as `epoch * length + row`: what a
    data set draws from that number is the same in every process and every resumed run.

    Args:
        length: rows. seed: of the order. repeats: draw every row so often in a row and stop after `length` draws, so
            that an epoch is as long as without (repeated augmentation of pictures).
    """

    def __init__(self, length: int, seed: int, repeats: int = 1) -> None:
        self.length, self.seed, self.repeats, self.epoch = length, seed, repeats, 0

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader when an epoch begins."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(self.length, generator=generator).repeat_interleave(self.repeats)[: self.length]
        for place, row in enumerate(order.tolist()):
            copy = place % self.repeats  # copies of a row are drawn from numbers of their own
            yield (self.epoch * self.repeats + copy) * self.length + row
