"""Where the time of the trainer's steps goes: marks on the GPU's own clock, worker seconds, NVML samples, a trace."""

from __future__ import annotations

import gzip
import json
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import torch

from video_ma2mba.trainer.video_trainer import VideoMa2mbaTrainer

CUDA = torch.cuda.is_available()


class TimedCollator:
    """Adds up, over all worker processes, the seconds that decoding and tokenizing take, and the frames."""

    def __init__(self, collator: Any) -> None:
        self.collator, self.report = collator, collator.report
        self.counted = torch.zeros(2, 256, dtype=torch.float64).share_memory_()  # seconds and frames of each worker

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        start = time.perf_counter()
        batch = self.collator(rows)
        worker = torch.utils.data.get_worker_info()
        place = 0 if worker is None else worker.id
        self.counted[0, place] += time.perf_counter() - start
        self.counted[1, place] += len(batch.get("pixel_values_videos", ()))
        return batch

    def seconds_per_frame(self) -> float:
        seconds, frames = self.counted.sum(1).tolist()
        return seconds / max(frames, 1)


class Stopwatch:
    """Seconds on the GPU's own clock (or the host's) between marks; reading it waits for the GPU."""

    def __init__(self) -> None:
        self.spans: dict[str, list] = {}

    def mark(self) -> Any:
        if not CUDA:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def span(self, part: str, start: Any, end: Any) -> None:
        self.spans.setdefault(part, []).append((start, end))

    def seconds(self) -> dict[str, float]:
        if not CUDA:
            return {part: sum(b - a for a, b in spans) for part, spans in self.spans.items()}
        torch.cuda.synchronize()
        return {part: sum(a.elapsed_time(b) for a, b in spans) / 1e3 for part, spans in self.spans.items()}


class MeasuredTrainer(VideoMa2mbaTrainer):
    """Marks the parts of every step: `clock`, `waited` (host seconds waiting for batches), `plans`."""

    def watch(self) -> None:
        """Begin to mark; call once, before training."""
        self.restart()
        base, embed = self.video_model.model, self.video_model.model.embed_inputs

        def embed_inputs(*args, **kwargs):
            start = self.clock.mark()
            rows = embed(*args, **kwargs)
            self.clock.span("vision forward", start, self.clock.mark())
            if rows.requires_grad:
                rows.register_hook(self._language_model_done)
            return rows

        base.embed_inputs = embed_inputs

    def restart(self) -> None:
        self.clock, self.waited, self.plans = Stopwatch(), 0.0, {}
        self.throughput.restart()

    def _language_model_done(self, gradient: torch.Tensor) -> None:
        self._backward_of_vision = self.clock.mark()

    def get_batch_samples(self, *args, **kwargs):
        start = time.perf_counter()
        try:
            return super().get_batch_samples(*args, **kwargs)
        finally:
            self.waited += time.perf_counter() - start

    def training_step(self, *args, **kwargs):
        start = self._backward_of_vision = self.clock.mark()
        loss = super().training_step(*args, **kwargs)
        end = self.clock.mark()
        self.clock.span("micro-batch", start, end)
        if self._backward_of_vision is not start:
            self.clock.span("vision backward", self._backward_of_vision, end)
        if self._retry.planner is not None:
            self.plans[str(self._retry.planner.last)] = None
        return loss

    def _clip_grad_norm(self, model):
        self._optimizer_begins = self.clock.mark()
        return super()._clip_grad_norm(model)

    def optimizer_done(self) -> None:
        self.clock.span("optimizer", self._optimizer_begins, self.clock.mark())


class GpuUse:
    """Samples nvidia-smi's utilization (share of time in which some kernel runs) five times a second."""

    def __init__(self) -> None:
        self.samples: list[int] = []
        self._process = None
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
        if CUDA:
            try:
                self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            except OSError:
                return
            threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            if line.strip().isdigit():
                self.samples.append(int(line))

    def take(self) -> str | float:
        """Mean share since the last call; empty where nothing was sampled."""
        taken, self.samples = self.samples, []
        return round(sum(taken) / len(taken) / 100, 3) if taken else ""

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()


def write_trace(profiler: torch.profiler.profile, seconds: float, target: Path) -> dict[str, float]:
    """Save kernels and copies as a gzipped trace (chrome://tracing); share of `seconds` in which a kernel ran.

    Launches, shapes and stacks are left out: with them the trace of a step takes tens of megabytes.
    """
    raw = target.with_suffix("")
    profiler.export_chrome_trace(str(raw))
    found = json.loads(raw.read_text(encoding="utf-8"))["traceEvents"]
    raw.unlink()
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    events = [event for event in found if event.get("cat") in kinds or event.get("ph") == "M"]
    for event in events:
        if event.get("cat") in kinds:
            event.pop("args", None)
            event["name"] = event["name"][:120]
    with gzip.open(target, "wt", compresslevel=6) as file:
        json.dump({"traceEvents": events}, file, separators=(",", ":"))
    kernels = sorted((e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if e.get("cat") == "kernel")
    busy, until, by_name = 0.0, 0.0, {}
    for start, end, name in kernels:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
        by_name[name] = by_name.get(name, 0.0) + end - start
    for name, total in sorted(by_name.items(), key=lambda item: -item[1])[:25]:
        print(f"{total / 1e6:8.3f} s  {name}")
    return {"kernels": len(kernels), "kernel_share": busy / 1e6 / seconds}
