"""Runs micro-batches under their plans, and an optimizer step once more when it ran out of memory."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from accelerate.utils import DistributedType
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerState

from ..modeling_video_ma2mba.parallel_dims import ParallelDims
from ..modeling_video_ma2mba.parallel_gradients import add_up, gradient_bytes, keep_wide
from ..modeling_video_ma2mba.recompute_random import RandomState
from .step_planner import StepPlan, StepPlanner
from .throughput import Throughput
from .training_config import VideoMa2mbaTrainingConfig

_log = logging.getLogger(__name__)


class RunningTrainer(Protocol):
    """What is asked of the trainer (`VideoMa2mbaTrainer`, an `SFTTrainer`)."""

    video_model: nn.Module
    args: VideoMa2mbaTrainingConfig
    accelerator: Any
    state: TrainerState
    throughput: Throughput
    _metrics: dict[str, dict[str, list[float]]]
    _total_train_tokens: int


class MemoryRetry:
    """Plans, runs and, out of memory, repeats the micro-batches of one optimizer step after the other.

    Gradients of a failed backward pass are partly there, and summed with those of earlier micro-batches; so the whole
    optimizer step begins anew, with the random numbers that it began with. Of several processes (DDP) that share a
    step, all begin anew, and only the one that ran out of memory under a smaller plan.
    """

    def __init__(self, trainer: RunningTrainer, step: Callable[..., Tensor], model: nn.Module) -> None:
        self.trainer, self.step = trainer, step
        settings = trainer.video_model.model.language_model.engine.settings
        adaptive = settings is not None and trainer.args.adaptive_plan
        self.planner = StepPlanner(trainer.video_model, settings) if adaptive else None
        self.alone = trainer.accelerator.distributed_type == DistributedType.NO
        self.ranks: RankAgreement | None = None
        if self.planner is not None and trainer.args.oom_retry and isinstance(model, DistributedDataParallel):
            self.ranks = RankAgreement(trainer.accelerator, trainer.video_model.model.language_model.engine)
        self.device = trainer.accelerator.device
        self._done: list[dict[str, Any]] = []  # micro-batches of this optimizer step
        self._step = -1
        self._random: Any = None
        self._metrics: dict[str, int] = {}
        self._tokens = 0

    def run(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> Tensor:
        """Forward and backward of one micro-batch; the loss.

        Raises:
            torch.OutOfMemoryError: out of memory, and no smaller plan, or processes that cannot begin anew; says what
                to do.
        """
        if self._step != self.trainer.state.global_step:
            self._begin()
        failed_here = False
        try:
            loss = self._attempt(model, inputs, num_items, self._choose(inputs))
        except torch.OutOfMemoryError as error:
            message, failed_here = str(error), not isinstance(error, OtherProcessShortage)
            if self.planner is None or not self.trainer.args.oom_retry:
                raise
            if not self.alone and self.ranks is None:
                raise torch.OutOfMemoryError(self._advice(inputs, message)) from error
        else:
            return self._finish(model, inputs, loss)
        return self._again(model, inputs, num_items, message, failed_here)  # the failed attempt's frames are gone

    def _finish(self, model: nn.Module, inputs: dict[str, Any], loss: Tensor) -> Tensor:
        self._done.append(inputs)
        if self.ranks is not None and self.trainer.accelerator.sync_gradients:  # the last micro-batch of the step
            self.ranks.average_gradients(model)
        return loss

    def _choose(self, inputs: dict[str, Any]) -> StepPlan | None:
        if self.planner is None:
            return None
        with self.trainer.accelerator.autocast():  # the prediction asks what activations will be made of
            return self.planner.choose(inputs)

    def _attempt(self, model: nn.Module, inputs: dict[str, Any], num_items: Any, plan: StepPlan | None) -> Tensor:
        predicted = 0
        cuda = self.device.type == "cuda"
        if plan is not None:
            predicted = plan.step_bytes + (self._resident() if cuda else 0)
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        with contextlib.nullcontext() if self.planner is None else self.planner.applied(plan):
            if self.ranks is None:
                loss = self.step(model, inputs, num_items)
            else:
                loss = self.ranks.run(lambda: self.step(model.module, inputs, num_items))
        self.trainer.throughput.peak(predicted, self.device)
        return loss

    def _resident(self) -> int:
        """GPU bytes that are there during the whole step: what is allocated now, and gradients still to come."""
        parameters = self.trainer.video_model.parameters()
        return torch.cuda.memory_allocated(self.device) + sum(
            gradient_bytes(p) for p in parameters if p.requires_grad and p.grad is None
        )

    def _begin(self) -> None:
        if self.ranks is not None and self.planner.group is not None:
            keep_wide(self.trainer.video_model.parameters())
        self._step = self.trainer.state.global_step
        self._done.clear()
        self._random = RandomState(self.device)
        self._metrics = {name: len(values) for name, values in self.trainer._metrics["train"].items()}
        self._tokens = self.trainer._total_train_tokens

    def _advice(self, inputs: dict[str, Any], message: str) -> str:
        smaller = self.planner.smaller(inputs)
        then = (
            f"the next smaller plan, {smaller}, takes {smaller.step_bytes / 1e9:.1f} GB"
            if smaller
            else "none is smaller"
        )
        where = "where processes share parameters a step is not repeated"
        return f"{where}; {then}: set memory_budget below that. {message}"

    def _again(
        self, model: nn.Module, inputs: dict[str, Any], num_items: Any, message: str, failed_here: bool
    ) -> Tensor:
        failed = plan = self.planner.last
        together = self.planner.group is not None  # processes that share a sample share its plan
        if failed_here or together:
            with self.trainer.accelerator.autocast():
                plan = self.planner.smaller(inputs)
        possible = not (failed_here or together) or plan is not None
        if not (possible if self.ranks is None else self.ranks.all(possible)):
            where = "no" if not possible else "for another process no"
            raise torch.OutOfMemoryError(f"{where} smaller plan exists: give it fewer frames. {message}")
        if failed_here:
            _log.warning(
                "step %d ran out of memory (%s): once more with the next smaller plan, %s",
                self._step + 1,
                failed,
                plan,
            )
        self.trainer.throughput.oom_retries += 1
        model.zero_grad()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._random.put_back()
        for name, values in self.trainer._metrics["train"].items():
            del values[self._metrics.get(name, 0) :]
        self.trainer._total_train_tokens = self._tokens
        for earlier in self._done:
            self._attempt(model, earlier, num_items, self._choose(earlier))
        self.planner.last = plan
        return self._finish(model, inputs, self._attempt(model, inputs, num_items, plan))


class OtherProcessShortage(torch.OutOfMemoryError):
    """Another process ran out of memory."""


class RankAgreement:
    """The processes of one DistributedDataParallel run. All of them must call the same methods in the same order.

    DistributedDataParallel sums gradients up while a backward pass runs: a process that fails in the middle leaves the
    others waiting for ever, and what was summed cannot be taken back. Here every process works for itself until all
    have come through forward, and again until all have come through backward; gradients are averaged once, after the
    last micro-batch of a step. The price is that the averaging no longer hides behind the backward pass.

    Args:
        accelerator: accelerate's, whose `gather_for_metrics` is the first thing collective after a forward pass.
        engine: the model's. Processes that share a sample wait for each other within a pass, too: one that fails takes
            part in what is left of it (`MultiAxisEngine.drain`) before all agree.
    """

    def __init__(self, accelerator: Any, engine: Any) -> None:
        self.accelerator, self.device, self.engine = accelerator, accelerator.device, engine

    def all(self, fine: bool) -> bool:
        """Whether all processes say so."""
        flag = torch.tensor([int(fine)], dtype=torch.int32, device=self.device)
        distributed.all_reduce(flag, distributed.ReduceOp.MIN)
        return bool(flag)

    def run(self, step: Callable[[], Tensor]) -> Tensor:
        """A forward and backward pass that synchronises nothing but metrics.

        Raises:
            torch.OutOfMemoryError: here; the others raise OtherProcessShortage at the same time.
        """
        gather, forward_agreed = self.accelerator.gather_for_metrics, False

        def gather_once_all_are_here(*args: Any, **kwargs: Any) -> Any:
            nonlocal forward_agreed
            if not forward_agreed:
                self._agree()
                forward_agreed = True
            return gather(*args, **kwargs)

        self.accelerator.gather_for_metrics = gather_once_all_are_here
        try:
            loss = step()
        except OtherProcessShortage:
            raise
        except torch.OutOfMemoryError:
            self.engine.drain(backward=forward_agreed)
            self.all(False)
            raise
        finally:
            del self.accelerator.gather_for_metrics  # the class's own comes back
        self._agree()
        return loss

    def _agree(self) -> None:
        if not self.all(True):
            raise OtherProcessShortage("another process ran out of memory: its own message says more")

    @staticmethod
    def average_gradients(model: nn.Module) -> None:
        """Replace every gradient by the mean over all processes; where there is none, it counts as 0."""
        add_up(model.parameters(), divisor=ParallelDims.of_run().batches)
