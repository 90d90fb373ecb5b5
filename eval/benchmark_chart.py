"""The chart of an evaluation: a panel for each benchmark, the paper's numbers as marks beside the bars."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..modeling_video_ma2mba.state_writing import whole_file
from .benchmark_scores import Scores
from .benchmarks import is_five_point_scale, title
from .paper_numbers import SIZES, paper_columns

_MARKERS = dict(zip(SIZES, "^sD", strict=True))
_PAPER_COLOUR = "#c05621"


def draw_chart(scores: Mapping[str, Scores], path: Path, model: str, frames: str) -> None:
    """Write a PNG. A bar is a category's share of the best possible, labelled with its score."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heights = [0.26 * len(table.rows) + 0.75 for table in scores.values()]
    figure, axes = plt.subplots(
        len(scores), 1, figsize=(8, sum(heights) + 0.7), dpi=110, height_ratios=heights, squeeze=False
    )
    named: dict[str, str] = {}
    for ax, (name, table) in zip(axes[:, 0], scores.items(), strict=True):
        headings, paper = paper_columns(name, frames)
        named |= {heading: next(mark for size, mark in _MARKERS.items() if size in heading) for heading in headings}
        places = range(len(table.rows))
        full = [5 if is_five_point_scale(name, row.category) else 100 for row in table.rows]
        colours = ["#2b6cb0" if row.category == table.headline else "#90b4d8" for row in table.rows]
        ax.barh(places, [row.value / most for row, most in zip(table.rows, full, strict=True)], color=colours)
        for place, (row, most) in enumerate(zip(table.rows, full, strict=True)):
            text = f"{row.value:.2f}" if most == 5 else f"{row.value:.1f}"
            ax.text(1.03, place, text, va="center", ha="left", fontsize=8)
            for heading, number in zip(headings, paper.get(row.category, ()), strict=False):
                ax.plot(number / most, place, named[heading], color=_PAPER_COLOUR, markersize=5, clip_on=False)
        ax.set_yticks(places, [row.category for row in table.rows], fontsize=8)
        ax.invert_yaxis()
        ax.set_xlim(0, 1.02)
        ax.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
        ax.tick_params(axis="x", labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_title(title(name), fontsize=10, loc="left")
    marks = [
        plt.Line2D([], [], marker=marker, color=_PAPER_COLOUR, linestyle="", label=heading)
        for heading, marker in named.items()
    ]
    if marks:
        figure.legend(handles=marks, loc="lower right", ncols=len(marks), fontsize=8, frameon=False)
    figure.suptitle(f"{model}, {frames}", fontsize=10)
    inch = 1 / figure.get_figheight()
    figure.tight_layout(rect=(0, 0.25 * inch, 1, 1 - 0.1 * inch))
    with whole_file(path) as draft:
        figure.savefig(draft, format="png")
    plt.close(figure)
