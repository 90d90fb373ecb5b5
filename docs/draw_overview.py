"""Draws `docs/images/overview.png`, the picture in the README: `python docs/draw_overview.py` (needs matplotlib)."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import itertools

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from video_ma2mba.world import WorldDataset, WorldRenderer

OUT = Path(__file__).parent / "images" / "overview.png"
INK, QUIET, VISION, STATE, ASK = "#222831", "#6b7280", "#4c78a8", "#e07a3f", "#54a24b"
FRAME_X = (0.5, 2.0, 3.5, 6.2)  # left edges of the four frames that are drawn; the gap stands for hours
WIDTH = 1.2


def box(ax: Axes, x: float, y: float, width: float, height: float, colour: str, text: str, size: float = 9) -> None:
    """A rounded box with white text; (x, y) is its lower left corner."""
    style = "round,pad=0.02,rounding_size=0.08"
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=colour, edgecolor="none"))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", color="white", fontsize=size)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    ax.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=11, linewidth=1.3, color=colour, shrinkA=1, shrinkB=1
        )
    )


def draw() -> None:
    world = WorldDataset("test", frames=(16, 16)).world(13)
    pictures = WorldRenderer(world, 128).frames([3, 7, 9, 14])

    figure, ax = plt.subplots(figsize=(11.4, 4.4), dpi=110)
    ax.set(xlim=(0, 12.6), ylim=(-0.15, 4.75))
    ax.set_aspect("equal")
    ax.axis("off")
    for x, picture, stamp in zip(FRAME_X, pictures, ("0:00:03", "0:00:07", "0:00:09", "hours later"), strict=True):
        middle = x + WIDTH / 2
        ax.imshow(picture, extent=(x, x + WIDTH, 3.2, 3.2 + WIDTH), interpolation="bilinear", zorder=2)
        ax.text(middle, 4.48, stamp, ha="center", va="bottom", fontsize=8.5, color=QUIET)
        arrow(ax, (middle, 3.2), (middle, 2.82))
        box(ax, x, 2.4, WIDTH, 0.4, VISION, "CLIP tower", 8.5)
        arrow(ax, (middle, 2.4), (middle, 2.12))
        box(ax, x, 1.7, WIDTH, 0.4, VISION, "pool 2×2, project", 7.5)
        arrow(ax, (middle, 1.7), (middle, 1.37))
        box(ax, x, 0.65, WIDTH, 0.7, STATE, "Mamba-2\nstate", 9)
    for left, right in itertools.pairwise(FRAME_X):
        arrow(ax, (left + WIDTH, 1.0), (right, 1.0), STATE)
    for y in (3.8, 2.25):
        ax.text(5.45, y, "…", ha="center", va="center", fontsize=22, color=QUIET)
    ax.text(4.2, 0.25, "one state, the same size after a second or after a day of video", ha="center", va="center",
            fontsize=9, color=STATE)  # fmt: skip

    asked = (
        ("What stood on the card?", world.card.symbol.lower()),
        ("Which shape is purple?", next(thing.shape for thing in world.things if thing.colour == "purple")),
        ("How many red objects appear?", str(sum(thing.colour == "red" for thing in world.things))),
    )
    for row, (question, answer) in enumerate(asked):
        y = 3.0 - 1.25 * row
        arrow(ax, (FRAME_X[-1] + WIDTH, 1.0), (8.6, y + 0.3), ASK)
        box(ax, 8.65, y, 2.5, 0.6, ASK, question, 9)
        arrow(ax, (11.17, y + 0.3), (11.5, y + 0.3), ASK)
        ax.text(11.55, y + 0.3, answer, ha="left", va="center", fontsize=10, color=INK)
    ax.text(9.9, 4.2, "read once, fork the state,\nask as often as you like", ha="center", va="center", fontsize=9,
            color=ASK)  # fmt: skip
    figure.tight_layout(pad=0.2)
    figure.savefig(OUT)


if __name__ == "__main__":
    draw()
