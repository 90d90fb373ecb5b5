"""What a session remembers: everything in one state, or the last while in two states that take turns.

A state of constant size holds only so much. A model that was trained on minutes answers wrongly from a state that has
seen hours of busy pictures, even about the last minute. With `remember=60` answers come from a state that began
between 60 and 120 seconds ago, and a second one stands ready to take its place: memory stays constant, every frame
passes the vision tower once and the language model as two rows of one batch.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..modeling_video_ma2mba.answering_familiarity import STRANGE_FRAMES, add_strange
from ..modeling_video_ma2mba.answering_questions import video_prefix
from ..modeling_video_ma2mba.state_identity import check_times
from ..modeling_video_ma2mba.state_video import VideoState
from ..processing.frame_times import Cue, TimedChunk


@dataclass(frozen=True)
class Remembered:
    """A state to be asked, and what it has seen.

    Attributes:
        state: of one row; not to be changed.
        since, until: seconds of the stream of its first and last frame.
        frames: of the stream, that it has read.
        before: metadata of the state that it continues; empty where it begins with the stream, or inside.
    """

    state: VideoState
    since: float
    until: float
    frames: int
    before: dict[str, str]


class RollingMemory:
    """Reads frames into one state, or two that take turns.

    Args:
        model, processor: of Video-Ma2mba.
        remember: seconds that answers reach back at least (once so much has been seen), and at most twice; None: to
            the beginning.
        state: what was read before the stream began.
        cues: subtitles of the stream, in its seconds.

    Where the model reads time stamps, a state begins with one: up to that much later than `remember` says. Where its
    tower looks at clips, clips end where they would in a file, however frames arrive: those of an unfinished one wait,
    and a state begins with a clip. Who asks meanwhile gets them as a short clip, read into a copy.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        remember: float | None = None,
        state: VideoState | None = None,
        cues: Sequence[Cue] = (),
    ):
        if remember is not None and not remember > 0:
            raise ValueError(f"remember must be more than 0 seconds, not {remember}")
        self.model = model
        self.remember = remember
        prefix = video_prefix(processor)
        self._video = prefix[:, -1:]
        self._opening = model.read(prefix[:, :-1])
        self._first = self._opening if state is None else state
        self._rows: list[Remembered] = []  # oldest first
        self._batch: VideoState | None = None  # their states as rows of one
        check_times(model.config, processor)
        self._text = replace(processor.frame_text(), cues=tuple(cues))
        self._previous: float | None = None  # time of the last frame
        self._waiting: tuple[np.ndarray, np.ndarray] | None = None  # frames of an unfinished clip, and their seconds
        self._ahead: Remembered | None = None  # what is remembered with them

    @property
    def waits(self) -> bool:
        """Whether frames of an unfinished clip wait: `newest` then needs the model."""
        return self._waiting is not None

    @property
    def newest(self) -> Remembered | None:
        """What answers come from: all that was read, or the older of the two rows. None before the first frame."""
        if self._waiting is None:
            return self._rows[0] if self._rows else None
        if self._ahead is None:
            other = copy.copy(self)
            other._batch = None if self._batch is None else self._batch.fork()
            other._read(*self._waiting)
            self._ahead = other._rows[0]
        return self._ahead

    def read(self, pixels: np.ndarray, seconds: np.ndarray) -> None:
        """Read frames, uint8 `(n, h, w, 3)` at the model's size, shown at `seconds` `(n,)` of the stream."""
        if self._waiting is not None:
            pixels, seconds = (np.concatenate(pair) for pair in zip(self._waiting, (pixels, seconds), strict=True))
        whole = len(pixels) // self.model.config.clip_frames * self.model.config.clip_frames
        self._read(pixels[:whole], seconds[:whole])
        self._waiting = (pixels[whole:], seconds[whole:]) if whole < len(pixels) else None
        self._ahead = None

    def _read(self, pixels: np.ndarray, seconds: np.ndarray) -> None:
        """Frames from the begin of a clip on; the last clip may be short."""
        start = 0
        for place, moment in enumerate(seconds.tolist()):
            if place % self.model.config.clip_frames:
                continue
            if self._batch is None or self._turns(moment, float(seconds[place - 1]) if place else self._previous):
                self._advance(pixels[start:place], seconds[start:place])
                self._begin(moment)
                start = place
        self._advance(pixels[start:], seconds[start:])

    def end(self) -> None:
        """The stream has ended: frames of an unfinished clip are read as a short one, and once what is said behind
        the last frame."""
        if self._waiting is not None:
            self._read(*self._waiting)
            self._waiting = self._ahead = None
        ending = [] if self._previous is None else self._text.ending(self._previous)
        self._text = replace(self._text, cues=())
        if ending and self._batch is not None:
            self._batch = self.model.read(torch.tensor([ending]), state=self._batch)
            self._seen(len(ending), 0, self._rows[0].until)

    def _turns(self, moment: float, previous: float | None) -> bool:
        """Whether another row is to begin with the frame of a moment."""
        due = self.remember is not None and moment - self._since >= self.remember
        return due and (self._text.every is None or self._text.stamps_at(moment, previous))

    def _begin(self, moment: float) -> None:
        """Start another row; of three, the oldest goes."""
        self._since = moment
        if self._batch is None:
            before = {} if self._first is self._opening else dict(self._first.metadata)
            self._starting = Remembered(self._first, moment, moment, 0, before)
            self._batch = self._first.fork()
            return
        fresh = self._opening
        self._starting = Remembered(fresh, moment, moment, 0, {})
        self._rows = self._rows[-1:]
        seen = self._batch.seen_tokens
        self._batch = VideoState.concatenate([self._batch.select(slice(-1, None)), fresh])
        self._batch.seen_tokens = seen

    def _advance(self, pixels: np.ndarray, seconds: np.ndarray) -> None:
        if len(pixels) == 0:
            return
        texts = self._text.texts(seconds, self._previous)
        self._previous = float(seconds[-1])
        before = int(self._batch.metadata.get(STRANGE_FRAMES, 0))
        self._batch = self.model.read(self._video, [[TimedChunk(pixels, seconds, texts)]], self._batch)
        after = self._batch.metadata.get(STRANGE_FRAMES)
        told, strange = sum(len(ids) for _, ids in texts), None if after is None else int(after) - before
        tokens = len(pixels) * self.model.config.tokens_per_frame + told
        self._seen(tokens, len(pixels), self._previous, strange)

    def _seen(self, new_tokens: int, frames: int, until: float, strange: int | None = None) -> None:
        """Every row of the batch has read so many tokens and frames more, of which some are strange."""
        batch = self._batch
        rows = self._rows if len(self._rows) == batch.batch_size else [*self._rows, self._starting]
        self._rows = [
            replace(
                row,
                state=_read_on(row, batch.select(slice(i, i + 1)), new_tokens, frames, strange),
                until=until,
                frames=row.frames + frames,
            )
            for i, row in enumerate(rows)
        ]


def _read_on(row: Remembered, rows: VideoState, tokens: int, frames: int, strange: int | None) -> VideoState:
    """The state of one row after more frames, counting those of the stream."""
    begun = {} if row.frames == 0 else row.state.metadata
    metadata = {**begun, "frames": str(row.frames + frames)}
    add_strange(metadata, strange, row.frames)
    return VideoState(rows.layers, row.state.seen_tokens + tokens, metadata)
