"""Draws `docs/images/longvila.png` from `benchmarks/results/longvila.csv`: `python docs/draw_longvila.py`."""

import csv
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
STAGES = "1-2-3-4-5"
"""The order of which every stage was measured."""


def main() -> None:
    """Accuracy by frames after each stage and of each order, needles by depth, and streams by length."""
    with (ROOT / "benchmarks" / "results" / "longvila.csv").open(encoding="utf-8") as file:
        rows = [row | {"share": 100 * int(row["right"]) / int(row["questions"])} for row in csv.DictReader(file)]
    figure = Figure(figsize=(11, 8), layout="constrained")
    (stages, orders), (needles, streams) = figure.subplots(2, 2)
    accuracy = [row for row in rows if row["measure"] == "accuracy" and row["frames"].isdecimal()]
    _by_frames(stages, [row | {"label": row["after"]} for row in accuracy if row["run"] == STAGES], "after each stage")
    last = [row | {"label": row["run"]} for row in accuracy if row["after"] == "long_sft"]
    _by_frames(orders, last, "orders, at their end")
    read = [row | {"label": row["run"]} for row in rows if row["measure"] == "streams"]
    _by_frames(streams, read, "streams, about their last minute")
    streams.set_xlabel("frames read into one state")
    found = [row for row in rows if row["measure"] == "needles" and row["distractors"] == "0"]
    found = [row for row in found if row["run"] not in (STAGES,) or row["after"] == "long_sft"]
    found = [row for row in found if row["run"] in (STAGES, "bundled checkpoint")]
    for run, frames in dict.fromkeys((row["run"], row["frames"]) for row in found):
        own = [row for row in found if (row["run"], row["frames"]) == (run, frames)]
        style = "s--" if run == STAGES else "o-"
        label = f"{int(frames):,} frames, {run}"
        needles.plot([float(row["depth"]) for row in own], [row["share"] for row in own], style, label=label)
    needles.set(title="needles", xlabel="depth of the needle", ylabel="found, %", ylim=(-3, 103))
    for axes in (stages, orders, needles, streams):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(ROOT / "docs" / "images" / "longvila.png", dpi=110)


def _by_frames(axes: Any, rows: list[dict[str, Any]], title: str) -> None:
    """A line for each label, over numbers of frames, and what guessing gives."""
    counts = sorted({int(row["frames"]) for row in rows})
    for label in dict.fromkeys(row["label"] for row in rows):
        own = sorted((row for row in rows if row["label"] == label), key=lambda row: int(row["frames"]))
        axes.plot([counts.index(int(row["frames"])) for row in own], [row["share"] for row in own], "o-", label=label)
    guessed = {int(row["frames"]): 100 * float(row["chance"]) for row in rows}
    axes.plot(range(len(counts)), [guessed[count] for count in counts], ":", color="grey", label="chance")
    axes.set_xticks(range(len(counts)), [f"{count:,}" for count in counts])
    axes.set(title=title, xlabel="frames of a video", ylabel="right answers, %", ylim=(-3, 103))


if __name__ == "__main__":
    main()
