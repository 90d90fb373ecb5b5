"""`VideoChatCollator`: rows to a batch of model inputs, broken samples left out and reported."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ...modeling_video_ma2mba.parallel_cut import clip_numbers, cut_sequence
from ...processing.text_batches import IGNORED_LABEL
from .broken_samples import BrokenSamples, TooManyBrokenError
from .packing import PACK
from .row_formats import UnknownFormError
from .sample_encoding import EncodingSettings, Sample, encode_row, joined, lay_out_row, read_own

if TYPE_CHECKING:
    from datasets import Dataset

_TRIES = 16
SEQUENCE_CUT, SEQUENCE_FAILED = "sequence_cut", "sequence_failed"
"""In a batch that processes share: how, and whether this process could not decode its frames."""


@dataclass(frozen=True)
class SequenceShare:
    """One of `ranks` processes that share every sample: it decodes the frames of its own segments.

    `segment_length` and `schedule` as for `cut_sequence`; `clip`: frames that the tower looks at together.
    """

    rank: int
    ranks: int
    segment_length: int | None = None
    clip: int = 1
    schedule: str = "round_robin"


class VideoChatCollator:
    """Makes a batch of rows, canonical or of any form in `row_formats.FORMATS`; give it to a data loader as
    `collate_fn`, so that workers decode the videos.

    A sample that cannot be used is left out, counted and listed. Where that leaves nothing of a batch, another row of
    `replacements` takes its place, else the last row that worked in this worker, else a text without labels: the batch
    always exists, so ranks of a distributed run stay in step. (Without labels the loss must be taken as 0, not 0 / 0.)
    An evaluation, whose loss is to be that of its own samples, goes straight to the text without labels.

    Args:
        processor: a `VideoMa2mbaProcessor`.
        labels: "answers" (stage 2: the chat format, labels on what the assistant says and its end-of-text tokens) or
            "captions" (stages 1 and 1.5: frames and captions in turn and nothing else, labels on the captions).
        fps, num_frames: frames to look at; None takes the processor's settings.
        max_frames: frames of one sample, all its videos together.
        max_length: tokens of one sample; see `sample_encoding` for what is left out. None: no limit.
        on_broken: "skip" or "raise".
        report: counts and lists; None makes one without a file.
        replacements: rows of the training data, for a batch of which nothing is left. replace: off for evaluation.
        pad_to_multiple_of: pad to a multiple of so many tokens.
        ends: "all", or "first" to learn the end of the first answer only; see `EncodingSettings`.
        share: where processes share every sample, which of them this is.
    """

    def __init__(
        self,
        processor: Any,
        *,
        labels: str = "answers",
        fps: float | None = None,
        num_frames: int | None = None,
        max_frames: int | None = None,
        max_length: int | None = None,
        on_broken: str = "skip",
        report: BrokenSamples | None = None,
        replacements: Dataset | None = None,
        replace: bool = True,
        pad_to_multiple_of: int = 1,
        ends: str = "all",
        share: SequenceShare | None = None,
    ):
        if on_broken not in ("skip", "raise"):
            raise ValueError(f"on_broken={on_broken!r}: use skip or raise")
        if processor.tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad token; add one with add_video_tokens")
        self.processor = processor
        self.settings = EncodingSettings(labels, fps, num_frames, max_frames, max_length, ends)
        self.on_broken = on_broken
        self.report = report if report is not None else BrokenSamples()
        self.replacements, self.replace = replacements, replace
        self.pad_to_multiple_of = pad_to_multiple_of
        self.share = share
        self._last_good: dict[str, Any] | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch.

        Returns:
            `input_ids`, `attention_mask`, `labels` int64 `(B, S)`, padded on the right, labels -100 but where there is
            something to learn; and with videos `pixel_values_videos` uint8 `(sum F, 3, h, w)` and `num_frames` int64
            `(videos,)`. B is smaller than the number of rows where some are broken. Rows that hold others
            (`packing.PACK`) become one each, and `seq_idx` int64 `(B, S)` numbers the samples in it; where they turn
            out longer than `max_length` together, more than one. With `share`, the pixels are of this process's frames
            only, `sequence_cut` says what is whose, and `sequence_failed` (bool) whether they
            could not be decoded and are black: then nobody should learn from the batch.

        Raises:
            TooManyBrokenError: see `BrokenSamples`. UnknownFormError: columns that are not understood. With
                on_broken="raise": what is wrong with a sample.
        """
        samples: list[Sample] = []
        for row in rows:
            found = [sample for one in row.get(PACK, [row]) if (sample := self._encode(one)) is not None]
            samples += self._packed(found) if PACK in row else found
        samples = samples or [self._replacement([one for row in rows for one in row.get(PACK, [row])])]
        return self._batch(samples) if self.share is None else self._shared_batch(rows, samples, self.share)

    def for_evaluation(self, report: BrokenSamples) -> VideoChatCollator:
        """The same, with nothing in the place of broken samples and counts of its own."""
        other = copy.copy(self)
        other.report, other.replace, other.share = report, False, None
        return other

    def _encode(self, row: dict[str, Any], drawn: bool = True) -> Sample | None:
        """A sample, or None for a broken row; rows that were not drawn but stand in for others are not counted."""
        if drawn:
            self.report.count("seen")
        try:
            encode = encode_row if self.share is None else lay_out_row
            sample = encode(self.processor, row, self.settings)
        except Exception as error:  # of any kind: files can be damaged in ways that nobody has thought of
            if self.on_broken == "raise" or isinstance(error, TooManyBrokenError | UnknownFormError):
                raise
            self.report.add("broken", row, describe(error), counts=drawn)
            return None
        self._last_good = row
        if not drawn:
            return sample
        if sample.notes:
            self.report.add("damaged", row, "; ".join(sample.notes))
        if sample.dropped_turns:
            self.report.add("shortened", row, f"max_length: its last {sample.dropped_turns} turns are left out")
        elif sum(sample.frames) < sample.wanted_frames and not sample.notes:
            self.report.count("thinned")
        return sample

    def _packed(self, samples: list[Sample]) -> list[Sample]:
        """Samples joined, as many as `max_length` takes in each."""
        packs: list[list[Sample]] = []
        room, most = 0, self.settings.max_length or sum(len(sample.input_ids) for sample in samples)
        for sample in samples:
            if len(sample.input_ids) > room:
                packs.append([])
                room = most
            packs[-1].append(sample)
            room -= len(sample.input_ids)
        return [joined(pack) for pack in packs]

    def _replacement(self, rows: Sequence[dict[str, Any]]) -> Sample:
        """A sample in place of a batch of which nothing is left; the same one whenever the same rows are broken."""
        seed = zlib.crc32("|".join(str(row.get("id")) for row in rows).encode())
        last_good = self._last_good if self.replace else None
        tries = _TRIES if self.replace and self.replacements is not None and len(self.replacements) else 0
        for attempt in range(tries):
            row = self.replacements[(seed + attempt * 7919) % len(self.replacements)]
            if (sample := self._encode(row, drawn=False)) is not None:
                return sample
        if last_good is not None and (sample := self._encode(last_good, drawn=False)) is not None:
            return sample
        ids = self.processor.tokenizer(self.processor.tokenizer.eos_token * 2, add_special_tokens=False)["input_ids"]
        return Sample(torch.tensor(ids), torch.full((len(ids),), IGNORED_LABEL), None, [], 0)

    def _batch(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        pad = self.processor.tokenizer.pad_token_id
        batch = {
            "input_ids": self._pad([sample.input_ids for sample in samples], pad),
            "attention_mask": self._pad([torch.ones_like(sample.input_ids) for sample in samples], 0),
            "labels": self._pad([sample.labels for sample in samples], IGNORED_LABEL),
        }
        if any(sample.documents for sample in samples):
            batch["seq_idx"] = self._numbers(samples, batch["input_ids"].shape[1])
        pixels = [sample.pixels for sample in samples if sample.pixels is not None]
        if pixels:
            batch["pixel_values_videos"] = torch.cat(pixels) if len(pixels) > 1 else pixels[0]
            batch["num_frames"] = torch.tensor([count for sample in samples for count in sample.frames])
        return batch

    def _shared_batch(
        self, rows: Sequence[dict[str, Any]], samples: list[Sample], share: SequenceShare
    ) -> dict[str, Any]:
        """A batch with this process's frames: the same layout on all, whatever each finds when it decodes."""
        batch: dict[str, Any] = self._batch(samples)
        num_frames = [count for sample in samples for count in sample.frames]
        is_video, per_frame = batch["input_ids"] == self.processor.video_token_id, self.processor.tokens_per_frame
        clips = clip_numbers(num_frames, share.clip)
        cut = cut_sequence(is_video, share.ranks, per_frame, clips, share.segment_length, share.schedule)
        frames = cut.frames(is_video, share.rank, per_frame, clips)
        own = [part.tolist() for part in _by_video(frames, num_frames)]
        size, pixels, failed = self.processor.video_processor.size, [], False
        for row, sample in zip(rows if len(rows) == len(samples) else [{}] * len(samples), samples, strict=True):
            places, own = own[: len(sample.frames)], own[len(sample.frames) :]
            try:
                read, notes = read_own(sample, places, size)
            except Exception as error:
                if self.on_broken == "raise" or isinstance(error, TooManyBrokenError):
                    raise
                self.report.add("broken", row, describe(error))
                failed = True
                read, notes = torch.zeros(sum(map(len, places)), 3, size["height"], size["width"]).byte(), []
            if notes:
                self.report.add("damaged", row, "; ".join(notes))
            pixels.append(read)
        batch[SEQUENCE_CUT], batch[SEQUENCE_FAILED] = cut, failed
        if num_frames:
            batch["num_frames"] = torch.tensor(num_frames)
        if len(frames):
            batch["pixel_values_videos"] = torch.cat(pixels) if len(pixels) > 1 else pixels[0]
        return batch

    def _numbers(self, samples: list[Sample], tokens: int) -> torch.Tensor:
        """(B, S) which of its samples each token of a pack belongs to; padding belongs to the last."""
        numbers = torch.zeros(len(samples), tokens, dtype=torch.int64)
        for row, sample in zip(numbers, samples, strict=True):
            for end in torch.tensor(sample.documents[:-1], dtype=torch.int64).cumsum(0).tolist():
                row[end:] += 1
        return numbers

    def _pad(self, rows: list[torch.Tensor], value: int) -> torch.Tensor:
        padded = pad_sequence(rows, batch_first=True, padding_value=value)
        return torch.nn.functional.pad(padded, (0, -padded.shape[1] % self.pad_to_multiple_of), value=value)


def _by_video(frames: torch.Tensor, num_frames: list[int]) -> list[torch.Tensor]:
    """Numbers of frames within each video, from their numbers in the batch."""
    found, first = [], 0
    for count in num_frames:
        found.append(frames[(frames >= first) & (frames < first + count)] - first)
        first += count
    return found


def describe(error: Exception) -> str:
    """The error for people; its type too where the text may not be enough."""
    text = str(error)
    return text if text and isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"
