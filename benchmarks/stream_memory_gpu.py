"""GPU and host memory, and time per frame, of a session that is asked while it reads; one row every 500 frames.

    python benchmarks/stream_memory_gpu.py [--preset 370m] [--frames 5000] --out FILE.csv

Random weights in bf16, CLIP ViT-L/14-336 shape, 144 tokens a frame, random frames of 336x336 pixels from memory. Two
states take turns (`remember`), so every frame is read into two rows. One answer of 16 tokens is asked for per row of
the table, while the reading goes on; its time includes waiting for the chunk of frames that is being read.
"""

import argparse
import datetime
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from random_models import SIZES, processor_of, video_model
from result_tables import hardware, write_rows

from video_ma2mba import VideoSession

EVERY = 500
WAITING = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=SIZES, default="370m")
    parser.add_argument("--frames", type=int, default=5000)
    parser.add_argument("--remember", type=float, default=600)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    cuda = arguments.device.startswith("cuda")
    model = video_model(arguments.preset, device=arguments.device)
    processor = processor_of(model.config)
    side = processor.video_processor.size["height"]
    pictures = np.random.default_rng(0).integers(0, 256, (64, side, side, 3), np.uint8)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    rows = []
    with VideoSession(model, processor, policy="queue", waiting=WAITING, remember=arguments.remember) as session:
        began, read = time.perf_counter(), 0
        for number in range(1, arguments.frames + 1):
            session.push(pictures[number % len(pictures)])
            if number % EVERY:
                continue
            while session.seen is None:
                time.sleep(0.001)
            asking = time.perf_counter()
            session.ask("What is shown?", max_new_tokens=16, min_new_tokens=16)
            answered = time.perf_counter()
            rows.append(
                {
                    "frames": session.report.frames_read,
                    "ms_per_frame": round(1e3 * (answered - began) / (session.report.frames_read - read), 3),
                    "answer_ms": round(1e3 * (answered - asking), 1),
                    "gpu_peak_mb_above_weights": round((torch.cuda.max_memory_allocated() - weights) / 1e6)
                    if cuda
                    else "",
                    "host_rss_mb": round(psutil.Process().memory_info().rss / 1e6),
                    "state_mb": round(session.seen.state.nbytes / 1e6, 2),
                }
            )
            print(rows[-1], flush=True)
            began, read = time.perf_counter(), session.report.frames_read
            if cuda:
                torch.cuda.reset_peak_memory_stats()
        session.finish()
    setting = {
        "preset": arguments.preset,
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(arguments.device),
        "torch": torch.__version__,
    }
    write_rows(arguments.out, [{**row, **setting} for row in rows])


if __name__ == "__main__":
    main()
