"""Seconds and peak memory of asking about videos of one minute to one hour, on the CPU, with the bundled checkpoint.

    python benchmarks/long_video_memory.py [--model DIR] [--seconds 60 600 3600]

Every video (one frame a second, 64x64 pixels) is read by a `video-ma2mba ask` of its own; the peak resident memory is
what the system counted at the end of that process. Writes `results/long_video_memory.csv`.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from result_tables import hardware, write_rows

from video_ma2mba.world import build_world, video_seed
from video_ma2mba.world.video_files import write_world

OUT = Path(__file__).parent / "results" / "long_video_memory.csv"
QUESTION = "Which sign did the card show?"
ASK = """
import resource, sys
from video_ma2mba.cli.main import app
try:
    app(sys.argv[1:])
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr)  # Linux counts in kB
"""


def measure(video: Path, model: str | None) -> dict:
    """Ask one question in a fresh process."""
    command = [sys.executable, "-c", ASK, "ask", str(video), QUESTION, "--json", "--device", "cpu"]
    done = subprocess.run(
        [*command, *(["--model", model] if model else [])], capture_output=True, text=True, check=True
    )
    record = json.loads(done.stdout.splitlines()[-1])
    return {
        "frames": record["frames"],
        "read_seconds": record["read_seconds"],
        "answer_seconds": record["answer_seconds"],
        "state_mb": round(record["state_bytes"] / 1e6, 3),
        "peak_rss_mb": round(int(done.stderr.splitlines()[-1]) / 1e6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="model directory (default: the bundled checkpoint)")
    parser.add_argument("--seconds", type=int, nargs="+", default=[60, 600, 3600])
    arguments = parser.parse_args()
    setting = {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seconds in arguments.seconds:
            video = Path(folder) / f"{seconds}.mp4"
            write_world(video, build_world(video_seed("test", seconds), seconds))
            rows.append({"video_seconds": seconds, **measure(video, arguments.model), **setting})
            print(rows[-1])
    write_rows(OUT, rows)


if __name__ == "__main__":
    main()
