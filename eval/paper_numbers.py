"""What the paper (arXiv 2411.19460v1, tables 1a, 1b and 2) reports for its three sizes."""

from __future__ import annotations

SIZES = ("0.7B", "1.8B", "3.1B")
JUDGE = "gpt-3.5-turbo-0125"  # that scored the answers of two of the benchmarks

PAPER_NUMBERS: dict[str, dict[str, tuple[float, float, float]]] = {
    "videomme": {
        "short": (37.4, 49.4, 57.6),
        "medium": (35.0, 39.2, 42.7),
        "long": (26.8, 31.9, 35.4),
        "all": (33.1, 40.3, 45.2),
    },
    # The paper's groups are of the test set, whose answers are not public; its "all" of the validation set is.
    "longvideobench_val_v": {
        "8-15 s": (43.3, 48.4, 55.4),
        "15-60 s": (45.4, 49.5, 55.6),
        "180-600 s": (33.3, 39.6, 42.4),
        "900-3600 s": (28.5, 34.1, 38.5),
        "all": (34.0, 38.0, 43.0),
    },
    "mvbench": {"all": (41.1, 44.4, 48.3)},
    "activitynetqa": {"accuracy": (43.8, 50.0, 51.7), "score": (3.2, 3.1, 3.4)},
    "videochatgpt": {"all": (2.69, 2.76, 3.03)},
}
"""Benchmark -> category -> the value for each of `SIZES`."""

FRAMES_ABLATION: dict[str, dict[str, tuple[float]]] = {
    "8 frames": {"short": (53.3,), "medium": (39.3,), "long": (32.2,), "all": (41.6,)},
    "16 frames": {"short": (55.9,), "medium": (41.3,), "long": (33.9,), "all": (43.7,)},
    "32 frames": {"short": (57.9,), "medium": (41.9,), "long": (33.9,), "all": (44.6,)},
}
"""Table 4: the 3.1B model on Video-MME by frames at inference (trained at 1 fps, with stage 1.5)."""


def paper_columns(benchmark: str, frames: str) -> tuple[tuple[str, ...], dict[str, tuple[float, ...]]]:
    """Headings, and values by category, that belong beside a result; `frames` as `Reading.text` has it."""
    if benchmark == "videomme" and frames in FRAMES_ABLATION:
        return (f"paper 3.1B, {frames}",), FRAMES_ABLATION[frames]
    values = PAPER_NUMBERS.get(benchmark, {})
    return tuple(f"paper {size}" for size in SIZES) if values else (), values
