"""Tokens and frames per second, predicted and actual GPU peak: counted per step, logged, shown beside the bar."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

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


class ThroughputBar(ProgressCallback):
    """The Trainer's progress bar with speeds and memory at its end."""

    def __init__(self, throughput: Throughput) -> None:
        super().__init__()
        self._throughput = throughput

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if state.is_world_process_zero and self.training_bar is not None:
            counted, peaks = self._throughput, self._throughput.peaks()
            text = f"{counted.tokens / counted.seconds:,.0f} tok/s, {counted.frames / counted.seconds:.1f} frames/s"
            if "gpu_peak_gb" in peaks:
                text += f", GPU {peaks['gpu_peak_gb']:.1f} GB ({peaks.get('predicted_peak_gb', 0):.1f} predicted)"
            self.training_bar.set_postfix_str(text, refresh=False)
