"""Draws `docs/images/rendered_world.png`: `python docs/draw_world.py` (needs matplotlib)."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from video_ma2mba.world import WorldDataset, WorldRenderer
from video_ma2mba.world.questions import ask

OUT = Path(__file__).parent / "images" / "rendered_world.png"
SECONDS, COLUMNS = 24, 8


def draw() -> None:
    world = WorldDataset("test", frames=(SECONDS, SECONDS)).world(20)
    pictures = WorldRenderer(world, 128).frames(list(range(SECONDS)))
    rows = -(-SECONDS // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(11, 1.42 * rows + 2.6), dpi=110)
    for second, ax in enumerate(axes.flat):
        ax.imshow(pictures[second])
        ax.set_title(f"0:{second:02d}", fontsize=10, pad=3, color="#4b5563")
        ax.axis("off")
    questions = ask(world, 7, salt=1)
    for number, question in enumerate(questions):
        y = 0.335 - 0.048 * number
        figure.text(0.03, y, question.text, fontsize=12, color="#222831")
        figure.text(0.97, y, question.answer, fontsize=12, color="#2f6f9f", ha="right", weight="bold")
    figure.subplots_adjust(left=0.02, right=0.98, top=0.95, bottom=0.39, wspace=0.06, hspace=0.16)
    figure.savefig(OUT)


if __name__ == "__main__":
    draw()
