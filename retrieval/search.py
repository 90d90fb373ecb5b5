"""A retrieval model at work: texts and clips as vectors, all against all, and the best again by the matching head.

Shapes: T texts, V videos, D width of the space they share, K tokens of a text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

RERANKED = 1e4
"""Lifts pairs that were compared again above all others."""


def match_logit(logits: Tensor) -> Tensor:
    """(pairs,) of the matching head's logits (pairs, 2): by what the release ranks."""
    return logits[:, 1]


def match_probability(logits: Tensor) -> Tensor:
    """(pairs,) of the matching head's logits (pairs, 2): 0..1."""
    return logits.softmax(-1)[:, 1]


class Retriever:
    """A model with its tokenizer; everything it gives lies on the CPU.

    Args:
        model: `VideoMambaForRetrieval` in evaluation mode. tokenizer: of its texts.
        length: tokens of a text that are read; None is the model's own.
    """

    def __init__(self, model: Any, tokenizer: Any, length: int | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.length = model.config.max_text_length if length is None else length

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.inference_mode()
    def clips(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors fp32 (V, D) and tokens fp16 (V, patches, C) of clips uint8 (V, frames, 3, H, W)."""
        found = self.model.encode_clips(pixels.to(self._device))
        return found.embeds.float().cpu(), found.tokens.half().cpu()

    def _read(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        found = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        )
        return found["input_ids"].to(self._device), found["attention_mask"].to(self._device)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        """Vectors fp32 (T, D) of texts."""
        parts = [texts[first : first + batch] for first in range(0, len(texts), batch)]
        return torch.cat([self.model.encode_texts(*self._read(part))[0].float().cpu() for part in parts])

    @torch.inference_mode()
    def match(self, texts: Sequence[str], tokens: Sequence[Tensor], batch: int = 64) -> Tensor:
        """Logits fp32 (pairs, 2) of the matching head: no match, match; of texts beside the tokens of clips."""
        found = []
        for first in range(0, len(texts), batch):
            ids, mask = self._read(texts[first : first + batch])
            _, hidden = self.model.encode_texts(ids, mask)
            looked = torch.stack(list(tokens[first : first + batch])).to(hidden)
            found.append(self.model.match(hidden, mask, looked).float().cpu())
        return torch.cat(found)

    def reranked(
        self,
        texts: Sequence[str],
        scores: Tensor,
        tokens: Callable[[int], Tensor],
        depth: int,
        score: Callable[[Tensor], Tensor] = match_logit,
        tell: Callable[[int], None] = lambda done: None,
    ) -> Tensor:
        """Scores fp64 (T, V) in which each text's `depth` best videos are ordered by the matching head: `RERANKED`
        more than what `score` makes of its logits; all others keep theirs, below.

        Args:
            scores: (T, V), less than half of `RERANKED`. tokens: of the clip of a video's number. tell: is told how
                many rows are done.
        """

        def compare(row: int, best: list[int]) -> Tensor:
            return score(self.match([texts[row]] * len(best), [tokens(column) for column in best]))

        return _reranked(scores, depth, compare, tell)

    def reranked_back(
        self,
        texts: Sequence[str],
        scores: Tensor,
        tokens: Callable[[int], Tensor],
        depth: int,
        score: Callable[[Tensor], Tensor] = match_logit,
        tell: Callable[[int], None] = lambda done: None,
    ) -> Tensor:
        """As `reranked`, of each video's `depth` best texts: scores fp64 (T, V)."""

        def compare(column: int, best: list[int]) -> Tensor:
            return score(self.match([texts[row] for row in best], [tokens(column)] * len(best)))

        return _reranked(scores.T, depth, compare, tell).T


def _reranked(
    scores: Tensor, depth: int, compare: Callable[[int, list[int]], Tensor], tell: Callable[[int], None]
) -> Tensor:
    """Scores fp64 (R, C) in which the `depth` best of every row stand `RERANKED` above what `compare` gives them."""
    result = scores.double()
    for row in range(len(scores)):
        best = scores[row].topk(min(depth, scores.shape[1])).indices
        result[row, best] = RERANKED + compare(row, best.tolist()).double()
        tell(row + 1)
    return result
