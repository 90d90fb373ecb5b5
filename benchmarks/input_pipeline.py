"""How fast training samples are decoded, and how long a training step waits for them.

    python benchmarks/input_pipeline.py [--out benchmarks/results/input_pipeline.csv]

Samples are minutes of 720p at 30 frames a second (see hour_of_video.py), looked at once a second at 336 x 336. Two
measurements for each number of worker processes: samples per second (and processor seconds per sample, starting the
workers included) when nothing else is done, and the share of time that is spent waiting for data when each step takes
`--step` seconds in which the processor is idle, as when a GPU computes. The wait for the first sample, when nothing is
there yet, is given apart.
"""

import argparse
import datetime
import json
import resource
import tempfile
import time
import warnings
from pathlib import Path

import torch
from hour_of_video import write_hour
from result_tables import hardware, write_rows
from torch.utils.data import DataLoader

from video_ma2mba.processing.byte_tokenizer import build_byte_tokenizer
from video_ma2mba.processing.processing_video_ma2mba import VideoMa2mbaProcessor
from video_ma2mba.processing.video_processing_video_ma2mba import VideoMa2mbaVideoProcessor
from video_ma2mba.trainer.data import VideoChatCollator, load_training_data


def measure(rows, collator, workers: int, step: float) -> tuple[float, float, float, int]:
    """(seconds until the first batch, seconds waiting for the others, seconds of everything after it, frames)."""
    loader = DataLoader(rows, batch_size=1, collate_fn=collator, num_workers=workers)
    began, batches, waited, frames = time.perf_counter(), iter(loader), 0.0, 0
    next(batches)
    first = time.perf_counter() - began
    resumed = time.perf_counter()
    while True:
        time.sleep(step)
        asked = time.perf_counter()
        batch = next(batches, None)
        waited += time.perf_counter() - asked
        if batch is None:
            return first, waited, time.perf_counter() - resumed, frames
        frames += int(batch["num_frames"].sum())


def processor_seconds() -> float:
    """Processor time of this process and of the workers that have ended; other programs do not matter to it."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "input_pipeline.csv")
    parser.add_argument("--seconds", type=int, default=60, help="of each video")
    parser.add_argument("--samples", type=int, default=13)
    parser.add_argument("--step", type=float, default=3.0, help="seconds of a pretended step")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    video_processor = VideoMa2mbaVideoProcessor(size={"height": 336, "width": 336})
    processor = VideoMa2mbaProcessor(build_byte_tokenizer(), video_processor)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        write_hour(Path(folder, "film.mp4"), arguments.seconds, min(arguments.seconds, 20))
        row = json.dumps({"video": "film.mp4", "question": "What happens?", "answer": "A thing moves."})
        Path(folder, "rows.jsonl").write_text(f"{row}\n" * arguments.samples, encoding="utf-8")
        rows = load_training_data(Path(folder, "rows.jsonl"))
        for workers in arguments.workers:
            collator = VideoChatCollator(processor, on_broken="raise")
            before = processor_seconds()
            _, _, seconds, frames = measure(rows, collator, workers, 0.0)
            spent = processor_seconds() - before
            first, waited, stepping, _ = measure(rows, collator, workers, arguments.step)
            results.append(
                {
                    "workers": workers,
                    "samples_per_s": round((arguments.samples - 1) / seconds, 2),
                    "frames_per_s": round(frames / seconds, 1),
                    "processor_s_per_sample": round(spent / arguments.samples, 2),
                    "first_sample_s": round(first, 2),
                    "step_s": arguments.step,
                    "waiting_percent": round(100 * waited / stepping, 1),
                    "video": f"{arguments.seconds} s of 720p at 30 fps",
                    "date": datetime.date.today().isoformat(),
                    "hardware": hardware(),
                    "torch": torch.__version__,
                }
            )
            print(results[-1], flush=True)
    write_rows(arguments.out, results)


if __name__ == "__main__":
    main()
