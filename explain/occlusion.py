"""Leave-one-segment-out: how much less likely the answer is when a few seconds are taken out of the video.

The direct test of what the gradients only estimate, at a cost that grows with the square of the length: every segment
is left out in a row of its own, which reads the rest of the video again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..modeling_video_ma2mba.stack_weights import execution_device
from ..modeling_video_ma2mba.state_video import VideoState
from .attribution import answer_log_probability, as_function
from .read_features import VideoQuestion


@torch.no_grad()
def occlusion(
    model: Any,
    prompt: VideoQuestion,
    answer: Tensor,
    frames_out: int = 1,
    rows: int = 8,
    on_segment: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Log-probability of the answer with all frames, minus that without each segment, fp64 (ceil(F / frames_out),).

    Args:
        prompt: from `read_features`. answer: int64 (A,) token ids, its end included.
        frames_out: frames of a segment. rows: segments that are read together (memory grows with it).
        on_segment: called with segments done and their number.

    Raises:
        ValueError: `frames_out` or `rows` is below 1, or one segment is the whole video.
    """
    frames, per_frame, _ = prompt.features.shape
    if frames_out < 1 or rows < 1:
        raise ValueError(f"frames_out={frames_out} and rows={rows} must be at least 1")
    if frames <= frames_out:
        raise ValueError(f"leaving out {frames_out} of {frames} frames leaves nothing: use fewer")
    language, embeddings = model.model.language_model, model.get_input_embeddings()
    tokens = prompt.features.flatten(0, 1)[None]
    segments = -(-frames // frames_out)
    device = execution_device(language.norm_f)
    drops = []
    with as_function(model):
        state = VideoState.zeros(language.config, 1, device, language.norm_f.weight.dtype)
        _advance(language, state, embeddings(prompt.opening[None].to(execution_device(embeddings))))
        for first in range(0, segments, rows):
            last = min(first + rows, segments)
            rest = tokens[:, first * frames_out * per_frame :]
            mask = torch.ones(last - first, rest.shape[1], dtype=torch.long)
            for row in range(last - first):
                mask[row, row * frames_out * per_frame : (row + 1) * frames_out * per_frame] = 0
            without = state.fork()
            without.batch_repeat_interleave(last - first)
            _advance(language, without, rest.expand(last - first, -1, -1), mask.to(device))
            drops.append(answer_log_probability(model, without, prompt.asked, answer).cpu().double().sum(1))
            _advance(language, state, tokens[:, first * frames_out * per_frame : last * frames_out * per_frame])
            if on_segment is not None:
                on_segment(last, segments)
        whole = answer_log_probability(model, state, prompt.asked, answer).cpu().double().sum()
    return whole - torch.cat(drops)


def _advance(language: Any, state: VideoState, rows: Tensor, mask: Tensor | None = None) -> None:
    """Read embeddings (B, S, D) into `state`, whose rows skip what their mask (B, S) leaves out."""
    unwanted = torch.zeros(rows.shape[:2], dtype=torch.bool, device=rows.device)
    unwanted[:, -1] = True  # one row keeps every kernel's input non-empty
    _, after = language.scan(rows.to(state.device), state, mask, None, unwanted.to(state.device))
    state.take(after)
