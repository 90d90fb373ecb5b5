"""Stage 2 on videos of mixed length on one GPU: where a training step's time goes.

    python benchmarks/training_profile.py --preset 370m --out benchmarks/results/training_profile.csv

Rendered videos (`--size` pixels, `--rate` frames per second, H.264) are decoded in worker processes and read at 1 FPS;
`VideoMa2mbaTrainer` trains everything under bf16 autocast, with random weights, as recipe `stage2` says but for the
global batch. After `--warmup` steps (kernels are tuned) `--steps` steps are timed without disturbing them:
CUDA events mark where vision, language model and optimizer begin and end, and the wait for the next batch is measured
on the host. One more step is profiled; its trace goes beside the table. On a CPU it runs, too, to see that it does.
"""

import argparse
import csv
import datetime
import gzip
import json
import random
import shutil
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from transformers import TrainerCallback

from video_ma2mba import (
    VideoMa2mbaConfig,
    VideoMa2mbaForConditionalGeneration,
    VideoMa2mbaProcessor,
    VideoMa2mbaVideoProcessor,
)
from video_ma2mba.processing.byte_tokenizer import VIDEO_TOKEN, build_byte_tokenizer
from video_ma2mba.synthetic import WorldDataset, chat
from video_ma2mba.synthetic.video_files import write_world
from video_ma2mba.trainer.data import load_training_data
from video_ma2mba.trainer.recipe import build_recipe
from video_ma2mba.trainer.training_inputs import default_collator
from video_ma2mba.trainer.video_trainer import VideoMa2mbaTrainer

SIZES = {"tiny": (64, 2), "370m": (1024, 48), "1.3b": (2048, 48), "2.7b": (2560, 64)}
LENGTHS = (16, 32, 64, 128, 256, 512)  # seconds; as many videos of each


class TimedCollator:
    """Adds up, over all worker processes, the seconds that decoding and tokenizing take."""

    def __init__(self, collator) -> None:
        self.collator, self.report = collator, collator.report
        self.seconds = torch.zeros(256).share_memory_()

    def __call__(self, rows):
        start = time.perf_counter()
        batch = self.collator(rows)
        worker = torch.utils.data.get_worker_info()
        self.seconds[0 if worker is None else worker.id] += time.perf_counter() - start
        return batch


class Stopwatch:
    """Seconds on the GPU's own clock (or the host's) between marks; reading it waits for the GPU."""

    def __init__(self) -> None:
        self.spans: dict[str, list] = {}

    def mark(self):
        if not torch.cuda.is_available():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def span(self, part: str, start, end) -> None:
        self.spans.setdefault(part, []).append((start, end))

    def seconds(self) -> dict[str, float]:
        if not torch.cuda.is_available():
            return {part: sum(b - a for a, b in spans) for part, spans in self.spans.items()}
        torch.cuda.synchronize()
        return {part: sum(a.elapsed_time(b) for a, b in spans) / 1e3 for part, spans in self.spans.items()}


class Measured(VideoMa2mbaTrainer):
    """Marks the parts of every step."""

    def watch(self) -> None:
        self.clock, self.waited, self.plans = Stopwatch(), 0.0, set()
        base, embed = self.video_model.model, self.video_model.model.embed_inputs

        def embed_inputs(*args, **kwargs):
            start = self.clock.mark()
            rows = embed(*args, **kwargs)
            self.clock.span("vision forward", start, self.clock.mark())
            if rows.requires_grad:
                rows.register_hook(self._language_model_done)
            return rows

        base.embed_inputs = embed_inputs

    def _language_model_done(self, gradient) -> None:
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
            self.plans.add(str(self._retry.planner.last))
        return loss

    def _clip_grad_norm(self, model):
        self._optimizer_begins = self.clock.mark()
        return super()._clip_grad_norm(model)


class Interval(TrainerCallback):
    """Begins to measure after the warm-up and stops before the profiled step, which it wraps."""

    def __init__(self, warmup: int, steps: int, trace: Path | None) -> None:
        self.first, self.last, self.trace = warmup, warmup + steps, trace
        self.results: dict[str, float] = {}
        self.busy: list[int] = []
        self.profiler = None

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        clock = self.trainer.clock
        clock.span("optimizer", self.trainer._optimizer_begins, clock.mark())

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.first:
            self._synchronize()
            self.trainer.clock, self.trainer.waited = Stopwatch(), 0.0
            self.trainer.data_collator.seconds.zero_()
            self.trainer.throughput.restart()
            self.begun = time.perf_counter()
            self.watching = True
            threading.Thread(target=self._watch_gpu, daemon=True).start()
        elif state.global_step == self.last:
            self._synchronize()
            self.watching, throughput = False, self.trainer.throughput
            self.results = {"seconds": time.perf_counter() - self.begun, "waited": self.trainer.waited}
            self.results |= {"tokens": throughput.tokens, "frames": throughput.frames, **self.trainer.clock.seconds()}
            self.results |= throughput.peaks()
            self.results["decoding_cpu"] = float(self.trainer.data_collator.seconds.sum())
            if self.trace is not None and torch.cuda.is_available():
                self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                self.profiler.__enter__()
                self.profiled = time.perf_counter()
        elif state.global_step == self.last + 1 and self.profiler is not None:
            self._synchronize()
            self.profiled = time.perf_counter() - self.profiled
            self.profiler.__exit__(None, None, None)

    def _synchronize(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def _watch_gpu(self) -> None:
        while self.watching and torch.cuda.is_available():
            try:
                self.busy.append(torch.cuda.utilization())
            except (ImportError, RuntimeError):  # without NVML's Python package
                return
            time.sleep(0.2)


def write_trace(profiler, seconds: float, target: Path) -> dict[str, float]:
    """Save the trace as gzipped JSON; share of the profiled step in which a kernel ran, and what ran longest."""
    raw = target.with_suffix("")
    profiler.export_chrome_trace(str(raw))
    events = json.loads(raw.read_text())["traceEvents"]
    with gzip.open(target, "wt", compresslevel=9) as file:
        file.write(raw.read_text())
    raw.unlink()
    kernels = sorted((e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if e.get("cat") == "kernel")
    busy, until, by_name = 0.0, 0.0, {}
    for start, end, name in kernels:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
        by_name[name] = by_name.get(name, 0.0) + end - start
    for name, total in sorted(by_name.items(), key=lambda item: -item[1])[:20]:
        print(f"{total / 1e6:8.3f} s  {name[:150]}")
    return {"kernels": len(kernels), "kernel_share": busy / 1e6 / seconds}


def render_videos(folder: Path, count: int, size: int, rate: float) -> Path:
    """Write `count` videos and one chat about each; the JSONL file."""
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        rows = list(pool.map(partial(render_one, folder, size, rate), range(count)))
    random.Random(0).shuffle(rows)
    target = folder / "chats.jsonl"
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target


def render_one(folder: Path, size: int, rate: float, index: int) -> dict:
    world, questions = WorldDataset("train", 10**6, questions=8).asked(index, LENGTHS[index % len(LENGTHS)])
    write_world(folder / f"{index:03d}.mp4", world, fps=rate, size=size)
    return {"id": str(index), "messages": chat(questions, str(folder / f"{index:03d}.mp4"))}


def build(preset: str):
    """Model with random weights in fp32 (bf16 comes from autocast), CLIP-L/14-336, and a byte-level processor."""
    width, layers = SIZES[preset]
    tokenizer = build_byte_tokenizer()
    vision = None
    if preset == "tiny":
        vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "image_size": 28}
        vision |= {"num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 7, "projection_dim": 32}
    text = {"hidden_size": width, "num_hidden_layers": layers}
    if preset == "tiny":
        text |= {"vocab_size": 512, "state_size": 16, "head_dim": 16, "chunk_size": 16}
    config = VideoMa2mbaConfig(
        text_config=text, vision_config=vision, video_token_id=tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = VideoMa2mbaForConditionalGeneration(config)
    side = config.vision_config.image_size
    processor = VideoMa2mbaProcessor(
        tokenizer,
        VideoMa2mbaVideoProcessor(size={"height": side, "width": side}),
        tokens_per_frame=config.tokens_per_frame,
    )
    return model, processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="370m", choices=SIZES)
    parser.add_argument("--videos", type=int, default=48)
    parser.add_argument("--size", type=int, default=336, help="pixels of a side")
    parser.add_argument("--rate", type=float, default=10.0, help="frames per second in the files")
    parser.add_argument("--global-batch", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/training_profile"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/training_profile.csv"))
    parser.add_argument("--trace", type=Path, help="where to write the profiled step, as .json.gz")
    options = parser.parse_args()

    start = time.perf_counter()
    shutil.rmtree(options.folder, ignore_errors=True)
    chats = render_videos(options.folder / "videos", options.videos, options.size, options.rate)
    print(f"rendered in {time.perf_counter() - start:.0f} s", flush=True)
    model, processor = build(options.preset)
    _, args = build_recipe(
        {
            "output_dir": str(options.folder / "run"),
            "use_cpu": not torch.cuda.is_available(),
            "learning_rate": 4e-5,
            "vision_learning_rate": 4e-6,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.1,
            "weight_decay": 0.05,
            "adam_beta2": 0.95,
            "global_batch_size": options.global_batch,
            "per_device_train_batch_size": 1,
            "train_sampling_strategy": "group_by_length",
            "dataloader_num_workers": options.workers,
            "dataloader_prefetch_factor": 2 if options.workers else None,
            "dataloader_persistent_workers": bool(options.workers),
            "max_steps": options.warmup + options.steps + 1,
            "save_strategy": "no",
            "logging_steps": 100,
            "report_to": "none",
            "disable_tqdm": True,
        }
    )
    data = load_training_data(chats)
    interval = Interval(options.warmup, options.steps, options.trace)
    trainer = Measured(
        model,
        args,
        data_collator=TimedCollator(default_collator(processor, args, data)),
        train_dataset=data,
        processing_class=processor,
        callbacks=[interval],
    )
    interval.trainer = trainer
    trainer.watch()
    trainer.train()

    found = interval.results
    seconds = found["seconds"]
    vision = found.get("vision forward", 0.0) + found.get("vision backward", 0.0)
    cuda = torch.cuda.is_available()
    row = {
        "hardware": torch.cuda.get_device_name() if cuda else "CPU",
        "date": datetime.date.today().isoformat(),
        "model": options.preset,
        "videos": f"{options.size} px, {options.rate:g} fps, {LENGTHS[0]} to {LENGTHS[-1]} s",
        "workers": options.workers,
        "samples_a_step": options.global_batch,
        "steps": options.steps,
        "steps_per_second": round(options.steps / seconds, 3),
        "tokens_per_second": round(found["tokens"] / seconds),
        "frames_per_second": round(found["frames"] / seconds, 1),
        "waiting_for_data": round(found["waited"] / seconds, 4),
        "vision": round(vision / seconds, 4),
        "language_model": round((found["micro-batch"] - vision) / seconds, 4),
        "optimizer": round(found["optimizer"] / seconds, 4),
        "decoding_cpu_seconds_per_second": round(found["decoding_cpu"] / seconds, 3),
        "gpu_use_nvml": round(sum(interval.busy) / len(interval.busy) / 100, 3) if interval.busy else "",
        "predicted_peak_gb": round(found.get("predicted_peak_gb", 0), 2),
        "gpu_peak_gb": round(found.get("gpu_peak_gb", 0), 2),
        "plans": "; ".join(sorted(trainer.plans)),
    }
    if interval.profiler is not None:
        row |= {k: round(v, 4) for k, v in write_trace(interval.profiler, interval.profiled, options.trace).items()}
    print(row, flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    fresh = not options.out.exists()
    with options.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if fresh:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
