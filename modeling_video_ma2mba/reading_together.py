"""Reading several videos at once: their frames share passes through tower and language model, each has its own state.

Short videos alone leave a GPU waiting for work; together they are one batch, and all are decoded at the same time.
Legend: A videos that are still being read, F frames of a step, T tokens a frame, D model width.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .prompt_reading import frames_of, read_prompt
from .video_state import VideoState


@torch.no_grad()
def read_together(model: Any, prefix: Tensor, videos: Sequence[Iterable[Any]]) -> list[VideoState | Exception]:
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
    sources = [_Frames(video) for video in videos]
    found: list[VideoState | Exception | None] = [None] * len(sources)
    text = prefix[:, :-1]
    if text.shape[1]:
        start = read_prompt(model, text)
    else:
        norm = model.language_model.norm_f.weight
        start = VideoState.zeros(model.config.text_config, 1, norm.device, norm.dtype)
    state, rows = start.fork(), list(range(len(sources)))
    state.batch_repeat_interleave(len(rows))
    while rows:
        going, pieces = [], []
        for place, row in enumerate(rows):
            try:
                piece = sources[row].take(max(1, model.config.read_chunk_frames // len(rows)))
            except Exception as error:
                found[row] = error
                continue
            if piece is None:
                found[row] = _finished(model, start, state, place, sources[row], row)
            else:
                going.append(place)
                pieces.append(piece)
        if len(going) < len(rows):
            state.batch_select_indices(torch.tensor(going, dtype=torch.long))
            rows = [rows[place] for place in going]
        if rows:
            _advance(model, state, pieces)
    return found


class _Frames:
    """Takes frames out of an iterable of chunks, in any number."""

    def __init__(self, chunks: Iterable[Any]):
        self._chunks: Iterator[Any] = iter(chunks)
        self._left: Tensor | None = None
        self.count, self.seconds = 0, None

    def take(self, most: int) -> Tensor | None:
        """`most` frames (n, 3, h, w), at the end fewer, then None."""
        parts = [] if self._left is None else [self._left]
        while sum(map(len, parts)) < most and (chunk := next(self._chunks, None)) is not None:
            parts.append(frames_of(chunk))
            times = getattr(chunk, "timestamps", None)
            self.seconds = float(times[-1]) if times is not None and len(times) else self.seconds
        pixels = torch.cat(parts) if parts else None
        if pixels is None or len(pixels) == 0:
            return None
        self._left = pixels[most:] if len(pixels) > most else None
        self.count += min(len(pixels), most)
        return pixels[:most]


def _advance(model: Any, state: VideoState, pieces: list[Tensor]) -> None:
    """Every row of the state reads its piece (F, 3, h, w)."""
    per_frame, counts = model.config.tokens_per_frame, [len(piece) for piece in pieces]
    if len({(piece.dtype, piece.shape[1:]) for piece in pieces}) == 1:
        features = model.get_video_features(torch.cat(pieces))
    else:
        features = torch.cat([model.get_video_features(piece) for piece in pieces])
    parts = features.split([count * per_frame for count in counts])
    tokens = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)  # (A, max F * T, D), padded on the right
    lengths = torch.tensor([len(part) for part in parts])[:, None]
    mask = (torch.arange(tokens.shape[1]) < lengths).to(tokens.device, torch.long)
    wanted = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    wanted[:, 0] = True  # nobody wants hidden states here, but one row keeps every kernel's input non-empty
    model.language_model(
        inputs_embeds=tokens,
        attention_mask=None if min(counts) == max(counts) else mask,
        past_key_values=state,
        use_cache=True,
        output_positions=wanted,
    )


def _finished(
    model: Any, start: VideoState, state: VideoState, place: int, frames: _Frames, row: int
) -> VideoState | ValueError:
    """The state of one row alone, counting its own tokens."""
    if frames.count == 0:
        return ValueError(f"video {row} has no frames")
    seen = start.seen_tokens + frames.count * model.config.tokens_per_frame
    alone = VideoState(state.conv, state.ssm, seen, {"frames": str(frames.count)})
    alone.batch_select_indices(torch.tensor([place]))
    if frames.seconds is not None:
        alone.metadata["seconds"] = str(frames.seconds)
    return alone
