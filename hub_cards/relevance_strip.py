"""A few frames of a video with what they contribute to an answer, for the demo page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

_PICTURES, _STEPS = 8, 8


@dataclass(frozen=True)
class StripFrame:
    """One part of the video.

    Attributes:
        second: when the frame of the part that speaks most for the answer is shown.
        value: contribution of the whole part to the answer's log-probability; negative: against it.
        picture: that frame, at most 320 pixels wide or high.
    """

    second: float
    value: float
    picture: Image.Image


def relevance_strip(
    pipe: Any, video: str, question: str, answer: str, fps: float, report: Callable[[str], None]
) -> list[StripFrame]:
    """The video in up to eight parts of equal length, each with its most relevant frame.

    Args:
        report: called with a sentence about how far it is; what it raises ends the work.
    """
    from ..explain import relevance
    from ..explain.filmstrip import frames_at
    from ..processing.video_reader import open_video

    found = relevance(
        pipe.model,
        pipe.processor,
        video,
        question,
        answer,
        steps=_STEPS,
        fps=fps,
        on_frames=lambda seen, expected=None: report(f"looking at frame {seen:,}"),
        on_share=lambda share: report(f"{share:.0%} of the evidence weighed"),
    )
    parts = np.array_split(np.arange(len(found.times)), min(_PICTURES, len(found.times)))
    peaks = [int(part[np.argmax(found.attribution[part])]) for part in parts]
    pictures = frames_at(open_video(video, fps=fps), peaks)
    return [
        StripFrame(float(found.times[peak]), float(found.attribution[part].sum()), Image.fromarray(picture))
        for part, peak, picture in zip(parts, peaks, pictures, strict=True)
    ]
