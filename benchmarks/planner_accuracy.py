"""Predictions of the planner beside the measurements of `ma_gc.py`: GPU peak and tokens per second.

    python benchmarks/planner_accuracy.py [--measured benchmarks/results/ma_gc.csv] [--fit]

Writes planner_accuracy.csv and planner_accuracy.md next to the measurements, and the table in docs/ma_gc.md. Both
peaks are above weights and gradients. `--fit` also prints the time constants (`cost_time.MeasuredCosts`) that
fit the measurements best; memory has no fitted constant. Runs on any machine.
"""

import argparse
import csv
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from random_models import SIZES, text_config
from result_tables import write_rows

from video_ma2mba.modeling_video_ma2mba.cost_memory import StackShape, Workload
from video_ma2mba.modeling_video_ma2mba.cost_step import (
    Prediction,
    StepJob,
    layer_parameter_count,
    predict_job,
)
from video_ma2mba.modeling_video_ma2mba.cost_time import H200, MeasuredCosts
from video_ma2mba.modeling_video_ma2mba.ops_costs import CoreCosts
from video_ma2mba.modeling_video_ma2mba.recompute_plan import RecomputePlan

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "ma_gc.md"
LABELS = 1024  # as in ma_gc.py, and so is which methods keep the input on the host
FITTED = ("matmul", "scan_forward", "scan_backward", "launch_forward", "launch_backward", "layer")
BEFORE = {"scan_forward": 1.95e-11, "scan_backward": 3.9e-11, "layer": 0.0, "page_lock": 2.03e9}
"""Constants of the language model and of its host until 2026-11-28, with mamba-ssm's kernels and the first version of
ours: what was measured with those is compared with what was predicted for those."""
FIELDS = ["hardware", "date", "model", "tokens", "method", "plan", "measured_gb", "predicted_gb", "gb_error_percent",
          "measured_tokens_per_s", "predicted_tokens_per_s", "speed_error_percent"]  # fmt: skip


def job_of(row: dict[str, str]) -> tuple[StepJob, RecomputePlan | None]:
    """The step and the plan behind a row of ma_gc.csv."""
    shape = StackShape.of(text_config(row["model"]), kernels=CoreCosts.named(row["kernels"]))
    tokens = int(row["tokens"])
    found = re.fullmatch(r"l=(\d+) s=(\d+) (host|gpu)", row["plan"])
    plan = RecomputePlan(int(found[1]), int(found[2]), found[3] == "host") if found else None
    on_host = ",host" in row["method"] or row["method"].startswith("multi_axis:")
    work = Workload(
        tokens=tokens,
        kept=min(LABELS, tokens),
        layer_parameters=layer_parameter_count(shape),
        input_on_gpu=not on_host,
        graphs=row["kernels"] == "triton",  # the others were measured before there were any
    )
    return StepJob(shape, work, plain_segment=1 << 17), plan


def usable(row: dict[str, str]) -> bool:
    """Whether the row is a measured step of a Mamba-2 model; the shortest ones only warm the machine up."""
    measured = re.fullmatch(r"[\d.]+", row["gpu_peak_gb"])
    return row["model"] in SIZES and int(row["tokens"]) >= 4096 and bool(measured)


def compare(row: dict[str, str], costs: MeasuredCosts = H200) -> dict[str, object]:
    """One line of the result."""
    job, plan = job_of(row)
    costs = costs if row["kernels"] == "triton" else replace(costs, **BEFORE)
    predicted: Prediction = predict_job(job, plan, costs)
    # The benchmark has a small loss of its own, which never makes the peak; the model's is larger.
    peak = max(total for name, total in predicted.phases.items() if name != "loss")
    gb, speed = peak / 1e9, job.work.tokens / predicted.step_seconds
    measured_gb, measured_speed = float(row["gpu_peak_gb"]), float(row["tokens_per_s"])
    return {
        **{name: row[name] for name in ("hardware", "date", "model", "tokens", "method", "plan")},
        "measured_gb": measured_gb,
        "predicted_gb": round(gb, 2),
        "gb_error_percent": round(100 * (gb / measured_gb - 1), 1),
        "measured_tokens_per_s": round(measured_speed),
        "predicted_tokens_per_s": round(speed),
        "speed_error_percent": round(100 * (speed / measured_speed - 1), 1),
    }


def fit(rows: list[dict[str, str]], start: MeasuredCosts = H200) -> MeasuredCosts:
    """Time constants that minimise the mean logarithmic error of the seconds, one constant at a time."""
    measured = [(*job_of(row), float(row["tokens_per_s"])) for row in rows]

    def error(costs: MeasuredCosts) -> float:
        return sum(
            abs(math.log(job.work.tokens / predict_job(job, plan, costs).step_seconds / speed))
            for job, plan, speed in measured
        )

    return descend(start, FITTED, error)


def descend(start: MeasuredCosts, names: Sequence[str], error: Callable[[MeasuredCosts], float]) -> MeasuredCosts:
    """The constants of these names with which `error` is least, one constant changed at a time."""
    best, lowest, factor = start, error(start), 1.3
    while factor > 1.005:
        improved = False
        for name in names:
            for change in (factor, 1 / factor):
                tried = replace(best, **{name: getattr(best, name) * change})
                if (value := error(tried)) < lowest:
                    best, lowest, improved = tried, value, True
        if not improved:
            factor = math.sqrt(factor)
    return best


def markdown(lines: list[dict[str, object]]) -> str:
    """The comparison as a table."""
    text = [
        "| model | tokens | plan | measured GB | predicted GB | error | measured tok/s | predicted tok/s | error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for line in lines:
        plan = line["plan"] or line["method"]
        text.append(
            f"| {line['model']} | {int(line['tokens']):,} | {plan} | {line['measured_gb']:.2f} | "
            f"{line['predicted_gb']:.2f} | {line['gb_error_percent']:+.1f} % | {line['measured_tokens_per_s']:,} | "
            f"{line['predicted_tokens_per_s']:,} | {line['speed_error_percent']:+.1f} % |"
        )
    return "\n".join(text) + "\n"


def update_page(table: str) -> None:
    """Put the table in the place of the one with the same heading in docs/ma_gc.md."""
    heading, lines = table.split("\n", 1)[0], PAGE.read_text(encoding="utf-8").split("\n")
    start = lines.index(heading)
    stop = next(n for n in range(start, len(lines)) if not lines[n].startswith("|"))
    PAGE.write_text("\n".join([*lines[:start], *table.strip().split("\n"), *lines[stop:]]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, default=RESULTS / "ma_gc.csv")
    parser.add_argument("--fit", action="store_true", help="also print the best time constants")
    arguments = parser.parse_args()
    with arguments.measured.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if usable(row)]
    if not rows:
        raise SystemExit(f"error: {arguments.measured} holds no measured step of a Mamba-2 model")
    lines = [compare(row) for row in rows]
    out = arguments.measured.with_name("planner_accuracy.csv")
    write_rows(out, lines, FIELDS)
    out.with_suffix(".md").write_text(markdown(lines), encoding="utf-8")
    if arguments.measured.parent == RESULTS:
        update_page(markdown(lines))
    within = sum(abs(line["gb_error_percent"]) <= 10 for line in lines)
    print(markdown(lines))
    print(f"GPU peak within 10 % on {within} of {len(lines)} points")
    if arguments.fit:
        costs = fit([row for row in rows if row["kernels"] == "triton"])
        print({name: f"{getattr(costs, name):.4g}" for name in FITTED})
        print(markdown([compare(row, costs) for row in rows]))


if __name__ == "__main__":
    main()
