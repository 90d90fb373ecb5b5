"""Functions of the task `rendered_world`: questions from seeds, videos rendered when they are first looked at.

lmms-eval loads this file by its path, so it imports the package by name.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from video_ma2mba.eval.needle_scoring import normalised
from video_ma2mba.world import WorldDataset
from video_ma2mba.world.video_files import write_world


def questions(plan: Any) -> Any:
    """All questions about all videos that `plan` (rows with frames, videos, questions, seed) lists."""
    import datasets

    rows = []
    for part in plan:
        data = _world(part["frames"], part["videos"], part["questions"], part["seed"])
        for index in range(part["videos"]):
            for question in data.asked(index)[1]:
                rows.append(
                    {
                        "frames": part["frames"],
                        "index": index,
                        "seed": part["seed"],
                        "kind": question.kind,
                        "form": question.form,
                        "question": question.text,
                        "answer": question.answer,
                        "choices": question.choices,
                    }
                )
    return datasets.Dataset.from_list(rows)


def doc_to_visual(doc: dict[str, Any]) -> list[str]:
    """Path of the video, 64 x 64 pixels, one frame a second."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    folder = home / "video_ma2mba_world"
    path = folder / f"test_{doc['seed']}_{doc['frames']}_{doc['index']}.mp4"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        world = _world(doc["frames"], doc["index"] + 1, 1, doc["seed"]).world(doc["index"])
        write_world(path, world)
    return [str(path)]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """The question as the checkpoint's training has it, lettered options included."""
    return doc["question"]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """Exact match, but for case and a full stop."""
    right = normalised(results[0]) == normalised(doc["answer"])
    facts = {name: doc[name] for name in ("frames", "kind", "form")}
    return {"world_accuracy": {**facts, "right": right, "chance": 1 / doc["choices"]}}


def accuracy(results: list[dict[str, Any]]) -> float:
    """In percent."""
    return 100 * sum(result["right"] for result in results) / len(results)


def _world(frames: int, videos: int, count: int, seed: int) -> WorldDataset:
    return WorldDataset("test", videos, frames=(frames, frames), questions=count, seed=seed)
