"""Stage 2 on videos of mixed length on one GPU: where a training step's time goes.

    python benchmarks/training_profile.py --preset 370m --out benchmarks/results/training_profile.csv

Rendered videos (`--size` pixels, `--rate` frames per second, H.264) are decoded in worker processes and read at 1 FPS;
`VideoMa2mbaTrainer` trains everything under bf16 autocast, with random weights, as recipe `stage2` says but for the
global batch. After `--warmup` steps (kernels are tuned) `--steps` steps are timed, one row of the table each: CUDA
events mark where vision, language model and optimizer begin and end, and the wait for the next batch is measured on
the host. The row "all" sums up. Then one more step is profiled; its trace goes to `--trace`. The timed steps end early
once `--limit` seconds have passed since the start. On a CPU it runs, too, to see that it does.
"""

import argparse
import datetime
import json
import random
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from random_models import SIZES, processor_of, video_model
from result_tables import append_rows
from training_clock import CUDA, GpuUse, MeasuredTrainer, TimedCollator, write_trace
from transformers import TrainerCallback

from video_ma2mba.trainer.data import load_training_data
from video_ma2mba.trainer.recipe import read_recipe
from video_ma2mba.trainer.training_inputs import default_collator
from video_ma2mba.world import WorldDataset, chat
from video_ma2mba.world.video_files import write_world

TINY = {
    "text": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512, "state_size": 16, "head_dim": 16,
             "chunk_size": 16},
    "vision_config": {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "image_size": 28,
                      "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 7, "projection_dim": 32},
}  # fmt: skip
"""`--preset tiny`: to see the script run on a CPU."""
LENGTHS = (16, 32, 64, 128, 256, 512)  # seconds; as many videos of each
BEGUN = time.perf_counter()


def say(text: str) -> None:
    print(f"{time.perf_counter() - BEGUN:6.1f} s  {text}", flush=True)


class Interval(TrainerCallback):
    """Writes one row for every step after the warm-up, and profiles the step after the last of them."""

    def __init__(self, options: argparse.Namespace, about: dict) -> None:
        self.options, self.about = options, about
        self.rows: list[dict[str, float]] = []
        self.profiler, self.use = None, GpuUse()

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.trainer.optimizer_done()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if CUDA:
            torch.cuda.synchronize()
        if self.profiler is not None:
            self._end_profile()
            control.should_training_stop = True
            return
        if state.global_step <= self.options.warmup:
            say(f"warm-up step {state.global_step}: {list(self.trainer.plans)}")
        else:
            self._measure(state.global_step - self.options.warmup)
            late = time.perf_counter() - BEGUN > self.options.limit
            if late or len(self.rows) == self.options.steps:
                self._end_timing(control)
        self.trainer.restart()
        self.use.take()
        self.begun = time.perf_counter()

    def _measure(self, step: int) -> None:
        trainer, parts = self.trainer, self.trainer.clock.seconds()
        row = {"seconds": time.perf_counter() - self.begun, "waited": trainer.waited}
        row |= {"tokens": trainer.throughput.tokens, "frames": trainer.throughput.frames}
        row["vision"] = parts.get("vision forward", 0.0) + parts.get("vision backward", 0.0)
        row |= {"lm": parts["micro-batch"] - row["vision"], "optimizer": parts["optimizer"]}
        row |= {"predicted_peak_gb": 0.0, "gpu_peak_gb": 0.0, **trainer.throughput.peaks()}
        self.rows.append(row)
        self._write(str(step), row, 1, "; ".join(trainer.plans))

    def _end_timing(self, control) -> None:
        peak = max(self.rows, key=lambda row: row["gpu_peak_gb"])
        total = {name: sum(row[name] for row in self.rows) for name in self.rows[0]}
        total |= {name: peak[name] for name in ("predicted_peak_gb", "gpu_peak_gb")}
        self._write("all", total, len(self.rows), "")
        if self.options.trace is None or not CUDA:
            control.should_training_stop = True
            return
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self.profiler.__enter__()

    def _end_profile(self) -> None:
        seconds = time.perf_counter() - self.begun
        self.profiler.__exit__(None, None, None)
        frames = self.trainer.throughput.frames
        say(f"profiled step: {seconds:.2f} s, {frames} frames, {self.trainer.clock.seconds()}")
        say(str(write_trace(self.profiler, seconds, self.options.trace)))

    def _write(self, step: str, row: dict[str, float], steps: int, plans: str) -> None:
        seconds, decoding = row["seconds"], self.trainer.data_collator.seconds_per_frame()
        line = self.about | {
            "step": step,
            "frames": row["frames"],
            "tokens": row["tokens"],
            "seconds": round(seconds, 3),
            "steps_per_second": round(steps / seconds, 3),
            "tokens_per_second": round(row["tokens"] / seconds),
            "frames_per_second": round(row["frames"] / seconds, 1),
            "waiting_for_data": round(row["waited"] / seconds, 4),
            "vision": round(row["vision"] / seconds, 4),
            "language_model": round(row["lm"] / seconds, 4),
            "optimizer": round(row["optimizer"] / seconds, 4),
            "worker_ms_per_frame": round(decoding * 1e3, 2),
            "workers_busy": round(decoding * row["frames"] / seconds, 2),
            "gpu_use_nvml": self.use.take() if step != "all" else "",
            "predicted_peak_gb": round(row["predicted_peak_gb"], 2),
            "gpu_peak_gb": round(row["gpu_peak_gb"], 2),
            "plans": plans,
        }
        say(str(line))
        append_rows(self.options.out, [line])


def render_videos(folder: Path, count: int, size: int, rate: float) -> Path:
    """Write `count` videos and one chat about each; the JSONL file."""
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        rows = list(pool.map(partial(render_one, folder, size, rate), reversed(range(count))))
    random.Random(0).shuffle(rows)
    target = folder / "chats.jsonl"
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return target


def render_one(folder: Path, size: int, rate: float, index: int) -> dict:
    world, questions = WorldDataset("train", 10**6, questions=8).asked(index, LENGTHS[index % len(LENGTHS)])
    write_world(folder / f"{index:03d}.mp4", world, fps=rate, size=size)
    return {"id": str(index), "messages": chat(questions, str(folder / f"{index:03d}.mp4"))}


def build(preset: str):
    """Model with random weights in fp32 (bf16 comes from autocast), CLIP-L/14-336, and a byte-level processor."""
    size, settings = ("370m", TINY) if preset == "tiny" else (preset, {})
    model = video_model(size, torch.float32, "cuda" if CUDA else "cpu", **settings).train()
    return model, processor_of(model.config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="370m", choices=["tiny", *SIZES])
    parser.add_argument("--videos", type=int, default=48)
    parser.add_argument("--size", type=int, default=336, help="pixels of a side")
    parser.add_argument("--rate", type=float, default=10.0, help="frames per second in the files")
    parser.add_argument("--global-batch", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no further step is timed")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/training_profile"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/training_profile.csv"))
    parser.add_argument("--trace", type=Path, help="where to write the profiled step, as .json.gz")
    options = parser.parse_args()

    shutil.rmtree(options.folder, ignore_errors=True)
    chats = render_videos(options.folder / "videos", options.videos, options.size, options.rate)
    say("videos are rendered")
    model, processor = build(options.preset)
    say("model is built")
    overrides = [f"output_dir={options.folder / 'run'}", f"use_cpu={not CUDA}", "deepspeed=null", "report_to=none"]
    overrides += [f"global_batch_size={options.global_batch}", f"dataloader_num_workers={options.workers}"]
    overrides += [f"max_steps={options.warmup + options.steps + 1}", "save_strategy=no", "logging_steps=100"]
    overrides += ["disable_tqdm=true"]
    _, args = read_recipe("stage2", overrides)
    data = load_training_data(chats)
    about = {
        "hardware": torch.cuda.get_device_name() if CUDA else "CPU",
        "date": datetime.date.today().isoformat(),
        "model": f"{options.preset} + {'tiny tower' if options.preset == 'tiny' else 'CLIP-L/14-336'}",
        "videos": f"{options.size} px, {options.rate:g} fps, {LENGTHS[0]} to {LENGTHS[-1]} s",
        "workers": options.workers,
        "samples_a_step": options.global_batch,
    }
    interval = Interval(options, about)
    trainer = MeasuredTrainer(
        model,
        args,
        data_collator=TimedCollator(default_collator(processor, args, data)),
        train_dataset=data,
        processing_class=processor,
        callbacks=[interval],
    )
    interval.trainer = trainer
    trainer.watch()
    try:
        trainer.train()
    finally:
        interval.use.close()


if __name__ == "__main__":
    main()
