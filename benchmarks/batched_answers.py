"""Answers in batches against one by one: the same answers, how much sooner.

    python benchmarks/batched_answers.py                                  # the bundled checkpoint on the CPU
    python benchmarks/batched_answers.py --preset 2.7b --device cuda      # CLIP-L + 2.7B with random weights

"questions": 64 questions about one video that was read before (`pipe.ask(state, [...])`). "videos": 32 rendered videos
of 8 to 64 frames, one question each (`pipe(videos, questions, batch_size=...)`), reading included. Every setting runs
once to warm up and then three times; the median counts (of CPU seconds, by which CPU runs are compared, the least).
Answers must equal those one by one; with random weights in bf16, where rounding decides between near-equal tokens, the
share that does is reported. Appends to `results/batched_answers.csv`.
"""

import argparse
import datetime
import time
from pathlib import Path

import numpy as np
import torch
from random_models import SIZES
from read_overlap import bundled_pipeline, random_pipeline, seconds
from result_tables import append_rows, hardware

from video_ma2mba.world import WorldDataset, WorldRenderer

OUT = Path(__file__).parent / "results" / "batched_answers.csv"


def rendered(count: int) -> tuple[list[np.ndarray], list[str]]:
    """Videos (F, 64, 64, 3) with a question each."""
    data = WorldDataset(size=count, split="test", frames=(8, 64), seed=5)
    videos = [np.concatenate(list(WorldRenderer(data.world(i), 64).chunks(1.0))) for i in range(count)]
    return videos, [data.asked(i)[1][0].text for i in range(count)]


def timed(run, size: int) -> tuple[float, float]:
    """Wall-clock seconds, and seconds of all CPU cores, which say more where other programs use them as well."""
    cpu = time.process_time()
    took = seconds(lambda: run(size))
    return took, time.process_time() - cpu


def measure(name: str, run, sizes: list[int], repeats: int, clock: str) -> list[dict[str, object]]:
    """`run(batch size)` gives a list of answers; batch size 1 is one by one and comes first.

    `clock` is what speeds are compared by: "seconds", or "CPU seconds".
    """
    rows: list[dict[str, object]] = []
    alone = None
    for size in sizes:
        answers = run(size)
        alone = answers if alone is None else alone
        took, cpu = zip(*sorted(timed(run, size) for _ in range(repeats)), strict=True)
        took, cpu = took[repeats // 2], min(cpu)
        same = sum(a == b for a, b in zip(answers, alone, strict=True)) / len(alone)
        row: dict[str, object] = {"what": name, "batch size": size, "answers": len(answers)}
        row |= {"seconds": round(took, 3), "CPU seconds": round(cpu, 3)}
        row["times as fast as one by one"] = round((rows[0] if rows else row)[clock] / row[clock], 2)
        rows.append({**row, "compared by": clock, "answers as one by one": f"{same:.1%}"})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--preset", choices=SIZES, help="random weights of this size (default: the bundled checkpoint)"
    )
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--videos", type=int, default=32)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    device = arguments.device
    pipe = random_pipeline(arguments.preset, device, None, None) if arguments.preset else bundled_pipeline(device)
    videos, questions = rendered(arguments.videos)
    tokens = {"max_new_tokens": arguments.new_tokens}
    many = [questions[i % len(questions)] for i in range(64)]
    state = pipe.read(videos[0])

    def ask(size: int) -> list[str]:
        if size == 1:
            return [pipe.ask(state, question, **tokens) for question in many]
        return [a for first in range(0, 64, size) for a in pipe.ask(state, many[first : first + size], **tokens)]

    def read_and_ask(size: int) -> list[str]:
        return [found[0]["answer"] for found in pipe(videos, questions, batch_size=size, **tokens)]

    clock = "CPU seconds" if device.type == "cpu" else "seconds"
    rows = measure("questions about one state", ask, [1, 8, 64], arguments.repeats, clock)
    rows += measure("videos of 8 to 64 frames", read_and_ask, [1, 4, 8, 16], arguments.repeats, clock)
    exact = all(row["answers as one by one"] == "100.0%" for row in rows)
    assert exact or arguments.preset, "batches must not change answers"
    about = {
        "model": f"CLIP-L + {arguments.preset}, random, bf16" if arguments.preset else "bundled, fp32",
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
    }
    append_rows(arguments.out, [{**row, **about} for row in rows])


if __name__ == "__main__":
    main()
