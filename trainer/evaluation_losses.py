"""An evaluation's loss and scores as means over its labelled tokens, however samples were put into batches.

transformers takes the mean over batches and TRL over batches of batches' means, so that a short answer in a batch of
its own counts like a long one. Broken samples are left out and counted, none stands in for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .answer_scores import AnswerScores

_SCORES = ("entropy", "mean_token_accuracy")  # TRL's names, in the order of a row's sums


class EvaluationLosses:
    """Sums over one pass through an evaluation set.

    Args:
        trainer: whose evaluation this is.
        report: counts of the evaluation's collator (`BrokenSamples`), None where it keeps none.
    """

    def __init__(self, trainer: Any, report: Any) -> None:
        self.trainer, self.report = trainer, report
        self.broken_before = getattr(report, "broken", 0)
        self.scores: AnswerScores | None = None  # of the batch that is evaluated now
        self.sums: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        """The loss of the batch that `scores` is about; collective.

        Each row of the batch gives its sums of loss, entropy, hits and tokens. The gathering leaves out rows of
        samples that fill up the last batch, so every process sends as many rows as a batch may have.
        """
        scores, args = self.scores, self.trainer.args
        if scores is None:
            raise RuntimeError("the model gave a loss without the scores of its labelled tokens")
        self.scores = None
        losses = -scores.log_probs
        if args.loss_type == "dft":
            losses = losses * scores.log_probs.exp()
        if self.trainer.compute_loss_func is not None or self.trainer.label_smoother is not None:
            losses = loss.detach().expand(len(losses))  # of the caller's own making: tokens share it evenly
        there = scores.label_mask.shape[0]
        rows = scores.label_mask.nonzero()[:, 0].to(losses.device)
        values = torch.stack([losses, scores.entropy, scores.is_top1, torch.ones_like(losses)], dim=1).double()
        table = values.new_zeros(max(args.eval_batch_size, there), 4)
        table = table.index_add(0, rows, values[: len(rows)])  # a batch without labels has one score that is none
        self.sums.append(self.trainer.gather_function(table.to(loss.device)).sum(0).cpu())

    def correct(self, metrics: dict[str, Any], prefix: str) -> None:
        """Put the means over what could be read, and the count of broken samples, into `metrics` (the loss) and TRL's
        own (the rest); collective."""
        if self.sums:
            loss, *scores, tokens = torch.stack(self.sums).sum(0).tolist()
            if f"{prefix}_loss" in metrics:
                metrics[f"{prefix}_loss"] = loss / tokens if tokens else float("nan")  # every sample is broken
            for name, value in zip(_SCORES, scores, strict=True):
                self.trainer._metrics["eval"].pop(name, None)
                if tokens:
                    self.trainer._metrics["eval"][name] = [value / tokens]
        broken = torch.tensor(getattr(self.report, "broken", 0) - self.broken_before)
        broken = self.trainer.accelerator.reduce(broken.to(self.trainer.accelerator.device), "sum").item()
        if broken:
            metrics[f"{prefix}_broken_samples"] = broken
