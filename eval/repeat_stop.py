"""The paper's decoding rule: stop when the latest five tokens have occurred before in the answer."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import StoppingCriteria


class RepeatedNgramStop(StoppingCriteria):
    """Ends a row as soon as its latest `n` generated tokens already occurred, in this order, in the same answer.

    The prompt does not count. An object serves one call of `generate()`: it learns the prompt's length from the first
    token.
    """

    def __init__(self, n: int = 5):
        if n < 1:
            raise ValueError(f"stop_repeat_ngram={n}: must be at least 1, or 0 for no such rule")
        self.n = n
        self._prompt: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        """Rows that end, bool (B,), for `input_ids` (B, prompt and generated tokens)."""
        if self._prompt is None:
            self._prompt = input_ids.shape[1] - 1
        answer = input_ids[:, self._prompt :]
        if answer.shape[1] <= self.n:
            return torch.zeros(len(answer), dtype=torch.bool, device=answer.device)
        windows = answer.unfold(1, self.n, 1)
        return (windows[:, :-1] == windows[:, -1:]).all(dim=-1).any(dim=-1)
