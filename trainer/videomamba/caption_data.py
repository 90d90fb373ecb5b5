"""Videos and pictures with captions as batches of pairs; a batch holds one kind of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ...processing.video_processing_videomamba import VideoMambaVideoProcessor
from ..data.broken_samples import BrokenSamples
from ..data.collator import describe
from .augmentation import Augmentation
from .caption_rows import CaptionRow
from .clip_data import first_readable, training_clip


def pair_keys(video: str, caption: str) -> Tensor:
    """Keys int64 (2,) of a video, by its name, and of a caption: pairs that share one belong together."""
    texts = (video.encode("utf-8", "backslashreplace"), caption.casefold().encode("utf-8", "backslashreplace"))
    digests = (hashlib.blake2b(text, digest_size=8).digest() for text in texts)
    return torch.tensor([int.from_bytes(each, "little", signed=True) for each in digests])


class TrainingPairs(Dataset[dict[str, Any]]):
    """Item `epoch * len(rows) + row` (see `PairSampler`) is that row with one of its captions: `pixel_values`, uint8
    (frames or 1, 3, size, size), `text`, `keys`.

    A row that cannot be read is listed in `report`, and the next one of its kind takes its place.
    """

    def __init__(
        self,
        rows: Sequence[CaptionRow],
        num_frames: int,
        augmentation: Augmentation,
        *,
        seed: int = 0,
        report: BrokenSamples | None = None,
    ) -> None:
        self.rows, self.num_frames, self.augmentation, self.seed = rows, num_frames, augmentation, seed
        self.pictures = np.array([row.is_picture for row in rows])
        self.alike = {kind: np.flatnonzero(self.pictures == kind) for kind in (False, True)}
        self.report = BrokenSamples() if report is None else report

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: int) -> dict[str, Any]:
        place = draw % len(self)
        rng = np.random.default_rng((self.seed, draw))
        alike = self.alike[bool(self.pictures[place])]
        frames = 1 if self.pictures[place] else self.num_frames
        first = int(np.searchsorted(alike, place))
        row, pixels = first_readable(
            lambda step: self.rows[alike[(first + step) % len(alike)]],
            lambda row: training_clip(row.clip, frames, self.augmentation, 1, rng)[0],
            self.report,
        )
        caption = row.captions[int(rng.integers(len(row.captions)))]
        return {"pixel_values": pixels, "text": caption, "keys": pair_keys(row.key, caption)}


class TestPairs(Dataset[dict[str, Any]]):
    """Every row with its first caption, its frames from the middle of each part of the video.

    A row that cannot be read counts as wrong: it is a black clip, and is listed in `report`.
    """

    __test__ = False  # this is no test of pytest's

    def __init__(
        self, rows: Sequence[CaptionRow], processor: VideoMambaVideoProcessor, *, report: BrokenSamples | None = None
    ) -> None:
        self.rows, self.processor = rows, processor
        self.report = BrokenSamples() if report is None else report

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        row, side = self.rows[place], self.processor.size["height"]
        frames = self.processor.num_frames
        self.report.count("seen")
        try:
            pixels = self.processor(row.clip.open(), start=row.clip.start, end=row.clip.end)["pixel_values"][0]
        except Exception as error:
            self.report.add("broken", {"id": row.name}, describe(error))
            pixels = torch.zeros(frames, 3, side, side, dtype=torch.uint8)
        return {"pixel_values": pixels, "text": row.captions[0], "keys": pair_keys(row.key, row.captions[0])}


class PairCollator:
    """Samples of `text`, `pixel_values` and `keys` as a batch of tensors; texts beyond `length` tokens are cut."""

    def __init__(self, tokenizer: Any, length: int) -> None:
        self.tokenizer, self.length = tokenizer, length

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """`pixel_values` (B, T, 3, H, W), `input_ids` and `attention_mask` (B, K), `keys` (B, 2)."""
        texts = [sample["text"] for sample in samples]
        found = self.tokenizer(texts, padding=True, truncation=True, max_length=self.length, return_tensors="pt")
        stacked = {name: torch.stack([sample[name] for sample in samples]) for name in ("pixel_values", "keys")}
        return stacked | {name: found[name] for name in ("input_ids", "attention_mask")}


class PairSampler(Sampler[int]):
    """A random order of the rows for every epoch, as `epoch * length + row`, drawn from seed and epoch alone. Where
    there are pictures and videos, runs of `block` rows are of one kind, in random order, and the rest is left out.

    Args:
        pictures: bool (rows,). block: rows of a step over all processes.
    """

    def __init__(self, pictures: np.ndarray, seed: int, block: int) -> None:
        self.pictures, self.seed, self.block, self.epoch = pictures, seed, block, 0
        self.kinds = [rows for kind in (False, True) if len(rows := np.flatnonzero(pictures == kind))]
        if len(self.kinds) > 1 and (least := min(map(len, self.kinds))) < block:
            raise ValueError(
                f"there are only {least} {'pictures' if pictures.sum() == least else 'videos'} beside others, and a "
                f"batch of {block} holds one kind: add rows, or make per_device_train_batch_size smaller"
            )

    def __len__(self) -> int:
        if len(self.kinds) == 1:
            return len(self.pictures)
        return sum(len(rows) // self.block * self.block for rows in self.kinds)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader when an epoch begins."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = [rng.permutation(rows) for rows in self.kinds]
        if len(order) > 1:
            blocks = [part for rows in order for part in np.split(rows[: len(rows) // self.block * self.block],
                      len(rows) // self.block)]  # fmt: skip
            order = [blocks[place] for place in rng.permutation(len(blocks))]
        for row in np.concatenate(order).tolist():
            yield self.epoch * len(self.pictures) + row
