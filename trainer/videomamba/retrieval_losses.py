"""The losses that teach retrieval, as functions of tensors: contrast, hard negatives, hidden words, and features that
processes gather.

Shapes: V clips, T texts, B pairs, D width of the shared space, K tokens of a text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

_IGNORED = -100  # places of a text where no word is asked for


def same_pairs(left: Tensor, right: Tensor) -> Tensor:
    """Which pairs belong together, bool (L, R), of keys int64 (L, N) and (R, N): those with any key in common. Clips
    and texts have a key of the video and one of the caption, so a second caption of the video counts, and so does
    another video with the same caption."""
    return (left[:, None] == right[None]).any(-1)


def similarities(video: Tensor, text: Tensor, temperature: Tensor) -> Tensor:
    """Dot products of clips (V, D) and texts (T, D) over the temperature: (V, T), in fp32 at least."""
    with torch.autocast(video.device.type, enabled=False):
        work = torch.promote_types(torch.promote_types(video.dtype, text.dtype), torch.float32)
        return video.to(work) @ text.to(work).T / temperature.to(work)


def contrastive_loss(logits: Tensor, same: Tensor) -> Tensor:
    """Mean of the cross-entropies of choosing a text for every clip and a clip for every text.

    Args:
        logits: (V, T). same: bool (V, T), all that belong together; they share the probability evenly.
    """
    wanted = same.to(logits.dtype)
    by_clip = F.cross_entropy(logits, wanted / wanted.sum(1, keepdim=True))
    by_text = F.cross_entropy(logits.T, (wanted / wanted.sum(0, keepdim=True)).T)
    return (by_clip + by_text) / 2


def hard_negatives(logits: Tensor, same: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """For every row one column that does not belong to it, the more probably the more similar it is.

    Args:
        logits: (R, C), drawn with softmax + 0.0001. same: bool (R, C), never drawn.

    Returns:
        Rows that have a negative, int64 (N,), and their columns (N,).
    """
    weights = (logits.detach().float().softmax(1) + 1e-4).masked_fill(same, 0.0)
    rows = (~same).any(1).nonzero()[:, 0]
    if len(rows) == 0:
        return rows, rows
    return rows, torch.multinomial(weights[rows], 1, generator=generator)[:, 0]


def hide_words(
    input_ids: Tensor,
    kept: Tensor,
    *,
    share: float,
    mask_id: int,
    words: int,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Hide words of texts (B, K): each with probability `share` is asked for; of these 80 % become `mask_id`, 10 % a
    random one of `words`, 10 % stay.

    Args:
        kept: bool (B, K), places that are never asked for (padding, the marks of begin and end).

    Returns:
        Texts with hidden words, and what is asked for: -100 where nothing is.
    """

    def chance(probability: float) -> Tensor:
        drawn = torch.rand(input_ids.shape, generator=generator, device=input_ids.device)
        return drawn < probability

    asked = chance(share) & ~kept
    masked = asked & chance(0.8)
    swapped = asked & ~masked & chance(0.5)
    others = torch.randint(words, input_ids.shape, generator=generator, device=input_ids.device)
    hidden = torch.where(swapped, others, input_ids.masked_fill(masked, mask_id))
    return hidden, input_ids.masked_fill(~asked, _IGNORED)


def word_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy of the words asked for; 0 where none is. logits: (N, vocabulary). wanted: (N,)."""
    total = F.cross_entropy(logits.float(), wanted, ignore_index=_IGNORED, reduction="sum")
    return total / (wanted != _IGNORED).sum().clamp(min=1)


class _Gathered(torch.autograd.Function):
    """Rows of all processes; each takes the gradient of its own, times their number, since all of them compute the
    same loss and DDP divides by it. (The release leaves the factor out: there the contrast counts 1/processes.)"""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.first, ctx.count = distributed.get_rank() * len(rows), len(rows)
        found = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(found, rows.contiguous())
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        own = gradients[0][ctx.first : ctx.first + ctx.count]
        return own * distributed.get_world_size()


def gathered(rows: Tensor) -> Tensor:
    """The rows (B, ...) of all processes, as many of each, in their order; of this process alone where it is the only
    one. Gradients reach the process that a row came from."""
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return rows
    return _Gathered.apply(rows)
