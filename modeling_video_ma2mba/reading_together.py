"""Reading several videos at once: their frames share passes through tower and language model, each has its own state.

Short videos alone leave a GPU waiting for work; together they are one batch, and all are decoded at the same time.
A step has as many frames as are left of the shortest, so nothing is padded and nothing computed for nothing, but where
texts of different lengths are read between frames.
Legend: A videos that are still being read, F frames of a step, T tokens a frame, D model width.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .answering_familiarity import StrangeFrames, add_strange
from .reading_prompt import among_texts, frames_of, read_prompt, take_texts
from .stack_protocols import VideoModel
from .state_video import VideoState


@torch.no_grad()
def read_together(model: VideoModel, prefix: Tensor, videos: Sequence[Iterable[Any]]) -> list[VideoState | Exception]:
    """Read videos of any lengths, all after the same text, into a state each; as `read_prompt` does one by one.

    No more frames are in memory than for one video (`config.read_chunk_frames`, but at least one of each video) and
    what the iterables hold themselves. A video that has ended takes no further part.

    Args:
        model: a `VideoMa2mbaModel`.
        prefix: (1, S) token ids that end in the one token of the video, their only one.
        videos: for each an iterable of frame chunks (see `frames_of`).

    Returns:
        For each video its state, or the exception that reading it raised, which does not disturb the others.
    """
    if (prefix == model.config.video_token_id).sum() != 1 or prefix[0, -1] != model.config.video_token_id:
        raise ValueError("reading together takes a prompt that ends in a video and holds no other")
    if model.config.clip_frames > 1:  # a short video's end would cut the clips of the others
        return [_read_alone(model, prefix, video) for video in videos]
    sources = [_Frames(video) for video in videos]
    found: dict[int, VideoState | Exception] = {}
    strange = StrangeFrames(model.familiarity)
    text = prefix[:, :-1]
    if text.shape[1]:
        start = read_prompt(model, text)
    else:
        norm = model.language_model.norm_f.weight
        start = VideoState.zeros(model.config.text_config, 1, norm.device, norm.dtype)
    state, rows = start.fork(), list(range(len(sources)))
    state.batch_repeat_interleave(len(rows))
    while rows:
        going, lengths = [], []
        for place, row in enumerate(rows):
            try:
                left = sources[row].fetch(max(1, model.config.read_chunk_frames // len(rows)))
            except Exception as error:
                found[row] = error
                continue
            if left == 0:
                found[row] = _finished(model, start, state, place, sources[row], row)
            else:
                going.append(place)
                lengths.append(left)
        if len(going) < len(rows):
            state.batch_select_indices(torch.tensor(going, dtype=torch.long))
            rows = [rows[place] for place in going]
        if rows:
            steps = [sources[row].take(min(lengths)) for row in rows]
            _advance(model, state, steps, [sources[row].told for row in rows], strange)
            for row, count in zip(rows, strange.counts(len(rows)) or (), strict=False):
                sources[row].strange = (sources[row].strange or 0) + count
    return [found[row] for row in range(len(sources))]


def _read_alone(model: VideoModel, prefix: Tensor, video: Iterable[Any]) -> VideoState | Exception:
    try:
        return read_prompt(model, prefix, [video])
    except Exception as error:
        return error


class _Frames:
    """Takes frames out of an iterable of chunks, in any number, and what is read between them.

    `told`: what stands in front of the frames taken last; `ending`: behind all; `tokens`: of all texts so far.
    """

    def __init__(self, chunks: Iterable[Any]):
        self._chunks: Iterator[Any] = iter(chunks)
        self._left: list[Tensor] = []
        self._texts: deque[tuple[int, list[int]]] = deque()
        self._arrived = 0
        self.told: list[tuple[int, list[int]]] = []
        self.tokens = self.count = 0
        self.strange: int | None = None
        self.seconds: float | None = None

    def fetch(self, most: int) -> int:
        """Frames that can be taken now: `most`, at the end fewer, then none."""
        while (left := sum(map(len, self._left))) < most and (chunk := next(self._chunks, None)) is not None:
            pixels = frames_of(chunk)
            self._texts.extend((self._arrived + place, ids) for place, ids in getattr(chunk, "texts", ()))
            self._arrived += len(pixels)
            self._left.append(pixels)
            times = getattr(chunk, "timestamps", None)
            self.seconds = float(times[-1]) if times is not None and len(times) else self.seconds
        return min(left, most)

    def take(self, count: int) -> Tensor:
        """(count, 3, h, w), of those fetched."""
        pixels = torch.cat(self._left) if len(self._left) > 1 else self._left[0]
        self._left = [pixels[count:]] if len(pixels) > count else []
        self.told = take_texts(self._texts, self.count, count)
        self.tokens += sum(len(ids) for _, ids in self.told)
        self.count += count
        return pixels[:count]

    @property
    def ending(self) -> list[int]:
        """Token ids that stand behind the last frame."""
        return [token for _, ids in self._texts for token in ids]


def _advance(
    model: VideoModel,
    state: VideoState,
    pieces: list[Tensor],
    told: list[list[tuple[int, list[int]]]],
    strange: StrangeFrames,
) -> None:
    """Every row of the state reads its piece (F, 3, h, w), all of the same number of frames, and what it is told."""
    if len({(piece.dtype, piece.shape) for piece in pieces}) == 1:
        features = model.get_video_features(torch.cat(pieces), on_features=strange)
    else:
        features = torch.cat([model.get_video_features(piece, on_features=strange) for piece in pieces])
    rows = features.view(len(pieces), -1, features.shape[-1])  # (A, F * T, D)
    settings: dict[str, Any] = {}
    if any(told):
        mixed = [among_texts(model, row, texts) for row, texts in zip(rows, told, strict=True)]
        rows = pad_sequence(mixed, batch_first=True)
        if len({len(row) for row in mixed}) > 1:
            lengths = torch.tensor([len(row) for row in mixed])
            settings["attention_mask"] = (torch.arange(rows.shape[1]) < lengths[:, None]).long().to(rows.device)
    wanted = torch.zeros(rows.shape[:2], dtype=torch.bool)
    wanted[:, -1] = True  # as in `read_prompt`
    model.language_model(
        inputs_embeds=rows, past_key_values=state, use_cache=True, output_positions=wanted, **settings
    )


def _finished(
    model: VideoModel, start: VideoState, state: VideoState, place: int, frames: _Frames, row: int
) -> VideoState | ValueError:
    """The state of one row alone, counting its own tokens."""
    if frames.count == 0:
        return ValueError(f"video {row} has no frames")
    seen = start.seen_tokens + frames.count * model.config.tokens_per_frame + frames.tokens
    alone = VideoState(state.layers, seen, {"frames": str(frames.count)})
    alone.batch_select_indices(torch.tensor([place]))
    add_strange(alone.metadata, frames.strange)
    if frames.seconds is not None:
        alone.metadata["seconds"] = alone.metadata["frame_time"] = str(frames.seconds)
    return read_prompt(model, torch.tensor([frames.ending]), state=alone) if frames.ending else alone
