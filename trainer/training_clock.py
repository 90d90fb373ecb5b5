"""Training that ends by the clock: progress by steps or seconds, the learning rate and the saves that follow it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, get_scheduler

_RESOLUTION = 10_000  # steps in which a schedule of transformers is looked up by progress
ENDLESS = 10_000_000
"""`max_steps` of a run that only the clock ends."""


class TrainingClock:
    """A schedule of transformers over `steps` optimizer steps or `seconds` of training, whichever ends first.

    Callable as the factor of a `LambdaLR`, which saves the attributes with the scheduler: a resumed run goes on where
    the saved one stopped. Seconds count only while training runs. The warm-up is counted in steps.
    """

    def __init__(
        self,
        steps: int | None,
        seconds: float | None,
        warmup_steps: int = 0,
        schedule: str = "linear",
        schedule_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if not steps and not seconds:
            raise ValueError("give the length of training: max_steps, max_seconds or both")
        self.steps, self.seconds, self.warmup_steps = steps, seconds, warmup_steps
        self.schedule, self.settings = str(getattr(schedule, "value", schedule)), dict(schedule_kwargs or {})
        self.elapsed = 0.0

    def progress(self, step: int) -> float:
        """How far training is at optimizer step `step`, 0..1."""
        by_steps = step / self.steps if self.steps else 0.0
        by_clock = self.elapsed / self.seconds if self.seconds else 0.0
        return min(max(by_steps, by_clock), 1.0)

    def __call__(self, step: int) -> float:
        warm = min((step + 1) / max(self.warmup_steps, 1), 1.0)
        factor = _factors(self.schedule, tuple(sorted(self.settings.items())))
        return warm * factor(round(self.progress(step) * _RESOLUTION))


@functools.lru_cache
def _factors(schedule: str, given: tuple[tuple[str, Any], ...]) -> Callable[[int], float]:
    """The factor of a schedule of transformers at each of `_RESOLUTION` steps. Shares of the whole (`num_decay_steps`
    below 1) become steps."""
    settings = {
        name: round(value * _RESOLUTION) if name.endswith("_steps") and value <= 1 else value for name, value in given
    }
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    found = get_scheduler(schedule, optimizer, 0, _RESOLUTION, scheduler_specific_kwargs=settings)
    return found.lr_lambdas[0]


class ClockCallback(TrainerCallback):
    """Advances the clock, saves every `save_seconds`, stops at the end or after `stop_after` seconds of this run."""

    def __init__(self, clock: TrainingClock, save_seconds: float | None = None, stop_after: float | None = None):
        self.clock, self.save_seconds, self.stop_after = clock, save_seconds, stop_after
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

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        before, self.now = self.now, time.monotonic()
        if before is not None:  # the first step compiles kernels and waits for the workers: not a measure of progress
            self.clock.elapsed += self.now - before
        out_of_time = self.stop_after is not None and self.now - self.begun >= self.stop_after
        if self.clock.progress(state.global_step) >= 1.0 or out_of_time:
            control.should_training_stop = control.should_save = True
        elif self.save_seconds is not None and self.now - self.saved >= self.save_seconds:
            self.saved = self.now
            control.should_save = True


class ClockedTrainer(Trainer):
    """A Trainer whose `max_seconds`, `stop_after` and `save_seconds` count. `clock` is None without them."""

    clock: TrainingClock | None = None

    def clock_callbacks(self, args: Any, schedule: dict[str, Any] | None) -> list[TrainerCallback]:
        """Make the clock, before anything else is made; what advances it.

        Args:
            schedule: settings of `args.lr_scheduler_type`, as shares of the highest rate.
        """
        if args.max_seconds is None and args.stop_after is None and args.save_seconds is None:
            return []
        steps = args.max_steps if 0 < args.max_steps < ENDLESS else None
        settings = (args.get_warmup_steps(ENDLESS), args.lr_scheduler_type, schedule)
        self.clock = TrainingClock(steps or (None if args.max_seconds else ENDLESS), args.max_seconds, *settings)
        return [ClockCallback(self.clock, args.save_seconds, args.stop_after)]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """As in transformers; with `max_seconds` the schedule runs by the clock."""
        if self.args.max_seconds is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, self.clock)
        return self.lr_scheduler
