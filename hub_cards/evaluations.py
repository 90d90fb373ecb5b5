"""Evaluations that a card shows: tables of `world/accuracy.py`, and folders written by `video-ma2mba eval`."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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


_FIELDS = {"frames", "kind", "form", "questions", "right", "accuracy", "chance"}
_DATASET = ("video-ma2mba-world", "the rendered world of video-ma2mba, test split")
_TASK = ("video-text-to-text", "Video question answering")


def read_accuracy(path: Path) -> list[dict[str, str]]:
    """Rows over both forms of question (open and multiple choice) of a table of measured accuracies.

    Raises:
        FileNotFoundError: no such file. ValueError: it is another table, or a number in it contradicts the counts.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: write it with python -m video_ma2mba.world.accuracy")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := sorted(_FIELDS - set(reader.fieldnames or ())):
            raise ValueError(f"{path} is no table of video_ma2mba.world.accuracy: it lacks {missing}")
        rows = [row for row in reader if row["form"] == "all"]
    for row in rows:
        try:
            measured = int(row["right"]) / int(row["questions"])
            agrees = abs(measured - float(row["accuracy"])) < 1e-3 and 0 <= float(row["chance"]) <= 1
        except (ValueError, ZeroDivisionError):
            agrees = False
        if not agrees:
            raise ValueError(f"{path}: {row['frames']} frames, {row['kind']}: accuracy is not right / questions")
    if not rows:
        raise ValueError(f"{path} has no row whose form is 'all'")
    return rows


def accuracy_markdown(rows: list[dict[str, str]]) -> str:
    """One row per kind of question, one column per length; chance and number of questions beside every number."""
    lengths = list(dict.fromkeys(row["frames"] for row in rows))
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    cells = {
        (
            row["kind"],
            row["frames"],
        ): f"{_percent(row['accuracy'])} ({_percent(row['chance'])}; {int(row['questions']):,})"
        for row in rows
    }
    lines = [
        "| kind | " + " | ".join(f"{length.replace('..', ' to ')} frames" for length in lengths) + " |",
        "| --- " * (len(lengths) + 1) + "|",
    ]
    lines += [
        f"| {kind} | " + " | ".join(cells.get((kind, length), "") for length in lengths) + " |" for kind in kinds
    ]
    return "\n".join(lines)


def accuracy_command(rows: list[dict[str, str]]) -> str:
    """The command that measures the same lengths, to be run in a copy of the checkpoint."""
    lengths = " ".join(dict.fromkeys(row["frames"] for row in rows))
    return f"python -m video_ma2mba.world.accuracy --model . --frames {lengths} --out accuracy.csv"


def evaluation_metadata(rows: list[dict[str, str]]) -> list[EvalResult]:
    """Entries of the card's `model-index`: accuracy over all kinds, one per length."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=_TASK[0],
            task_name=_TASK[1],
            dataset_type=_DATASET[0],
            dataset_name=f"{_DATASET[1]}, {row['frames']} frames",
            dataset_config=f"frames-{row['frames'].replace('..', '-')}",
            metric_type="accuracy",
            metric_name=f"accuracy over {row['questions']} questions (chance {float(row['chance'])})",
            metric_value=float(row["accuracy"]),
        )
        for row in rows
        if row["kind"] == "all"
    ]


def _percent(share: str) -> str:
    return f"{100 * float(share):.1f} %"
