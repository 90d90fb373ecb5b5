"""Videos to try: a folder as `video-ma2mba world render` writes it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path


@dataclass(frozen=True)
class Example:
    """A video and questions that fit it."""

    label: str
    video: str
    questions: tuple[str, ...]


def load_examples(folder: Path) -> list[Example]:
    """Open questions of `questions.jsonl`, at most five a video; nothing where there is no such file."""
    file = folder / "questions.jsonl"
    if not file.is_file():
        return []
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    found = []
    for number, (video, asked) in enumerate(groupby(lines, key=lambda line: line["video"]), 1):
        asked = list(asked)
        questions = [line["question"] for line in asked if not line.get("options")] or [asked[0]["question"]]
        length = f" ({asked[0]['frames']} s)" if "frames" in asked[0] else ""
        label = f"Video {number}{length}"
        found.append(Example(label, str(folder / video), tuple(questions[:5])))
    return found
