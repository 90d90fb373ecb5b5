"""Peak memory of converting a checkpoint to the released layout and back, against its largest file.

    python benchmarks/conversion_memory.py [--preset 370m] [--shard-mb 300 1000]

A model of the paper's size with random weights (bf16) is converted by `video-ma2mba convert` in processes of its own,
whose peak resident memory (mapped pages of files included) is what Linux counted at their end. Tensors must come back
bit for bit. Appends to `results/conversion_memory.csv`.
"""

import argparse
import datetime
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from result_tables import append_rows, hardware
from safetensors import safe_open

from video_ma2mba.conversion.compose import PRESETS, compose

OUT = Path(__file__).parent / "results" / "conversion_memory.csv"
CONVERT = """
import sys
from video_ma2mba.cli.main import app
try:
    app(sys.argv[1:])
finally:
    # getrusage would begin with the peak of the process that started this one
    (peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")]
    print(int(peak) * 1024, file=sys.stderr)
"""


def convert(*words: str) -> tuple[float, int]:
    """Seconds and peak bytes of one conversion."""
    began = time.perf_counter()
    command = [sys.executable, "-c", CONVERT, "convert", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return time.perf_counter() - began, int(done.stderr.splitlines()[-1])


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tensors, bit for bit, however cut into files."""
    where = {}
    for file in weights(other):
        with safe_open(file, "pt") as opened:
            where |= dict.fromkeys(opened.keys(), file)
    count = 0
    for file in weights(one):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                with safe_open(where[name], "pt") as there:
                    a, b = opened.get_tensor(name), there.get_tensor(name)
                if a.dtype != b.dtype or not torch.equal(
                    a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
                ):
                    return False
                count += 1
    return count == len(where)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="370m", choices=PRESETS)
    parser.add_argument("--shard-mb", type=int, nargs="+", default=[300, 1000])
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        ours = Path(scratch) / "ours"
        compose(None, None, arguments.preset, ours)
        for megabytes in arguments.shard_mb:
            official, back = Path(scratch) / f"official-{megabytes}", Path(scratch) / f"back-{megabytes}"
            size = ("--max-shard-size", f"{megabytes}MB")
            for source, target, way in ((ours, official, ("--to", "official")), (official, back, ())):
                seconds, peak = convert(str(source), "--out", str(target), *size, *way)
                largest = max(file.stat().st_size for file in weights(source))
                rows.append(
                    {
                        "date": datetime.date.today().isoformat(),
                        "hardware": hardware(),
                        "model": arguments.preset,
                        "to": "official" if way else "ours",
                        "checkpoint_mb": round(sum(file.stat().st_size for file in weights(source)) / 1e6),
                        "largest_file_mb": round(largest / 1e6),
                        "peak_rss_mb": round(peak / 1e6),
                        "above_largest_file_mb": round((peak - largest) / 1e6),
                        "seconds": round(seconds, 1),
                    }
                )
                print(rows[-1], flush=True)
            if not same_tensors(ours, back):
                raise SystemExit("tensors did not come back bit for bit")
    append_rows(OUT, rows)


if __name__ == "__main__":
    main()
