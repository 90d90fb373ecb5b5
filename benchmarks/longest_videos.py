"""Predicted longest videos for common GPUs: `python benchmarks/longest_videos.py` (no GPU needed).

One video per step, bf16, 1 FPS, AdamW with moments in bf16, 128 GB of host memory. Writes results/longest_videos.csv
and .md, and the table in docs/ma_gc.md. Predictions of the planner, not measurements.
"""

from pathlib import Path

from planner_accuracy import update_page
from result_tables import write_rows

import video_ma2mba
from video_ma2mba.cli.plan import resolve_config

RESULTS = Path(__file__).parent / "results"
CARDS = ("24GB", "40GB", "80GB")
TRAIN = {"everything": ("lm", "projector", "vision"), "projector only": ("projector",)}
FIELDS = ["model", "trains", "gpu", "longest_frames", "longest_video", "plan_for_one_hour", "gpu_gb_for_one_hour",
          "host_gb_for_one_hour"]  # fmt: skip


def row(preset: str, trains: str, card: str) -> dict[str, object]:
    """What one card can do with one model."""
    line: dict[str, object] = {"model": preset, "trains": trains, "gpu": card}
    config, options = resolve_config(None, preset), {"gpu_memory": card, "train": TRAIN[trains]}
    try:
        report = video_ma2mba.plan(config, frames=3600, **options)
    except ValueError:
        try:
            report = video_ma2mba.plan(config, frames=1, **options)
        except ValueError:
            return line | {"longest_video": "weights do not fit", "plan_for_one_hour": "-"}
        return line | {
            "longest_frames": report.longest_frames,
            "longest_video": report.longest_video,
            "plan_for_one_hour": "does not fit",
        }
    prediction = report.prediction
    return line | {
        "longest_frames": report.longest_frames,
        "longest_video": report.longest_video,
        "plan_for_one_hour": str(prediction.plan or "off"),
        "gpu_gb_for_one_hour": round(prediction.gpu_peak / 1e9, 1),
        "host_gb_for_one_hour": round(prediction.host_peak / 1e9, 1),
    }


def main() -> None:
    lines = [row(preset, trains, card) for preset in ("370m", "1.3b", "2.7b") for trains in TRAIN for card in CARDS]
    write_rows(RESULTS / "longest_videos.csv", lines, FIELDS)
    text = ["| model | trains | GPU | longest video (predicted) | one hour of video: plan | GPU | host |"]
    text.append("| --- | --- | --- | --- | --- | --- | --- |")
    for line in lines:
        frames = f" ({line['longest_frames']:,} frames)" if line.get("longest_frames") else ""
        taken = [f"{line[name]} GB" if name in line else "-" for name in FIELDS[-2:]]
        text.append(
            f"| {line['model']} | {line['trains']} | {line['gpu']} | {line['longest_video']}{frames} | "
            f"{line['plan_for_one_hour']} | {' | '.join(taken)} |"
        )
    (RESULTS / "longest_videos.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    update_page("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
