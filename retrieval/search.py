"""A retrieval model at work: texts and clips as vectors, all against all, and the best again by the matching head.

Shapes: T texts, V videos, D width of the space they share, K tokens of a text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_TOP = 1e4  # lifts re-ranked pairs above all others


class Retriever:
    """A model with its tokenizer; everything it gives lies on the CPU.

    Args:
        model: `VideoMambaForRetrieval` in evaluation mode. tokenizer: of its texts.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

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
            max_length=self.model.config.max_text_length,
            return_tensors="pt",
        )
        return found["input_ids"].to(self._device), found["attention_mask"].to(self._device)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        """Vectors fp32 (T, D) of texts."""
        parts = [texts[first : first + batch] for first in range(0, len(texts), batch)]
        return torch.cat([self.model.encode_texts(*self._read(part))[0].float().cpu() for part in parts])

    @torch.inference_mode()
    def match(self, texts: Sequence[str], tokens: Sequence[Tensor], batch: int = 32) -> Tensor:
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
        tell: Callable[[int], None] = lambda done: None,
    ) -> Tensor:
        """Scores (T, V) in which each text's `depth` best videos are ordered by the matching head's logit of a match,
        above all others, which keep their order. Of videos that look for texts: give the transpose, and take it.

        Args:
            scores: (T, V), at most 100 in size. tokens: of the clip of a video's number. tell: is told how many rows
                are done.
        """
        result = scores.clone()
        for row in range(len(scores)):
            best = scores[row].topk(min(depth, scores.shape[1])).indices
            found = self.match([texts[row]] * len(best), [tokens(int(column)) for column in best])
            result[row, best] = _TOP + found[:, 1]
            tell(row + 1)
        return result

    def reranked_back(
        self,
        texts: Sequence[str],
        scores: Tensor,
        tokens: Callable[[int], Tensor],
        depth: int,
        tell: Callable[[int], None] = lambda done: None,
    ) -> Tensor:
        """As `reranked`, of each video's `depth` best texts: scores (T, V)."""
        result = scores.clone()
        for column in range(scores.shape[1]):
            best = scores[:, column].topk(min(depth, len(scores))).indices
            found = self.match([texts[int(row)] for row in best], [tokens(column)] * len(best))
            result[best, column] = _TOP + found[:, 1]
            tell(column + 1)
        return result
