"""Draws benchmarks/results/ma_gc.csv: memory and speed of a training step against length, all methods.

    python benchmarks/plot_ma_gc.py

The counterpart of the paper's Figure 1, from our own measurements only.
"""

import csv
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from video_ma2mba.planning.plan_plot import token_axis, token_count

RESULTS = Path(__file__).parent / "results"
TOKENS_PER_FRAME = 144
STYLES = {
    ("2.7b", "off"): ("Mamba-2 2.7B, no checkpointing", "#888888", "o--"),
    ("2.7b", "per_layer"): ("Mamba-2 2.7B, every layer", "#c98a1b", "s--"),
    ("2.7b", "sqrt"): ("Mamba-2 2.7B, every 8 layers", "#7a5195", "^--"),
    ("2.7b", "multi_axis"): ("Mamba-2 2.7B, multi-axis, host memory", "#1b7a4b", "o-"),
    ("370m", "per_layer"): ("Mamba-2 370M, every layer", "#e2b96b", "s:"),
    ("370m", "multi_axis"): ("Mamba-2 370M, multi-axis, host memory", "#6fbf94", "o:"),
    ("1.3b", "per_layer"): ("Mamba-2 1.3B, every layer", "#d7a24a", "s-."),
    ("1.3b", "multi_axis"): ("Mamba-2 1.3B, multi-axis, host memory", "#45a073", "o-."),
    ("llama-3b", "off"): ("Llama-3.2-3B shape, no checkpointing", "#b0b0d8", "x--"),
    ("llama-3b", "llama_per_layer"): ("Llama-3.2-3B shape, every layer", "#4a5fb5", "x-"),
}


def series() -> dict[tuple[str, str], list[tuple[int, float, float]]]:
    """(model, method) -> (tokens, GPU peak in GB, tokens per second), the fastest measurement of each length."""
    best: dict[tuple[str, str], dict[int, tuple[float, float]]] = defaultdict(dict)
    with (RESULTS / "ma_gc.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if not row["tokens_per_s"]:
                continue
            method = "multi_axis" if row["plan"].endswith("host") else row["method"]
            if row["method"] == "multi_axis" and not row["plan"].endswith("host"):
                continue  # with no budget the planner may choose what "every layer" shows
            key, tokens, speed = (row["model"], method), int(row["tokens"]), float(row["tokens_per_s"])
            if speed > best[key].get(tokens, (0.0, 0.0))[1]:
                best[key][tokens] = (float(row["gpu_peak_gb"]), speed)
    return {key: sorted((t, *values) for t, values in points.items()) for key, points in best.items()}


def draw(column: int, label: str, path: Path, log: bool) -> None:
    figure, axes = plt.subplots(figsize=(10, 6.2), dpi=120)
    found = series()
    for key, (name, colour, style) in STYLES.items():
        if points := found.get(key):
            axes.plot([p[0] for p in points], [p[column] for p in points], style, color=colour, label=name, ms=5)
    token_axis(axes)
    if log:
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: token_count(value))
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of one sample (144 tokens a frame)")
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)
    above = axes.secondary_xaxis("top", functions=(lambda t: t / TOKENS_PER_FRAME, lambda f: f * TOKENS_PER_FRAME))
    above.set_xscale("log")
    above.xaxis.set_major_formatter(lambda frames, _: f"{frames:,g}")
    above.set_xlabel("frames (= seconds at 1 FPS)")
    axes.legend(fontsize=9, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    print(f"wrote {path}")


def main() -> None:
    draw(1, "GPU memory above weights and gradients (GB)", RESULTS / "ma_gc_memory.png", log=True)
    draw(2, "tokens per second, forward + backward", RESULTS / "ma_gc_speed.png", log=True)


if __name__ == "__main__":
    main()
