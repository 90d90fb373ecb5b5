"""What a training step takes on hosts of different speed: the language model by segment length, the tower by chunk.

    python benchmarks/host_speed.py --out benchmarks/results/host_speed.csv [--parts "language model"] [--hosts own]

Random weights in bf16: 370M language model, CLIP ViT-L/14-336 and projector trainable. A row is one part of a step:
`language model` (forward and backward under a plan), `tower` (frames forward, forward again, backward, in chunks of
`chunk` frames), `frozen tower` (forward), `whole` (forward and backward of one video that is there already),
`page-locking` (the first use of host memory for kept activations). `host` is `own` (as it is) or `slow`: all threads
of this process on one core, beside a busy process on that core's other hyperthread (`sibling`), or, where there is
none, on that core itself (`shared`). `launch_us` is the mean of `cost_time.measure_launch` before and after the row;
seconds are the median of the runs after the first. Kernels are tuned before anything is timed. `cells` of rows with a
language model are `launched`, kernel by kernel, as all were until 2026-11-28, or `replayed`: full-length ones were
CUDA graphs (`recompute_graph`). `kernels` is "first" where the language model ran on the first version of our kernels,
else "triton". Each row is compared with the prediction for its own kind.

    python benchmarks/host_speed.py --compare

writes what the planner predicts beside every row of --out, to host_accuracy.md there and into docs/ma_gc.md.
"""

import argparse
import contextlib
import csv
import datetime
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from planner_accuracy import BEFORE, RESULTS, descend, update_page
from random_models import SIZES, TINY_TOWER, video_model
from result_tables import hardware, row_writer
from whole_model_step import ANSWER, batch

from video_ma2mba.modeling_video_ma2mba.configuration_sizes import VideoMa2mbaSizes
from video_ma2mba.modeling_video_ma2mba.cost_step import StepJob, predict_job
from video_ma2mba.modeling_video_ma2mba.cost_time import H200, MeasuredCosts, measure_launch, vision_seconds
from video_ma2mba.modeling_video_ma2mba.recompute_plan import RecomputePlan
from video_ma2mba.modeling_video_ma2mba.recompute_store import PinnedPool
from video_ma2mba.modeling_video_ma2mba.vision_features import video_rows
from video_ma2mba.planning.planned_step import counts_and_config, describe_step

FIELDS = ["hardware", "date", "model", "host", "launch_us", "part", "tokens", "frames", "chunk", "layers",
          "segment", "place", "seconds", "first_seconds", "cells", "kernels"]  # fmt: skip
PARTS = ["whole", "language model", "tower", "page-locking"]


@contextlib.contextmanager
def slow_core() -> Iterator[str]:
    """Inside, all threads of this process run on one core, beside a busy process; gives how that was done."""
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    core = max(before)
    others = _siblings(core) & before - {core}
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    os.sched_setaffinity(busy.pid, others or {core})
    _pin({core})
    torch.set_num_threads(1)
    try:
        yield "slow (sibling)" if others else "slow (shared)"
    finally:
        torch.set_num_threads(threads)
        _pin(before)
        busy.kill()
        busy.wait()


def _siblings(core: int) -> set[int]:
    """The hyperthreads of the core that one of them is."""
    try:
        text = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list").read_text(encoding="ascii")
    except OSError:
        return {core}
    ends = [part.split("-") for part in text.strip().split(",")]
    return {number for end in ends for number in range(int(end[0]), int(end[-1]) + 1)}


def _pin(cores: set[int]) -> None:
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cores)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(run, device: str, repeats: int) -> dict[str, float]:
    """Columns of a row: seconds of the first call, the median of the others, and what a launch took around them."""
    seconds, launches = [], [measure_launch(device, 0.25)]
    for _ in range(repeats + 1):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        seconds.append(time.perf_counter() - start)
    launches.append(measure_launch(device, 0.25))
    return {"seconds": round(statistics.median(seconds[1:]), 4), "first_seconds": round(seconds[0], 4),
            "launch_us": round(1e6 * statistics.mean(launches), 2)}  # fmt: skip


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

    @property
    def cells(self) -> str:
        """How the full-length cells of the last step ran."""
        graphs = self.model.model.language_model.engine.graphs
        return "replayed" if graphs is not None and graphs.captured else "launched"

    def tower(self, frames: int, trains: bool) -> None:
        base = self.model.model
        pixels = torch.zeros(frames, 3, self.side, self.side, dtype=torch.uint8)
        parts = (base.vision_tower, base.multi_modal_projector, self.model.config, pixels)
        if not trains:
            with torch.no_grad():
                video_rows(*parts, recompute=True)
            return
        video_rows(*parts, recompute=True).float().pow(2).sum().backward()

    def whole(self, data: dict) -> None:
        self.model(**data, use_cache=False).loss.backward()


def checkpoint(model, layers: int, segment: int) -> None:
    model.gradient_checkpointing_enable(
        {"method": "multi_axis", "layers_per_block": layers, "segment_length": segment, "offload": True}
    )


def job_of(row: dict[str, str]) -> StepJob:
    """The step of a row."""
    width, layers = SIZES[row["model"]]
    config = VideoMa2mbaSizes(text_config={"hidden_size": width, "num_hidden_layers": layers})
    frames = None if row["part"] == "language model" else int(row["frames"])
    counts, _ = counts_and_config(config, None)
    job = describe_step(counts, config, int(row["tokens"] or 1), frames, 1, "none", "bfloat16", ANSWER)
    return replace(job, work=replace(job.work, graphs=row["cells"] == "replayed"))


def predicted(row: dict[str, str], costs: MeasuredCosts = H200) -> float:
    """Seconds that the planner predicts for a row, on a host that needs its `launch_us`."""
    costs = replace(costs, **BEFORE) if row["kernels"] == "first" else costs
    job, costs = job_of(row), costs.on_host(float(row["launch_us"]) / 1e6)
    if row["part"] in ("tower", "frozen tower"):
        assert job.vision is not None
        trains = row["part"] == "tower"
        chunk = int(row["chunk"]) * (4 if trains else 1)
        return vision_seconds(replace(job.vision, chunk=chunk, tower_trains=trains, projector_trains=trains), costs)
    if job.vision is not None:
        job = replace(job, vision=replace(job.vision, chunk=int(row["chunk"])))
    return predict_job(job, RecomputePlan(int(row["layers"]), int(row["segment"]), True), costs).step_seconds


def two_hours() -> tuple[float, float]:
    """Seconds of the first step on two hours of video, measured (whole_model_step.csv) and predicted: where nobody
    measured a launch, the constants stand as they are, and the first step page-locks host memory."""
    with (RESULTS / "whole_model_step.csv").open(encoding="utf-8", newline="") as file:
        (row,) = (row for row in csv.DictReader(file) if row["model"] == "370m" and row["frames"] == "7200")
    layers, segment = (int(word) for word in re.match(r"(\d+) layers x (\d+) tokens", row["plan"]).groups())
    job, plan = job_of(row | {"part": "whole", "cells": "launched"}), RecomputePlan(layers, segment, True)
    costs = replace(H200, **BEFORE)
    prediction = predict_job(job, plan, costs)
    return float(row["seconds"]), prediction.step_seconds + prediction.host_peak / costs.page_lock


def comparison(rows: list[dict[str, str]]) -> str:
    """Measured and predicted seconds as a Markdown table; without a core that another process uses as well, where no
    launch takes as long as the last."""
    names = ("host", "µs a launch", "part", "what", "measured s", "predicted s", "error")
    found = []
    for row in rows:
        if row["part"] != "page-locking" and "shared" not in row["host"]:
            what = [f"{int(row['tokens']):,} tokens" if row["tokens"] else f"{row['frames']} frames"]
            what += [f"{row['layers']} layers x {int(row['segment']):,} a cell"] if row["segment"] else []
            what += [f"chunks of {row['chunk']}"] if row["chunk"] else []
            what += [row["cells"]] if row["cells"] == "replayed" else []
            about = (f"{row['date']}, {row['host']}", row["launch_us"], row["part"], ", ".join(what))
            found.append((*about, float(row["seconds"]), predicted(row)))
    about = ("2026-11-21", f"{1e6 * H200.launch:.1f} (fitted)", "whole, first step")
    found.append((*about, "7,200 frames, 8 layers x 16,384 a cell", *two_hours()))
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    lines += [f"| {' | '.join(a)} | {was:.2f} | {said:.2f} | {said / was - 1:+.0%} |" for *a, was, said in found]
    return "\n".join(lines) + "\n"


def fit(rows: list[dict[str, str]]) -> MeasuredCosts:
    """Constants with which the rows about parts of a step on the host as it is are predicted best: the launch of the
    host on which the language model's constants were measured, then those of the tower. Whole steps take no part.
    """
    own = [row for row in rows if row["host"] == "own"]

    def error_of(kinds: tuple[str, ...]) -> Callable[[MeasuredCosts], float]:
        some = [row for row in own if row["part"] in kinds]
        return lambda costs: sum(abs(math.log(predicted(row, costs) / float(row["seconds"]))) for row in some)

    costs = descend(H200, ["launch"], error_of(("language model",)))
    names = ["tower_launch_forward", "tower_launch_backward", "tower"]
    return descend(costs, names, error_of(("tower", "frozen tower")))


def compare(measured: Path) -> None:
    """Write the table beside the measurements, and where they are the published ones, into the page."""
    with measured.open(encoding="utf-8", newline="") as file:
        table = comparison(list(csv.DictReader(file)))
    measured.with_name("host_accuracy.md").write_text(table, encoding="utf-8")
    if measured.resolve().parent == RESULTS:
        update_page(table)
    print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="370m", choices=[*SIZES, "tiny"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--segments", type=int, nargs="+", default=[32768, 16384, 8192, 4096])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--chunks", type=int, nargs="+", default=[2, 8, 16, 64])
    parser.add_argument("--frames", type=int, default=192, help="at most so many, and 12 chunks")
    parser.add_argument("--video", type=int, default=512, help="frames of the whole step")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--hosts", nargs="+", default=["own", "slow"], choices=["own", "slow"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/host_speed.csv"))
    parser.add_argument("--compare", action="store_true", help="measure nothing, predict the rows of --out")
    parser.add_argument("--fit", action="store_true", help="with --compare: print the best constants")
    options = parser.parse_args()
    if options.compare:
        compare(options.out)
        if options.fit:
            with options.out.open(encoding="utf-8", newline="") as file:
                print(fit(list(csv.DictReader(file))))
        return
    device = options.device
    if options.model == "tiny":
        text = {"hidden_size": 64, "num_hidden_layers": 2}
        model = video_model("370m", device=device, text=text, vision_config=TINY_TOWER)
    else:
        model = video_model(options.model, device=device)
    model.train()
    parts = Parts(model, device)
    write = row_writer(options.out, FIELDS, hardware=hardware(device), date=datetime.date.today().isoformat(),
                       model=options.model, kernels="triton")  # fmt: skip
    started = time.perf_counter()
    for segment in options.segments:  # tunes the kernels for every shape
        checkpoint(model, options.layers, segment)
        parts.language_model(segment)
    if "tower" in options.parts:
        parts.tower(max(options.chunks), True)
    print(f"kernels tuned after {time.perf_counter() - started:.0f} s", flush=True)
    data = batch(model, options.video, device)

    def measure(host: str, segments: list[int], chunks: list[int], wholes: list[tuple[int, int, int]]) -> None:
        for layers, segment, chunk in wholes if "whole" in options.parts else ():
            model.config.vision_chunk_frames = chunk
            checkpoint(model, layers, segment)
            row = timed(lambda: parts.whole(data), device, options.repeats)
            write(row | {"host": host, "part": "whole", "frames": options.video, "chunk": chunk, "layers": layers,
                         "segment": segment, "tokens": data["input_ids"].shape[1], "place": "host",
                         "cells": parts.cells})  # fmt: skip
        for segment in segments if "language model" in options.parts else ():
            checkpoint(model, options.layers, segment)
            row = timed(lambda: parts.language_model(options.tokens), device, options.repeats)
            write(row | {"host": host, "part": "language model", "tokens": options.tokens, "segment": segment,
                         "layers": options.layers, "place": "host", "cells": parts.cells})  # fmt: skip
        for chunk in chunks if "tower" in options.parts else ():
            for trains in (True, False):
                # A chunk that is differentiated is a quarter of the setting.
                model.config.vision_chunk_frames = chunk * (4 if trains else 1)
                frames = min(options.frames, 12 * chunk)
                row = timed(lambda t=trains, f=frames: parts.tower(f, t), device, options.repeats)
                write(row | {"host": host, "part": "tower" if trains else "frozen tower", "frames": frames,
                             "chunk": chunk})  # fmt: skip

    longest, usual = max(options.segments), min(16384, max(options.segments))
    if "own" in options.hosts:
        measure("own", options.segments, options.chunks, [(8, usual, 32), (16, longest, 128)])
    if "slow" in options.hosts:
        with slow_core() as host:
            measure(host, [longest, min(options.segments)], options.chunks[1::2], [(8, usual, 32)])
    if device == "cuda" and "page-locking" in options.parts:
        started, size = time.perf_counter(), 4 << 30
        PinnedPool().reserve(size)
        seconds = time.perf_counter() - started
        write({"host": "own", "part": "page-locking", "tokens": size, "seconds": round(seconds, 3)})


if __name__ == "__main__":
    main()
