"""Functions of the task `caption_score`: videos, what is asked and what is right, and the questions to the judge.

lmms-eval loads this file by its path, so it imports the package by name.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

from video_ma2mba.eval.captions import CAPTIONS_VARIABLE, DIMENSIONS, judge_request, read_captions
from video_ma2mba.world import WorldDataset
from video_ma2mba.world.questions import list_things
from video_ma2mba.world.video_files import write_world


def documents(plan: Any) -> Any:
    """A row for each video: path (or what a video of the rendered world is made of), question, right caption."""
    import datasets

    if named := os.environ.get(CAPTIONS_VARIABLE):
        rows = [{**row, "frames": 0, "index": 0, "seed": 0} for row in read_captions(named)]
        return datasets.Dataset.from_list(rows)
    rows = []
    for part in plan:
        for index in range(part["videos"]):
            listed = list_things(_world(part["frames"], part["videos"], part["seed"]).world(index))
            made = {"frames": part["frames"], "index": index, "seed": part["seed"]}
            rows.append({"video": "", "question": listed.text, "caption": listed.answer, **made})
    return datasets.Dataset.from_list(rows)


def doc_to_visual(doc: dict[str, Any]) -> list[str]:
    """Path of the video; those of the rendered world are made when they are first looked at."""
    if doc["video"]:
        return [doc["video"]]
    folder = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "video_ma2mba_world"
    path = folder / f"captioned_{doc['seed']}_{doc['frames']}_{doc['index']}.mp4"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_world(path, _world(doc["frames"], doc["index"] + 1, doc["seed"]).world(doc["index"]))
    return [str(path)]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """What is asked for."""
    return doc["question"]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """The judge's three scores."""
    return {f"caption_{name}": _ask(judge_request(doc, results[0], name)) for name in DIMENSIONS}


def mean(results: list[float]) -> float:
    """Over all videos."""
    return sum(results) / len(results)


def _ask(messages: list[dict[str, str]]) -> float:
    import requests

    url = os.environ.get("OPENAI_API_URL", "https://api.openai.com/v1/chat/completions")
    headers = {"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', '')}"}
    payload = {"model": os.environ.get("MODEL_VERSION", ""), "messages": messages, "temperature": 0, "max_tokens": 64}
    reply = requests.post(url, headers=headers, json=payload, timeout=60)
    reply.raise_for_status()
    return float(ast.literal_eval(reply.json()["choices"][0]["message"]["content"])["score"])


def _world(frames: int, videos: int, seed: int) -> WorldDataset:
    return WorldDataset("test", videos, frames=(frames, frames), questions=1, seed=seed)
