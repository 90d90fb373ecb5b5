"""Draws benchmarks/results/decode_speed.csv and prefill_speed.csv beside them: speed_decode.png, speed_prefill.png.

python benchmarks/plot_speed.py
"""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

from video_ma2mba.planning.plan_plot import token_axis

RESULTS = Path(__file__).parent / "results"
COLOURS = {"ours": "#1b7a4b", "mamba-ssm": "#c98a1b", "transformers": "#4a5fb5"}

# A state is written back after every so many tokens.
WAYS = {
    "graphs, written 1": "graphs, state written every token",
    "graphs, bf16 state, written 1": "graphs, bf16 state written every token",
    "graphs, bf16 state, written 16": "graphs, bf16 state written every 16 tokens",
}


def rows(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["tokens_per_s"].replace(".", "").isdigit()]


def draw_decoding(path: Path) -> None:
    """One panel per batch size, one bar per implementation and way."""
    found = rows("decode_speed.csv")
    batches = sorted({int(row["batch"]) for row in found})
    figure, panels = plt.subplots(1, len(batches), figsize=(6.0 * len(batches), 3.8), dpi=120, squeeze=False)
    for axes, batch in zip(panels[0], batches, strict=True):
        bars = sorted((row for row in found if int(row["batch"]) == batch), key=lambda row: float(row["tokens_per_s"]))
        names = [f"{row['implementation']}: {WAYS.get(row['way'], row['way'])}" for row in bars]
        drawn = axes.barh(
            names,
            [float(row["tokens_per_s"]) for row in bars],
            color=[COLOURS[row["implementation"]] for row in bars],
        )
        axes.bar_label(drawn, fmt="{:,.0f}", padding=3, fontsize=8)
        axes.set_title(f"batch {batch}: tokens per second, all rows", fontsize=10)
        axes.margins(x=0.15)
        axes.tick_params(labelsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Decoding, Mamba-2 {found[0]['model']}, bf16, {found[0]['hardware']}", fontsize=11)
    figure.tight_layout()
    figure.savefig(path)


def draw_reading(path: Path) -> None:
    """Speed and memory against length."""
    found = [row for row in rows("prefill_speed.csv") if row["implementation"] != "ours" or row["way"] == "stream"]
    if not found:
        print(f"{path.name}: prefill_speed.csv holds no readings by length yet")
        return
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), dpi=120)
    for name, colour in COLOURS.items():
        points = sorted((int(row["tokens"]), row) for row in found if row["implementation"] == name)
        for axes, column in zip(panels, ("tokens_per_s", "gb_above_weights"), strict=True):
            axes.plot([p[0] for p in points], [float(p[1][column]) for p in points], "o-", color=colour, label=name)
    for axes, label in zip(panels, ("tokens per second", "GB above the weights"), strict=True):
        token_axis(axes)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.set_xlabel("tokens read")
        axes.set_title(label, fontsize=10)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=9)
    figure.suptitle(f"Reading, Mamba-2 {found[0]['model']}, bf16, batch 1, {found[0]['hardware']}", fontsize=11)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    draw_decoding(RESULTS / "speed_decode.png")
    draw_reading(RESULTS / "speed_prefill.png")
