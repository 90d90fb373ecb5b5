"""Seconds and peak memory of `video-ma2mba where` on videos of one minute to one hour, on the CPU.

    python benchmarks/relevance_memory.py [--seconds 60 600 3600] [--memory 2GB]

Gradient x input and decay weights (`--steps 0`) with the bundled checkpoint, each video in a process of its own; n
steps of integrated gradients take n times as long again, in the same memory. Writes `results/relevance_memory.csv`.
"""

import argparse
import datetime
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from long_video_memory import ASK, QUESTION
from result_tables import hardware, write_rows

from video_ma2mba.world import build_world, video_seed
from video_ma2mba.world.video_files import write_world

OUT = Path(__file__).parent / "results" / "relevance_memory.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, nargs="+", default=[60, 600, 3600])
    parser.add_argument("--memory", default="2GB", help="what the recomputed cells may take")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seconds in arguments.seconds:
            video, numbers = Path(folder) / f"{seconds}.mp4", Path(folder) / f"{seconds}.csv"
            write_world(video, build_world(video_seed("test", seconds), seconds))
            command = ["where", str(video), QUESTION, "--steps", "0", "--memory", arguments.memory, "--device", "cpu"]
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", ASK, *command, "--csv", str(numbers)],
                capture_output=True,
                text=True,
                check=True,
            )
            row = {"video_seconds": seconds, "curve_rows": len(numbers.read_text(encoding="utf-8").splitlines()) - 1}
            row |= {"memory": arguments.memory, "process_seconds": round(time.perf_counter() - began, 1)}
            row |= {"peak_rss_mb": round(int(done.stderr.splitlines()[-1]) / 1e6), "date": datetime.date.today()}
            row |= {"hardware": hardware(), "torch": torch.__version__}
            rows.append(row | {"threads": torch.get_num_threads()})
            print(rows[-1])
    write_rows(OUT, rows)


if __name__ == "__main__":
    main()
