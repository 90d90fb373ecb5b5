"""What a training step takes on hosts of different speed: the language model by segment length, the tower by chunk.

    python benchmarks/host_speed.py --out benchmarks/results/host_speed.csv

Random weights in bf16: 370M language model, CLIP ViT-L/14-336 and projector trainable. A row is one part of a step:
`language model` (forward and backward under a plan), `tower` (frames forward, forward again, backward, in chunks of
`chunk` frames), `frozen tower` (forward), `whole` (one video, as in whole_model_step.py), `page-locking` (the first
use of host memory for kept activations). Everything runs twice: as the host is, and `shared`, with all threads of this
process on one core that another busy process uses as well; a launch takes about twice as long there. `launch_us` is
what `planner.measure_launch` says in that state. Kernels are tuned before anything is timed.
"""

import argparse
import contextlib
import datetime
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from random_models import SIZES, TINY_TOWER, video_model
from result_tables import hardware, row_writer

from video_ma2mba.modeling_video_ma2mba.cost_time import measure_launch
from video_ma2mba.modeling_video_ma2mba.vision_features import video_rows

FIELDS = ["hardware", "date", "model", "host", "launch_us", "part", "tokens", "frames", "chunk", "layers",
          "segment", "place", "seconds", "first_seconds"]  # fmt: skip


@contextlib.contextmanager
def shared_core() -> Iterator[None]:
    """Inside, all threads of this process run on one core, beside a busy process."""
    before = os.sched_getaffinity(0)
    core = max(before)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    os.sched_setaffinity(busy.pid, {core})
    _pin({core})
    try:
        yield
    finally:
        _pin(before)
        busy.kill()
        busy.wait()


def _pin(cores: set[int]) -> None:
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cores)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(run, device: str, repeats: int = 2) -> list[float]:
    """Seconds of each call; the caller takes the first or the fastest of the rest."""
    seconds = []
    for _ in range(repeats):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        seconds.append(time.perf_counter() - start)
    return seconds


class Parts:
    """The timed parts of one model."""

    def __init__(self, model, device: str) -> None:
        self.model, self.device = model, device
        self.side = model.config.vision_config.image_size
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    def language_model(self, tokens: int) -> None:
        stack = self.model.model.language_model
        width = stack.config.hidden_size
        x = torch.full((1, tokens, width), 0.1, dtype=torch.bfloat16, requires_grad=True)
        keep = torch.zeros(1, tokens, dtype=torch.bool)
        keep[0, -32:] = True
        hidden = stack(inputs_embeds=x, use_cache=False, output_positions=keep.to(self.device)).last_hidden_state
        hidden.float().pow(2).sum().backward()

    def tower(self, frames: int, trains: bool) -> None:
        base = self.model.model
        pixels = torch.zeros(frames, 3, self.side, self.side, dtype=torch.uint8)
        parts = (base.vision_tower, base.multi_modal_projector, self.model.config, pixels)
        if not trains:
            with torch.no_grad():
                video_rows(*parts, recompute=True)
            return
        video_rows(*parts, recompute=True).float().pow(2).sum().backward()

    def whole(self, frames: int) -> None:
        from whole_model_step import batch

        self.model(**batch(self.model, frames, self.device), use_cache=False).loss.backward()


def checkpoint(model, layers: int, segment: int) -> None:
    model.gradient_checkpointing_enable(
        {"method": "multi_axis", "layers_per_block": layers, "segment_length": segment, "offload": True}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="370m", choices=[*SIZES, "tiny"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--segments", type=int, nargs="+", default=[32768, 16384, 8192, 4096])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12])
    parser.add_argument("--chunks", type=int, nargs="+", default=[2, 8, 16, 64])
    parser.add_argument("--frames", type=int, default=192)
    parser.add_argument("--video", type=int, default=512, help="frames of the whole step")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/host_speed.csv"))
    options = parser.parse_args()
    device = options.device
    if options.model == "tiny":
        text = {"hidden_size": 64, "num_hidden_layers": 2}
        model = video_model("370m", device=device, text=text, vision_config=TINY_TOWER)
    else:
        model = video_model(options.model, device=device)
    model.train()
    parts = Parts(model, device)
    write = row_writer(options.out, FIELDS, hardware=hardware(device), date=datetime.date.today().isoformat(),
                       model=options.model)  # fmt: skip
    started = time.perf_counter()
    checkpoint(model, min(options.layers), max(options.segments))
    for segment in options.segments:  # tunes the kernels for every shape
        checkpoint(model, min(options.layers), segment)
        parts.language_model(segment)
    parts.tower(max(options.chunks), True)
    print(f"kernels tuned after {time.perf_counter() - started:.0f} s", flush=True)
    for host in ("own", "shared"):
        with shared_core() if host == "shared" else contextlib.nullcontext():
            launch = 1e6 * measure_launch(device)
            about = {"host": host, "launch_us": round(launch, 2)}
            print(f"{host}: {launch:.2f} us a launch; again {1e6 * measure_launch(device):.2f}", flush=True)
            for layers in options.layers:
                for segment in options.segments:
                    checkpoint(model, layers, segment)
                    first, *rest = timed(lambda: parts.language_model(options.tokens), device)
                    write(about | {"part": "language model", "tokens": options.tokens, "layers": layers,
                                   "segment": segment, "place": "host", "seconds": round(min(rest), 4),
                                   "first_seconds": round(first, 4)})  # fmt: skip
                if host == "shared":
                    break
            for chunk in options.chunks:
                for trains in (True, False):
                    # A chunk that is differentiated is a quarter of the setting.
                    model.config.vision_chunk_frames = chunk * (4 if trains else 1)
                    first, *rest = timed(lambda t=trains: parts.tower(options.frames, t), device)
                    write(about | {"part": "tower" if trains else "frozen tower", "frames": options.frames,
                                   "chunk": chunk, "seconds": round(min(rest), 4),
                                   "first_seconds": round(first, 4)})  # fmt: skip
            model.config.vision_chunk_frames = 32
            checkpoint(model, min(8, max(options.layers)), min(16384, max(options.segments)))
            first, *rest = timed(lambda: parts.whole(options.video), device)
            write(about | {"part": "whole", "frames": options.video, "chunk": 32, "layers": 8, "segment": 16384,
                           "tokens": options.video * model.config.tokens_per_frame + 48, "place": "host",
                           "seconds": round(min(rest), 3), "first_seconds": round(first, 3)})  # fmt: skip
    if device == "cuda":
        started, size = time.perf_counter(), 4 << 30
        torch.empty(size, dtype=torch.uint8, pin_memory=True)
        seconds = time.perf_counter() - started
        write({"host": "own", "part": "page-locking", "tokens": size, "seconds": round(seconds, 3)})


if __name__ == "__main__":
    main()
