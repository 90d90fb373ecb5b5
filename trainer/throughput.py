"""Tokens and frames per second, predicted and actual GPU peak: counted per step, logged, shown beside the bar."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from ..files.progress import Tell, progress

GB = 1e9


class Throughput:
    """Counts what goes through this process between two logs.

    Attributes:
        tokens, frames: since the last `restart`. oom_retries: steps that were repeated, since the run began.
        predicted_peak, actual_peak: GPU bytes of the largest step since the last `restart`; 0 where nothing is known.
    """

    def __init__(self) -> None:
        self.oom_retries = 0
        self.restart()

    def restart(self) -> None:
        """Begin the next interval."""
        self.tokens = self.frames = self.predicted_peak = self.actual_peak = 0
        self._since = time.monotonic()

    def count(self, inputs: Mapping[str, Any], cut: Any = None, rank: int = 0) -> None:
        """A micro-batch on its way to the model, still on the host; with a `SequenceCut`, one rank's part of it."""
        mask, pixels = inputs.get("attention_mask"), inputs.get("pixel_values_videos")
        if cut is not None:
            mask = cut.take(torch.ones_like(inputs["input_ids"]) if mask is None else mask, rank)
        self.tokens += int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
        self.frames += 0 if pixels is None else len(pixels)

    def peak(self, predicted: int, device: torch.device) -> None:
        """After a micro-step: what was predicted, in bytes, and what the device reached."""
        actual = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        if (actual, predicted) > (self.actual_peak, self.predicted_peak):
            self.actual_peak, self.predicted_peak = actual, predicted

    @property
    def seconds(self) -> float:
        """Since the last `restart`."""
        return max(time.monotonic() - self._since, 1e-9)

    def peaks(self) -> dict[str, float]:
        """Predicted and actual GPU peak in GB, where known."""
        found = {"predicted_peak_gb": self.predicted_peak / GB, "gpu_peak_gb": self.actual_peak / GB}
        return {name: value for name, value in found.items() if value}


class TrainingProgress(TrainerCallback):
    """Training and evaluation as bars of `files.progress` (lines where nobody looks), with speeds and memory at their
    end; what is logged goes between them, to standard error.

    Args:
        throughput: of the trainer. share: how far training is at a step, 0..1; None: by the number of steps.
    """

    def __init__(self, throughput: Throughput, share: Callable[[int], float] | None = None) -> None:
        self._throughput, self._share = throughput, share
        self._shown = {kind: ExitStack() for kind in ("training", "evaluating")}
        self._tell: dict[str, Tell] = {}
        self._batches = 0

    def close(self, *kinds: str) -> None:
        """Take the bars away, all or those of these kinds."""
        for kind in kinds or tuple(self._shown):
            self._shown[kind].close()
            self._tell.pop(kind, None)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            total = state.max_steps if self._share is None else None
            self._tell["training"] = self._shown["training"].enter_context(progress("training", "steps", total))
            self._tell["training"](state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if "training" not in self._tell:
            return
        counted, peaks, total = self._throughput, self._throughput.peaks(), None
        if self._share is not None and (share := self._share(state.global_step)) > 0:
            total = max(state.global_step, round(state.global_step / share))
        text = f"{counted.tokens / counted.seconds:,.0f} tok/s, {counted.frames / counted.seconds:.1f} frames/s"
        if "gpu_peak_gb" in peaks:
            text += f", GPU {peaks['gpu_peak_gb']:.1f} GB ({peaks.get('predicted_peak_gb', 0):.1f} predicted)"
        self._tell["training"](state.global_step, total, text)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """One more batch of an evaluation."""
        if not state.is_world_process_zero:
            return
        if "evaluating" not in self._tell:
            total = len(eval_dataloader) if has_length(eval_dataloader) else None
            self._batches = 0
            self._tell["evaluating"] = self._shown["evaluating"].enter_context(
                progress("evaluating", "batches", total)
            )
        self._batches += 1
        self._tell["evaluating"](self._batches)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An evaluation has ended."""
        self.close("evaluating")

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *given: Any, **kwargs: Any
    ) -> None:
        """A prediction has ended."""
        self.close("evaluating")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and not os.environ.get("TQDM_DISABLE"):
            told = {
                name: f"{value:.4g}" if isinstance(value, float) else value for name, value in (logs or {}).items()
            }
            told.pop("total_flos", None)
            with tqdm.external_write_mode(file=sys.stderr):
                print(told, file=sys.stderr, flush=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Training has ended."""
        self.close("training")
