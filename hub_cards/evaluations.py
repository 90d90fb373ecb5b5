"""Evaluations that a card shows: tables of `world/accuracy.py`, and folders written by `video-ma2mba eval`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .accuracy_table import accuracy_command, accuracy_markdown, evaluation_metadata, read_accuracy

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        markdown: tables, with the exact command.
        entries: for the card's `model-index`.
        files: that go along with the checkpoint, by their names there.
    """

    markdown: str
    entries: tuple[EvalResult, ...]
    files: dict[str, Path]


def read_evaluation(path: Path, measured_on: str | None = None) -> Evaluation:
    """Read a CSV of `world/accuracy.py`, or the folder of an evaluation.

    Args:
        measured_on: hardware, data type and date of a CSV's measurement; a folder says it itself.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is another one.
    """
    return _benchmark_report(path) if path.is_dir() else _world_accuracy(path, measured_on)


def _world_accuracy(path: Path, measured_on: str | None) -> Evaluation:
    rows = read_accuracy(path)
    where = f", measured on {measured_on}" if measured_on else ""
    text = (
        "Accuracy on unseen videos of the rendered world, open and multiple-choice questions "
        f"together{where}. In brackets: chance; number of questions.\n\n{accuracy_markdown(rows)}\n\n"
        "With `video-ma2mba` installed, in a copy of this repository:\n\n"
        f"```bash\n{accuracy_command(rows)}\n```"
    )
    return Evaluation(text, tuple(evaluation_metadata(rows)), {"world_accuracy.csv": path})


def _benchmark_report(folder: Path) -> Evaluation:
    from huggingface_hub.repocard_data import model_index_to_eval_results
    from yaml import safe_load

    files = {name: folder / name for name in ("report.md", "report.json", "model_index.yaml")}
    if missing := [name for name, path in files.items() if not path.is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}: name a folder written by video-ma2mba eval")
    index = (safe_load(files.pop("model_index.yaml").read_text(encoding="utf-8")) or {}).get("model-index")
    if not index:
        raise ValueError(f"{folder} holds no scores: score the answers with a judge first")
    _, entries = model_index_to_eval_results(index)
    text = files["report.md"].read_text(encoding="utf-8")
    body = "\n".join(line for line in text.splitlines() if not re.match(r"# |!\[", line))  # the card has its own title
    return Evaluation(re.sub(r"^## ", "### ", body, flags=re.M).strip(), tuple(entries), files)
