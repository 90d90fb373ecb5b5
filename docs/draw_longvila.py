"""Draws `docs/images/longvila.png` from `benchmarks/results/longvila.csv`: `python docs/draw_longvila.py`."""

import csv
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
STAGES = "1-2-3-4-5"
"""The order of which every stage was measured."""


def main() -> None:
    """Accuracy by frames after each stage and of each order, needles by depth and length, and streams by length."""
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
    _needle_map(needles, [row for row in found if row["run"] != "bundled before"])
    for axes in (stages, orders, streams):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc=(0.02, 0.05), ncols=1 if axes is streams else 2)
    figure.savefig(ROOT / "docs" / "images" / "longvila.png", dpi=110)


def _needle_map(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Needles found, a row for each model and length, a column for each depth."""
    depths = sorted({float(row["depth"]) for row in rows})
    cells: dict[str, dict[float, dict[str, Any]]] = {}
    for row in rows:
        where = f"{row['run']}, after {row['after']}" if row["run"] == STAGES else row["run"]
        cells.setdefault(f"{where}, {int(row['frames']):,}", {})[float(row["depth"])] = row
    cells = {name: own for name, own in cells.items() if "after alignment" not in name}  # none of them
    shares = [[own[depth]["share"] for depth in depths] for own in cells.values()]
    axes.imshow(shares, aspect="auto", vmin=0, vmax=100, cmap="RdYlGn", alpha=0.7)
    for line, own in enumerate(cells.values()):
        for column, depth in enumerate(depths):
            axes.text(
                column, line, f"{own[depth]['right']}/{own[depth]['questions']}", ha="center", va="center", size=8
            )
    axes.set_yticks(range(len(cells)), list(cells), fontsize=8)
    axes.set_xticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes.set(title="needles found, by frames", xlabel="depth of the needle")


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
