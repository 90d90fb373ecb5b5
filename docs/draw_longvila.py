"""Draws `docs/images/longvila.png` from `benchmarks/results/longvila.csv`: `python docs/draw_longvila.py`."""

import csv
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Needles found by depth, and accuracy by frames after each stage, where that was measured."""
    with (ROOT / "benchmarks" / "results" / "longvila.csv").open(encoding="utf-8") as file:
        rows = [row | {"share": 100 * int(row["right"]) / int(row["questions"])} for row in csv.DictReader(file)]
    needles = [row for row in rows if row["measure"] == "needles" and row["distractors"] == "0"]
    accuracy = [row for row in rows if row["measure"] == "accuracy"]
    figure = Figure(figsize=(11 if accuracy else 6, 4), layout="constrained")
    axes = figure.subplots(1, 2 if accuracy else 1, squeeze=False)[0]
    for run, after, frames in dict.fromkeys((row["run"], row["after"], row["frames"]) for row in needles):
        own = [row for row in needles if (row["run"], row["after"], row["frames"]) == (run, after, frames)]
        label = f"{int(frames):,} frames, {run}"
        axes[0].plot([float(row["depth"]) for row in own], [row["share"] for row in own], "o-", label=label)
    axes[0].set(xlabel="depth of the needle", ylabel="found, %", ylim=(-3, 103))
    counts = sorted({int(row["frames"]) for row in accuracy})
    for run, after in dict.fromkeys((row["run"], row["after"]) for row in accuracy):
        own = [row for row in accuracy if (row["run"], row["after"]) == (run, after)]
        places = [counts.index(int(row["frames"])) for row in own]
        axes[1].plot(places, [row["share"] for row in own], "o-", label=f"{run}: {after}")
    if accuracy:
        axes[1].set_xticks(range(len(counts)), [f"{count:,}" for count in counts])
        axes[1].set(xlabel="frames of a video", ylabel="right answers, %", ylim=(-3, 103))
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    figure.savefig(ROOT / "docs" / "images" / "longvila.png", dpi=110)


if __name__ == "__main__":
    main()
