"""What TRL's loss and metrics need to know about the labelled positions, without a full-length tensor.

TRL's own fused head takes the hidden states of the whole sequence (5 GB for a million tokens at 2.7B, and as much
again for their gradient). Here the language model returns the labelled positions only, and logits exist for a chunk
of them at a time. Shapes: B batch, S tokens, n labelled positions, D width.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from trl.trainer.utils import FusedCausalLMOutput

from ..modeling_video_ma2mba.recompute_chunks import ChunkedRows, ChunkJob, RowLayout, fill_rows
from ..modeling_video_ma2mba.recompute_loss import IGNORE_INDEX, shift_labels_left
from ..modeling_video_ma2mba.recompute_plan import LOGITS_PER_CHUNK


def score_answers(
    lm_head: nn.Module, hidden: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of `targets` (n,) at hidden states (n, D), in fp32, of logits divided by `temperature`.

    Returns:
        log-probability (differentiable), entropy of the prediction, and whether the target is its most likely token;
        each (n,). With n = 0 they are empty sums that still reach every parameter.
    """
    empty = len(targets) == 0
    if empty:
        hidden, targets = hidden.new_zeros(1, hidden.shape[1]) + hidden.sum() * 0, targets.new_zeros(1)
    targets = targets.to(hidden.device)

    def scores(piece: Tensor, first: int) -> Tensor:
        logits = lm_head(piece)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        wanted = targets[first : first + len(piece)].to(logits.device)
        chosen = -F.cross_entropy(logits, wanted, reduction="none")
        if torch.is_grad_enabled():  # the recomputation in backward: the other two have no gradient
            return torch.stack([chosen, torch.zeros_like(chosen), torch.zeros_like(chosen)], dim=1)
        spread = logits.log_softmax(-1)
        entropy = -(spread.exp() * spread).sum(-1)
        return torch.stack([chosen, entropy, (logits.argmax(-1) == wanted).to(chosen.dtype)], dim=1)

    parameters: list[Any] = [p for p in lm_head.parameters() if p.requires_grad]
    job = ChunkJob(
        run=scores,
        chunk=max(1, LOGITS_PER_CHUNK // lm_head.out_features),
        rows_per_item=1,
        width=3,
        dtype=torch.promote_types(hidden.dtype, torch.float32),
        layout=RowLayout(len(hidden), hidden.device),
        devices=[hidden.device],
    )
    if torch.is_grad_enabled() and (parameters or hidden.requires_grad):
        table = ChunkedRows.apply(job, hidden, None, *parameters)
    else:
        with torch.no_grad():
            table = fill_rows(job, hidden)
    table = table * 0 if empty else table
    log_probs, entropy, is_top1 = table.unbind(1)
    return log_probs.clone(), entropy.detach().clone(), is_top1.detach().clone()  # FSDP dislikes views


@dataclass
class AnswerScores:
    """Of one batch: `label_mask` (B, S) bool, and what `score_answers` gives for its n True positions, row by row."""

    label_mask: Tensor
    log_probs: Tensor
    entropy: Tensor
    is_top1: Tensor


def replaced_function(model: nn.Module, name: str) -> Callable[..., Any]:
    """The function behind a method that is going to be replaced on one instance; it takes the instance first.

    A bound method would be of this instance for ever: a copy of the model (a reference model, an average of weights)
    gets the replacement bound to itself, and must not run the weights that it was copied from. A replacement that is
    there already is built upon likewise.
    """
    before = vars(model).get(name)
    if before is None:
        return getattr(type(model), name)
    if isinstance(before, MethodType) and before.__self__ is model:
        return before.__func__
    return lambda self, *args, **kwargs: before(*args, **kwargs)  # whoever put it there bound it


def install_answer_scores(model: nn.Module, on_scores: Callable[[AnswerScores], None]) -> None:
    """Let `model(..., labels=..., fused_lm_head=True)`, TRL's way to ask for scores, return those of the labelled
    positions only. `model` is the Video-Ma2mba model itself, not a wrapper of it; `on_scores` is told them, too.
    """
    plain_forward = replaced_function(model, "forward")

    @functools.wraps(type(model).forward)  # generation reads the signature
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            return plain_forward(
                self, *args, labels=labels, shift_labels=shift_labels, num_items_in_batch=num_items_in_batch, **kwargs
            )
        shift_labels = shift_labels_left(labels) if shift_labels is None else shift_labels
        labelled = shift_labels != IGNORE_INDEX
        kwargs["use_cache"] = False
        everywhere = labelled
        if self.base_model.language_model.shares:  # scores are those of this process's part of the batch
            named = dict(zip(inspect.signature(self.base_model.forward).parameters, args, strict=False))
            kwargs, shift_labels, everywhere, labelled = self.base_model.shared_batch(named | kwargs, shift_labels)
            args = ()
        hidden = self.base_model(*args, output_positions=everywhere, **kwargs).last_hidden_state
        log_probs, entropy, is_top1 = score_answers(self.get_output_embeddings(), hidden, shift_labels[labelled])
        on_scores(AnswerScores(labelled, log_probs.detach(), entropy, is_top1))
        divisor = everywhere.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return FusedCausalLMOutput(
            loss=-log_probs.sum() / divisor,
            log_probs=log_probs,
            entropy=entropy,
            is_top1=is_top1,
            label_mask=labelled,
        )

    forward.same_tokens = True  # to a decoder, it is the plain one
    model.forward = MethodType(forward, model)


_SCORES = ("entropy", "mean_token_accuracy")  # TRL's names, in the order of a row's sums


class EvaluationLosses:
    """Sums over one pass through an evaluation set, for means over its labelled tokens, however samples were batched.

    transformers takes the mean over batches and TRL over batches of batches' means, so that a short answer in a batch
    of its own counts like a long one. Broken samples are left out and counted, none stands in for them.

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
        values = torch.stack([losses, scores.entropy, scores.is_top1, torch.ones_like(losses)], dim=1)
        values = values.to(torch.float32 if values.device.type == "mps" else torch.float64)
        table = values.new_zeros(max(args.eval_batch_size, there), 4)
        table = table.index_add(0, rows, values[: len(rows)])  # a batch without labels has one score that is none
        self.sums.append(self.trainer.gather_function(table.to(loss.device)).sum(0).cpu().double())

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
