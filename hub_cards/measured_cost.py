"""What reading and training cost with a model of a checkpoint's size, from the benchmarks' tables; nothing else.

A table's rows belong to a card when they were measured on a model of the same sizes: one of the paper's sizes
(`compose.PRESETS`, with CLIP ViT-L/14 at 336 pixels) or that of the bundled checkpoint.
"""

from __future__ import annotations

import csv
import datetime
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"  # of the repository; a wheel has none
_FRAME_TOKENS = 144
_SHORTEST = 16_384  # tokens; shorter steps in the table only warmed up


def measured_cost(config: Any, results: Path = RESULTS) -> str | None:
    """Markdown about the longest videos measured, memory and speed; None where nothing was measured at this size.

    Args:
        config: of the checkpoint.
        results: folder with `whole_model_step.csv`, `ma_gc.csv`, `read_overlap.csv` and `long_video_memory.csv`, or
            some of them.
    """
    name = size_name(config)
    if name is None:
        return None
    reading = _readings(results) if name == "bundled" else _reading_on_gpu(results, name)
    blocks = [reading, _whole_steps(results, name), _language_steps(results, name)]
    blocks = [block for block in blocks if block]
    if not blocks:
        return None
    whose = (
        "the checkpoint that ships with `video-ma2mba`"
        if name == "bundled"
        else f"a model of this size ({name}, random weights: the cost does not depend on their values)"
    )
    return "\n\n".join([f"Measured with {whose}.", *blocks])


def _readings(results: Path) -> str:
    rows = _rows(results / "long_video_memory.csv")
    if not rows:
        return ""
    longest = max(rows, key=lambda row: int(row["frames"]))
    lines = [
        f"Longest video read: **{_length(longest['frames'])}** on {longest['hardware']} ({longest['date']}).\n",
        "| frames | read in | then an answer in | peak memory of the process |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {int(row['frames']):,} | {row['read_seconds']} s | {row['answer_seconds']} s | {row['peak_rss_mb']} MB |"
        for row in rows
    ]
    return "\n".join(lines)


def _reading_on_gpu(results: Path, name: str) -> str:
    rows = [
        row for row in _rows(results / "read_overlap.csv") if f"+ {name}," in row["model"] and row["GPU peak (GB)"]
    ]
    if not rows:
        return ""
    longest = max(rows, key=lambda row: (int(row["frames"]), -float(row["file to first answer (s)"])))
    return (
        f"Longest video read: **{_length(longest['frames'])}** ({longest['video']}) on one {longest['hardware']} "
        f"({longest['date']}): from the file to the first answer {longest['file to first answer (s)']} s, within "
        f"{longest['GPU peak (GB)']} GB of GPU memory."
    )


def _whole_steps(results: Path, name: str) -> str:
    rows = [row for row in _rows(results / "whole_model_step.csv") if row["model"] == name]
    if not rows:
        return ""
    longest = max(rows, key=lambda row: int(row["frames"]))
    cost = f"{longest['seconds']} s, {longest['gpu_peak_gb']} GB of GPU memory and {longest['host_checkpoints_gb']} GB"
    return (
        f"Longest video trained on, all parts trainable: **{_length(longest['frames'])}** on one "
        f"{longest['hardware']} ({longest['date']}): one step in {cost} of host memory ({longest['plan']})."
    )


def _language_steps(results: Path, name: str) -> str:
    rows = _best_steps([row for row in _rows(results / "ma_gc.csv") if row["model"] == name])
    if not rows:
        return ""
    longest, tokens = rows[-1], int(rows[-1]["tokens"])
    where = "; ".join(sorted({f"{row['hardware']}, {row['date']}" for row in rows}))
    lines = [
        f"Longest video that the language model alone was trained on: **{_length(tokens // _FRAME_TOKENS)}** "
        f"({tokens:,} tokens) on one {longest['hardware']} ({longest['date']}).\n",
        "Training step of the language model alone, bf16, forward and backward: at each length the fastest and the "
        f"leanest measured. GPU memory above weights and gradients; {where}.\n",
        "| tokens (frames) | plan | tokens/s | GPU | host |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {int(row['tokens']):,} ({int(row['tokens']) // _FRAME_TOKENS:,}) | {_plan(row)} "
        f"| {int(row['tokens_per_s']):,} | {row['gpu_peak_gb']} GB | {row['host_gb'] or 0} GB |"
        for row in rows
    ]
    return "\n".join(lines)


def _best_steps(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """At each length, the step with the highest speed and that with the lowest GPU memory, short steps left out."""
    by_length: dict[int, list[dict[str, str]]] = {}
    for row in rows:
        timed = row["gpu_peak_gb"] and row["tokens_per_s"].isdecimal() and "first step" not in row["method"]
        if timed and int(row["tokens"]) >= _SHORTEST:
            by_length.setdefault(int(row["tokens"]), []).append(row)
    best = []
    for _, measured in sorted(by_length.items()):
        fastest = max(measured, key=lambda row: int(row["tokens_per_s"]))
        leanest = min(measured, key=lambda row: float(row["gpu_peak_gb"]))
        best += [fastest] if fastest is leanest else [fastest, leanest]
    return best


def size_name(config: Any) -> str | None:
    """The name under which the benchmarks know a model of these sizes; None for a size that none measured."""
    from ..conversion.compose import PRESETS

    sizes = _sizes(config)
    for name, (width, layers) in PRESETS.items():
        if sizes == (width, layers, 128, "clip_vision_model", 1024, 24, 336, 14, _FRAME_TOKENS):
            return name
    return "bundled" if sizes == _sizes_of_bundled() else None


def _sizes(config: Any) -> tuple:
    text, vision = config.text_config, config.vision_config
    return (
        *(text.hidden_size, text.num_hidden_layers, text.state_size),
        *(vision.model_type, vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.patch_size),
        config.tokens_per_frame,
    )


def _sizes_of_bundled() -> tuple | None:
    from .. import BUNDLED_CHECKPOINT
    from ..modeling_video_ma2mba.configuration_video_ma2mba import VideoMa2mbaConfig

    present = (BUNDLED_CHECKPOINT / "config.json").is_file()
    return _sizes(VideoMa2mbaConfig.from_pretrained(BUNDLED_CHECKPOINT)) if present else None


def _rows(table: Path) -> list[dict[str, str]]:
    if not table.is_file():
        return []
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _length(frames: str | int) -> str:
    return f"{int(frames):,} frames, {datetime.timedelta(seconds=int(frames))} at one frame a second"


def _plan(row: dict[str, str]) -> str:
    """`l=2 s=16384 host` in words."""
    found = re.fullmatch(r"l=(\d+) s=(\d+) (\w+)", row["plan"])
    if found is None:
        return {"off": "no checkpointing"}.get(row["method"], row["method"])
    layers, tokens, where = int(found[1]), int(found[2]), {"host": "in host memory", "gpu": "on the GPU"}[found[3]]
    return f"{layers} layer{'s' if layers > 1 else ''} × {tokens:,} tokens a cell, checkpoints {where}"
