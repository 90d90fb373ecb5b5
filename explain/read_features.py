"""A video and a question as the language model gets them: frame features, times and token ids.

Legend: F frames, T tokens per frame, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..modeling_video_ma2mba.reading_prompt import frames_of


@dataclass(frozen=True)
class VideoQuestion:
    """What comes before an answer.

    Attributes:
        name: the video's, for people.
        opening: int64 (P,) token ids in front of the frames.
        features: (F, T, D) projected features of the frames, in host memory (16-bit models: 2.65 GB for an hour at one
            frame a second, 144 tokens of width 2560).
        times: float64 (F,), seconds at which the frames are shown.
        duration: seconds that the whole video lasts.
        asked: int64 (Q,) token ids behind the frames, up to where the answer begins.
        texts: token ids read between the frames, each with the number of the frame in front of which it stands.
    """

    name: str
    opening: Tensor
    features: Tensor
    times: np.ndarray
    duration: float
    asked: Tensor
    texts: tuple[tuple[int, list[int]], ...] = ()

    def rows(self) -> tuple[Tensor, Tensor]:
        """All that is read of the video, N rows of the language model's input.

        Returns:
            int64 (N,) token ids, -1 for features of frames; and int64 (N,) the frame that each row belongs to, a text
            to the one behind it (at the end: F).
        """
        frames, size = self.features.shape[:2]
        ids, places, start = [], [], 0
        for place, words in (*self.texts, (frames, [])):
            ids += [torch.full(((place - start) * size,), -1), torch.tensor(words, dtype=torch.long)]
            places += [torch.arange(start, place).repeat_interleave(size), torch.full((len(words),), place)]
            start = place
        return torch.cat(ids), torch.cat(places)


@torch.no_grad()
def read_features(
    model: Any,
    processor: Any,
    video: Any,
    question: str,
    on_frames: Callable[[int, int | None], None] | None = None,
    **video_settings: Any,
) -> VideoQuestion:
    """Run a video through the vision tower, chunk by chunk; its pixels are not kept.

    Args:
        video: anything the processor opens. on_frames: called with frames read and expected.
        video_settings: `fps`, `num_frames`, `start`, `end`, `max_frames`, `subtitles`, `subtitle_tokens`.

    Raises:
        ValueError: an empty question; a video without frames, or what else opening it raises.
    """
    content = [{"type": "video", "video": video}, {"type": "text", "text": question}]
    opening, asked, (reader,) = processor.streaming_prompt([{"role": "user", "content": content}], **video_settings)
    pieces, times, texts = [], [], []
    try:
        expected = None if on_frames is None else reader.expected_frames
        for chunk in reader.chunks(model.config.vision_chunk_frames):
            texts += [(sum(map(len, times)) + place, ids) for place, ids in getattr(chunk, "texts", ())]
            if len(chunk) == 0:  # what is told behind the last frame
                continue
            pieces.append(model.get_video_features(frames_of(chunk)).cpu())
            times.append(chunk.timestamps)
            if on_frames is not None:
                on_frames(sum(map(len, times)), expected)
        duration = float(reader.duration)
    finally:
        reader.close()
    if not pieces:
        raise ValueError(f"{reader.name}: the video has no frames")
    features = torch.cat(pieces).unflatten(0, (-1, model.config.tokens_per_frame))
    moments = np.concatenate(times)
    return VideoQuestion(reader.name, opening[0, :-1], features, moments, duration, asked[0], tuple(texts))
