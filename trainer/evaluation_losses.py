"""An evaluation's loss over what could be read: broken samples are left out and counted, none stands in for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class EvaluationLosses:
    """Losses of one pass over an evaluation set.

    transformers takes the mean over all batches. One of which little is left would count like a whole one; one of
    which nothing is left has the loss 0 and would make a model look better than it is.

    Args:
        trainer: whose evaluation this is.
        report: counts of the evaluation's collator (`BrokenSamples`), None where it keeps none.
    """

    def __init__(self, trainer: Any, report: Any) -> None:
        self.trainer, self.report = trainer, report
        self.broken_before = getattr(report, "broken", 0)
        self.losses: list[Tensor] = []

    def add(self, loss: Tensor, labels: Tensor | None) -> None:
        """The loss of a batch and its labels (B, S), after TRL's metrics were taken of it; collective."""
        size = self.trainer.args.eval_batch_size
        there = size if labels is None else int((labels != -100).any(dim=1).sum())
        row = torch.full((max(size, there),), torch.nan, device=loss.device)
        row[:there] = loss.detach().float()
        gathered = self.trainer.gather_function(row)  # like transformers' own, without what fills the last batch up
        self.losses.append(gathered.cpu())
        if gathered.numel() and gathered.isnan().all():
            for name in ("entropy", "mean_token_accuracy"):  # TRL takes them for 0
                values = self.trainer._metrics["eval"].pop(name, [])[:-1]
                if values:
                    self.trainer._metrics["eval"][name] = values

    def correct(self, metrics: dict[str, Any], prefix: str) -> None:
        """Put into `metrics` the mean over what could be read, and the count of broken samples; collective."""
        losses = torch.cat(self.losses) if self.losses else torch.empty(0)
        empty = losses.isnan()
        if empty.any() and f"{prefix}_loss" in metrics:
            metrics[f"{prefix}_loss"] = losses[~empty].mean().item()  # NaN where every sample is broken
        broken = torch.tensor(getattr(self.report, "broken", 0) - self.broken_before)
        broken = self.trainer.accelerator.reduce(broken.to(self.trainer.accelerator.device), "sum").item()
        if broken:
            metrics[f"{prefix}_broken_samples"] = broken
