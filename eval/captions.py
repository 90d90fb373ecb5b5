"""Captions of whole videos: which are right, and what a judge is asked about one that a model has written.

The three dimensions, 0 to 5 each, are those of Video-ChatGPT's benchmark that LongVILA scores its captions by.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files.text_files import open_text, parse_json, read_json, text_lines
from ..processing.video_source_names import is_address, local_path

CAPTIONS_VARIABLE = "VIDEO_MA2MBA_CAPTIONS"
"""Environment variable that tells the task `caption_score` the file of `read_captions`."""
REQUEST = "Describe this video in detail, from its beginning to its end."
DIMENSIONS = {
    "correctness": "the factual accuracy: does it say what happens and what is seen, and nothing that is not there?",
    "detail": "the detail orientation: does it cover all that matters, with particulars instead of generalities?",
    "context": "the contextual understanding: does it grasp what the video is about as a whole, and how its parts "
    "belong together?",
}
_ANSWERS = ("caption", "answer", "summary")


def read_captions(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """Rows with a `video` (relative to the file), a right `caption` (or answer, or summary) and, if it is no plain
    description that is wanted, a `question`; of a .jsonl, .json, .csv or .tsv file.

    Returns:
        `video`, `question`, `caption` of each.

    Raises:
        FileNotFoundError: there is no such file, or no such video. ValueError: it is of no such kind; a row lacks
            something.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"--captions {path}: no such file")
    rows = []
    for name, row in _rows(file):
        caption = next((str(row[key]) for key in _ANSWERS if row.get(key)), None)
        if not row.get("video") or caption is None:
            raise ValueError(f"{name}: a row needs a video, and a caption (or answer) that is right about it")
        video = str(row["video"])
        if not is_address(video):
            place = file.parent / local_path(video)
            if not place.exists():
                raise FileNotFoundError(f"{name}: {place}: no such video")
            video = str(place.resolve())
        rows.append({"video": video, "question": str(row.get("question") or REQUEST), "caption": caption})
    if not rows:
        raise ValueError(f"--captions {path} has no rows")
    return rows


def _rows(file: Path) -> list[tuple[str, Mapping[str, Any]]]:
    if file.suffix == ".jsonl":
        found = [(n, parse_json(line)) for n, line in enumerate(text_lines(file), 1) if line.strip()]
    elif file.suffix == ".json":
        whole = read_json(file)
        found = list(enumerate(whole if isinstance(whole, list) else [None], 1))
    elif file.suffix in (".csv", ".tsv"):
        with open_text(file, newline="") as text:
            found = list(enumerate(csv.DictReader(text, delimiter="\t" if file.suffix == ".tsv" else ","), 2))
    else:
        raise ValueError(f"--captions {file}: name a .jsonl, .json, .csv or .tsv file")
    for number, row in found:
        if not isinstance(row, Mapping):
            raise ValueError(f"{file.name}, row {number}: it is no object with a video and a caption")
    return [(f"{file.name}, row {number}", row) for number, row in found]


def judge_request(row: Mapping[str, Any], said: str, dimension: str) -> list[dict[str, str]]:
    """Chat messages that ask a judge for one score of a caption.

    Args:
        row: from `read_captions`. said: what the model wrote. dimension: one of `DIMENSIONS`.
    """
    system = (
        "You judge descriptions of videos. You are given what was asked for, a correct description, and one that a "
        "model has written. Words may differ: what is said counts."
    )
    asked = (
        f"Question: {row['question']}\nCorrect Answer: {row['caption']}\nPredicted Answer: {said.strip()}\n\n"
        f"Score {DIMENSIONS[dimension]} Give an integer from 0 to 5, 5 being the best, as a Python dictionary string "
        "such as {'score': 3}, and nothing else."
    )
    return [{"role": "system", "content": system}, {"role": "user", "content": asked}]
