"""Progress of a training run by steps or by the clock, and the learning rate that follows it."""

from __future__ import annotations

import time

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class WorldClock:
    """Warm-up, a constant rate, and from `decay_from` on a straight line to `floor`, over `steps` optimizer steps or
    `seconds` of training, whichever ends first.

    Callable as the factor of a `LambdaLR`, which saves the attributes with the scheduler: a resumed run goes on where
    the saved one stopped. Seconds count only while training runs.
    """

    def __init__(
        self, steps: int | None, seconds: float | None, warmup_steps: int, decay_from: float = 0.6, floor: float = 0.02
    ):
        if not steps and not seconds:
            raise ValueError("Give the length of training: steps, seconds or both.")
        self.steps, self.seconds, self.warmup_steps, self.floor = steps, seconds, warmup_steps, floor
        self.decay_from, self.elapsed = decay_from, 0.0

    def progress(self, step: int) -> float:
        """How far training is at optimizer step `step`, 0..1."""
        by_steps = step / self.steps if self.steps else 0.0
        by_clock = self.elapsed / self.seconds if self.seconds else 0.0
        return min(max(by_steps, by_clock), 1.0)

    def __call__(self, step: int) -> float:
        warm = min((step + 1) / max(self.warmup_steps, 1), 1.0)
        left = min((1 - self.progress(step)) / max(1 - self.decay_from, 1e-9), 1.0)
        return warm * (self.floor + (1 - self.floor) * left)


class ClockCallback(TrainerCallback):
    """Advances clock and curriculum, saves every `save_seconds`, stops at the end or after `stop_after` seconds."""

    def __init__(self, clock: WorldClock, progress: torch.Tensor, save_seconds: float, stop_after: float | None):
        self.clock, self.progress, self.save_seconds, self.stop_after = clock, progress, save_seconds, stop_after
        self.length = (clock.steps, clock.seconds)
        self.now: float | None = None
        self.begun = self.saved = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        # A resumed scheduler brought the saved clock's length along; the one asked for now counts.
        self.clock.steps, self.clock.seconds = self.length
        self.now, self.begun = None, time.monotonic()
        self.saved = self.begun
        self.progress.fill_(self.clock.progress(state.global_step))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        before, self.now = self.now, time.monotonic()
        if before is not None:  # the first step compiles kernels and waits for the workers: not a measure of progress
            self.clock.elapsed += self.now - before
        progress = self.clock.progress(state.global_step)
        self.progress.fill_(progress)
        out_of_time = self.stop_after is not None and self.now - self.begun >= self.stop_after
        if progress >= 1.0 or out_of_time:
            control.should_training_stop = control.should_save = True
        elif self.now - self.saved >= self.save_seconds:
            self.saved = self.now
            control.should_save = True
