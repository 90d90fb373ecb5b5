"""How well texts find their videos and videos their texts: recall among the first 1, 5 and 10, and the median rank."""

from __future__ import annotations

import torch
from torch import Tensor

DEPTHS = (1, 5, 10)


def ranks(scores: Tensor, right: Tensor) -> Tensor:
    """Place of the best right column of every row, 1 is first: int64 (R,).

    Columns as high as it that are wrong stand before it: a model that finds everything alike finds nothing.

    Args:
        scores: (R, C). right: bool (R, C), at least one in every row.
    """
    best = scores.masked_fill(~right, -torch.inf).max(1, keepdim=True).values
    return 1 + ((scores >= best) & ~right).sum(1)


def recall(scores: Tensor, right: Tensor) -> dict[str, float]:
    """`r1`, `r5`, `r10`, in 0..1, and `median_rank` of the rows of scores (R, C); see `ranks`."""
    found = ranks(scores, right)
    shares = {f"r{depth}": (found <= depth).float().mean().item() for depth in DEPTHS}
    return {**shares, "median_rank": found.double().quantile(0.5).item()}


def recall_both_ways(scores: Tensor, right: Tensor, back: Tensor | None = None) -> dict[str, float]:
    """`recall` of videos found by texts, as `t2v_…`, and of texts found by videos, as `v2t_…`.

    Args:
        scores: (texts, videos). right: bool (texts, videos). back: scores (texts, videos) for the way back, where they
            are others (after re-ranking). Videos without any text, and texts without any video, are only in the way.
    """
    back = scores if back is None else back
    asked, held = right.any(1), right.any(0)
    to_videos = recall(scores[asked], right[asked])
    to_texts = recall(back.T[held], right.T[held])
    return {f"t2v_{k}": v for k, v in to_videos.items()} | {f"v2t_{k}": v for k, v in to_texts.items()}
