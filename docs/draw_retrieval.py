"""Draws `docs/images/retrieval_world.png`, how retrieval learns the rendered world, from
`benchmarks/results/retrieval_world.csv`: `python docs/draw_retrieval.py` (needs matplotlib)."""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
TABLE, OUT = ROOT / "benchmarks" / "results" / "retrieval_world.csv", ROOT / "docs" / "images" / "retrieval_world.png"
LOSSES = {"vtc_loss": "contrast", "vtm_loss": "matching", "mlm_loss": "hidden words"}
RECALLS = {"eval_t2v_r1": "videos by texts", "eval_v2t_r1": "texts by videos"}


def draw() -> None:
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), dpi=110)
    for axis, columns in ((left, LOSSES), (right, RECALLS)):
        for name, label in columns.items():
            points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
            axis.plot(*zip(*points, strict=True), label=label)
        axis.axvline(max(int(row["step"]) for row in rows if row["part"] == "1"), color="#cccccc", linewidth=0.8)
        axis.set_xlabel("optimizer steps of 256 pairs")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    left.set_title("losses", loc="left", fontsize=10)
    right.set_title("R@1 among 200 unseen clips, dual encoder", loc="left", fontsize=10)
    right.set_ylim(0, 1)
    right.axhline(0.9, color="#999999", linewidth=0.8, linestyle="--")
    figure.tight_layout()
    figure.savefig(OUT)


if __name__ == "__main__":
    draw()
