"""Draws `docs/images/architecture.png`: `python docs/draw_architecture.py` (needs matplotlib)."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from draw_overview import ASK, INK, QUIET, STATE, VISION, arrow, box
from matplotlib.axes import Axes

OUT = Path(__file__).parent / "images" / "architecture.png"
HEIGHT = 1.0
SEAM = "#b23a48"
# Each lane: (title, colour, [(left edge, width, text, seam), ...]); a seam is where another kind of part goes in.
READING = (
    (0.2, 1.9, "file, stream,\npictures", None),
    (2.5, 1.9, "processing/\nreader, chat", None),
    (4.8, 2.0, "vision_*\nframes to rows", "towers"),
    (7.2, 2.0, "stack_* mixer_*\nblock by block", "operations: ops_*"),
    (9.6, 1.9, "state_*\nvideo state", "kinds of layer state"),
    (11.9, 1.9, "decode_*\ntoken by token", None),
    (14.2, 1.4, "answer", None),
)
TRAINING = (
    (0.2, 1.9, "rows of any\nform", None),
    (2.5, 1.9, "trainer/data\ncollator", None),
    (4.8, 2.0, "planner, cost_*\none plan a step", None),
    (7.2, 2.0, "recompute_*\ncell by cell", "order of cells"),
    (9.6, 1.9, "parallel_*\nborders", "neighbours, ranks"),
    (11.9, 1.9, "recompute_loss\nlabels only", None),
    (14.2, 1.4, "gradient", None),
)


def lane(ax: Axes, y: float, title: str, colour: str, boxes: tuple) -> None:
    """One row of boxes with arrows between them; the names of seams stand below."""
    ax.text(0.2, y + HEIGHT + 0.22, title, fontsize=12, color=colour, va="bottom")
    for (left, width, text, seam), following in zip(boxes, (*boxes[1:], None), strict=True):
        box(ax, left, y, width, HEIGHT, colour, text, 10.5)
        if following is not None:
            arrow(ax, (left + width, y + HEIGHT / 2), (following[0], y + HEIGHT / 2))
        if seam is not None:
            ax.plot([left, left + width], [y - 0.13] * 2, color=SEAM, linewidth=2.2)
            ax.text(left + width / 2, y - 0.22, seam, fontsize=10, color=SEAM, ha="center", va="top")


def draw() -> None:
    figure, ax = plt.subplots(figsize=(13.4, 5.0), dpi=110)
    ax.set(xlim=(0, 15.8), ylim=(-0.75, 5.1))
    ax.axis("off")
    lane(ax, 3.3, "from a file to an answer", VISION, READING)
    lane(ax, 0.45, "from a row to a gradient", ASK, TRAINING)
    arrow(ax, (8.2, 1.45), (8.2, 2.62), STATE)
    ax.text(
        8.35, 2.15, "the same blocks, run forward once and again in backward", fontsize=10, color=STATE, va="center"
    )
    ax.text(
        0.2, -0.6, "red: the seams, where another tower, mixer, kernel, order or rank goes in", fontsize=10, color=INK
    )
    ax.text(15.6, -0.6, "file names by prefix, in modeling_video_ma2mba/", fontsize=10, color=QUIET, ha="right")
    figure.tight_layout(pad=0.2)
    figure.savefig(OUT)


if __name__ == "__main__":
    draw()
