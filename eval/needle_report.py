"""What a needle search found: `cells.json`, `summary.md` and the heat map `heatmap.png`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..modeling_video_ma2mba.state_writing import whole_file, write_whole
from .needle_search import Cell, write_json


def write_report(out: Path, cells: Sequence[Cell], about: dict[str, Any]) -> None:
    """Write the three files.

    Args:
        cells: from `measure`.
        about: "command", "model", "haystack", "needles", "date", "device", "dtype", "versions": as the report says it.
    """
    totals = {name: mean(cells, name) for name in ("greedy", "forced", "chance")}
    write_json(out / "cells.json", {**about, "mean": totals, "cells": list(cells)})
    write_whole(out / "summary.md", _markdown(cells, about, totals))
    draw_heatmap(
        cells,
        out / "heatmap.png",
        f"{about['model']}, haystack: {about['haystack']}, {about['needles']} needles a cell",
    )


def mean(cells: Sequence[Cell], name: str) -> float:
    """Mean over all questions of all cells."""
    return sum(cell[name] * cell["questions"] for cell in cells) / sum(cell["questions"] for cell in cells)


def _markdown(cells: Sequence[Cell], about: dict[str, Any], totals: dict[str, float]) -> str:
    lengths, depths, grid = _grid(cells)
    lines = [
        f"# Needle in a haystack: {about['model']}",
        "",
        "```",
        about["command"],
        "```",
        "",
        f"Haystack: {about['haystack']}. {about['needles']} needles a cell, {sum(c['questions'] for c in cells)} "
        f"questions in all. Greedy exact match **{totals['greedy']:.1%}**, teacher-forced {totals['forced']:.1%}, "
        f"chance {totals['chance']:.1%}. {about['date']}, {about['device']}, {about['dtype']}, {about['versions']}; "
        f"{sum(cell['seconds'] for cell in cells):.0f} s.",
        "",
        "Greedy exact match in %, and teacher-forced where it differs, by haystack frames and the needle's depth "
        "(0: before the first frame, 1: behind the last).",
        "",
        "| frames | " + " | ".join(f"{depth:g}" for depth in depths) + " | all |",
        "| --- |" + " --- |" * (len(depths) + 1),
    ]
    for frames in lengths:
        members = [grid[frames, depth] for depth in depths if (frames, depth) in grid]
        entries = [_entry(grid.get((frames, depth))) for depth in depths]
        lines.append(f"| {frames:,} | " + " | ".join([*entries, f"**{100 * mean(members, 'greedy'):.0f}**"]) + " |")
    return "\n".join([*lines, "", "![Depth against length](heatmap.png)", ""])


def _entry(cell: Cell | None) -> str:
    if cell is None:
        return ""
    greedy, forced = f"{100 * cell['greedy']:.0f}", f"{100 * cell['forced']:.0f}"
    return greedy if greedy == forced else f"{greedy} ({forced})"


def _grid(cells: Sequence[Cell]) -> tuple[list[int], list[float], dict[tuple[int, float], Cell]]:
    grid = {(cell["frames"], cell["depth"]): cell for cell in cells}
    return sorted({frames for frames, _ in grid}), sorted({depth for _, depth in grid}), grid


def draw_heatmap(cells: Sequence[Cell], path: Path, subject: str) -> None:
    """Greedy exact match as colour and number, length to the right, depth downwards."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    lengths, depths, grid = _grid(cells)
    values = np.array([[grid[f, d]["greedy"] if (f, d) in grid else np.nan for f in lengths] for d in depths])
    width, height = max(6.4, 2.4 + 0.62 * len(lengths)), max(3.6, 1.9 + 0.46 * len(depths))
    figure, ax = plt.subplots(figsize=(width, height), dpi=120)
    image = ax.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    ax.set_xticks(range(len(lengths)), [f"{frames:,}" for frames in lengths], rotation=45 if len(lengths) > 12 else 0)
    ax.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    ax.set_xlabel("haystack frames")
    ax.set_ylabel("depth of the needle (0 first, 1 last)")
    for row, column in np.ndindex(values.shape):
        value = values[row, column]
        if not np.isnan(value):
            colour = "black" if value > 0.6 else "white"
            ax.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, ax=ax, label="greedy exact match", format=matplotlib.ticker.PercentFormatter(1))
    ax.set_title(f"Needle in a haystack (chance {mean(cells, 'chance'):.1%})\n{subject}", fontsize=10)
    figure.tight_layout()
    with whole_file(path) as draft:
        figure.savefig(draft, format="png")
    plt.close(figure)
