"""Draws `docs/images/longvila.png` from `benchmarks/results/longvila.csv`: `python docs/draw_longvila.py`."""

import csv
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Accuracy against frames after each stage, and needles by depth."""
    with (ROOT / "benchmarks" / "results" / "longvila.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    counts = sorted({int(row["frames"]) for row in rows if row["measure"] == "accuracy"})
    for name in dict.fromkeys((row["run"], row["after"]) for row in rows if row["measure"] == "accuracy"):
        own = [row for row in rows if (row["run"], row["after"]) == name and row["measure"] == "accuracy"]
        places = [counts.index(int(row["frames"])) for row in own]
        style = "o-" if name[0] == "from nothing" else "s--"
        left.plot(
            places, [100 * int(r["right"]) / int(r["questions"]) for r in own], style, label=f"{name[0]}: {name[1]}"
        )
    left.set_xticks(range(len(counts)), [f"{count:,}" for count in counts])
    left.set(xlabel="frames of a video", ylabel="right answers, %", ylim=(0, 102))
    longest = max(int(row["frames"]) for row in rows if row["measure"] == "needles")
    for name in dict.fromkeys((row["run"], row["after"]) for row in rows if row["measure"] == "needles"):
        own = [
            row
            for row in rows
            if (row["run"], row["after"]) == name and row["measure"] == "needles" and int(row["frames"]) == longest
        ]
        own = [row for row in own if row["distractors"] == "0"]
        if own:
            found = [100 * int(row["right"]) / int(row["questions"]) for row in own]
            right.plot([float(row["depth"]) for row in own], found, "o-", label=f"{name[0]}: {name[1]}")
    right.set(xlabel=f"depth of the needle among {longest:,} frames", ylabel="found, %", ylim=(-2, 102))
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    figure.savefig(ROOT / "docs" / "images" / "longvila.png", dpi=110)


if __name__ == "__main__":
    main()
