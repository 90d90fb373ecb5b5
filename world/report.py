"""What a run on the rendered world writes down: loss and accuracy per kind, one line each in CSV files."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..trainer.training_clock import TrainingClock
from . import FORMS, WorldDataset, WorldSample
from .scoring import score_forced

LOSS_FIELDS = ("step", "seconds", "progress", "loss", "grad_norm", "learning_rate")
ACCURACY_FIELDS = ("step", "seconds", "frames", "all", *FORMS)


def append_row(path: Path, fields: Sequence[str], row: Mapping[str, Any]) -> None:
    """Add one line to a CSV file, with its header if it is new."""
    new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore")
        if new:
            writer.writeheader()
        writer.writerow({name: f"{value:.5g}" if isinstance(value, float) else value for name, value in row.items()})


@contextlib.contextmanager
def reading_mode(model: torch.nn.Module, bf16: bool) -> Iterator[None]:
    """The model in eval mode, under the autocast it trains with; back to what it was afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            yield
    finally:
        model.train(training)


class WorldReport(TrainerCallback):
    """Logs the loss and, every `seconds` of training, the accuracy on validation videos of a few fixed lengths.

    `weights` (one per kind) receives how much a kind is to be trained from then on: more where more is wrong.
    """

    def __init__(
        self,
        out: Path,
        clock: TrainingClock,
        processor: Any,
        data: WorldDataset,
        weights: torch.Tensor,
        seconds: float,
        bf16: bool,
    ) -> None:
        self.out, self.clock, self.processor, self.seconds, self.bf16 = out, clock, processor, seconds, bf16
        self.data, self.weights = data, weights
        self.measured = 0.0
        shortest, longest = data.frames
        self.lengths = sorted({shortest, (shortest + longest) // 2, longest})
        self.samples: dict[int, list[WorldSample]] = {}

    def _validation(self, frames: int) -> list[WorldSample]:
        if frames not in self.samples:
            self.samples[frames] = [self.data.sample(index, frames) for index in range(len(self.data))]
        return self.samples[frames]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if logs and "loss" in logs:
            row = {"step": state.global_step, "seconds": self.clock.elapsed, **logs}
            row["progress"] = self.clock.progress(state.global_step)
            append_row(self.out / "training_log.csv", LOSS_FIELDS, row)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.clock.elapsed - self.measured >= self.seconds:
            self.measured = self.clock.elapsed
            self.measure(kwargs["model"], state.global_step)

    def measure(self, model: Any, step: int) -> dict[int, dict[str, float]]:
        """Accuracy per kind at each length, also appended to `validation.csv`."""
        results = {}
        for frames in self.lengths:
            samples = self._validation(frames)
            share = max(len(samples) * 16 // max(frames, 16), 1)  # videos at once: shorter batches for longer videos
            with reading_mode(model, self.bf16):
                scored = [
                    pair
                    for first in range(0, len(samples), share)
                    for pair in score_forced(model, self.processor, samples[first : first + share])
                ]
            row: dict[str, Any] = {"step": step, "seconds": self.clock.elapsed, "frames": frames}
            row["all"] = sum(hit for _, hit in scored) / len(scored)
            for name in (*FORMS, *self.data.kinds):
                hits = [hit for question, hit in scored if name in (question.form, question.kind)]
                if hits:
                    row[name] = sum(hits) / len(hits)
            append_row(self.out / "validation.csv", (*ACCURACY_FIELDS, *self.data.kinds), row)
            print(
                "validation",
                *(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()),
                flush=True,
            )
            results[frames] = row
        for number, kind in enumerate(self.data.kinds):
            shares = [row[kind] for row in results.values() if kind in row]
            wrong = 1 - sum(shares) / len(shares) if shares else 0.5
            self.weights[number] = 0.25 + wrong
        return results
