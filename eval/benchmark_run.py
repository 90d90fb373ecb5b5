"""An evaluation in two steps: every question is answered, then the harness's own tasks score the answers.

Answers are written as they come, and scoring reads them from there, so neither a crash nor a judge that fails costs
any; what is known already is not done again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files.text_files import json_line
from ..modeling_video_ma2mba.parallel_dims import ParallelDims, process_group_exists
from ..modeling_video_ma2mba.state_writing import write_whole
from .answer_log import files_of, read_rows
from .benchmark_scores import Scores, score
from .benchmarks import BENCHMARKS
from .harness import evaluate_tasks, load_tasks, task_manager
from .judge import Judge
from .needle_search import write_json

ANSWERS = "answers.jsonl"
_JUDGING_THREADS = 8


@dataclass
class Evaluation:
    """What is evaluated, and where results go.

    Args:
        tasks: names of benchmarks, or of any of lmms-eval's tasks.
        out: folder. limit: so many documents of each task.
        judge: for the benchmarks that need one; without, their answers are only collected.
        include: further folders with task files.
    """

    tasks: Sequence[str]
    out: Path
    limit: int | None = None
    judge: Judge | None = None
    include: Sequence[str] = ()
    manager: Any = field(init=False, default=None)
    loaded: dict[str, dict[str, Any]] = field(init=False, default_factory=dict)
    scores: dict[str, Scores] = field(init=False, default_factory=dict)  # of the benchmarks that are scored so far

    @property
    def judged_tasks(self) -> list[str]:
        """Benchmarks among `tasks` that a judge scores."""
        return [task for task in self.tasks if task in BENCHMARKS and BENCHMARKS[task].judge]

    def prepare(self) -> dict[str, int]:
        """Look at tasks, data and judge; returns the number of questions of each task.

        Raises:
            ValueError: an unknown task, data that are missing. ConnectionError: the judge gives no usable reply.
        """
        self.manager = task_manager(self.tasks, self.include)
        if self.judge is not None and self.judged_tasks and ParallelDims.of_run().first:
            self.judge.check()
        counts: dict[str, int] = {}
        for name in self.tasks:
            self.loaded[name] = load_tasks([name], self.manager)
            counts |= check_data(self.loaded[name], self.limit)
        return counts


def claim_folder(out: Path, settings: Mapping[str, Any]) -> None:
    """Make a folder that of one model and one way of reading videos, or see that it is.

    Raises:
        ValueError: it holds answers of another; what differs is named.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "settings.json"
    if not path.exists():
        if (out / ANSWERS).exists():
            raise ValueError(f"--out {out} holds answers, but no settings.json says whose: choose another folder")
        write_json(path, dict(settings))
        return
    kept = json.loads(path.read_text(encoding="utf-8"))
    for name in {**settings, **kept}:
        if kept.get(name) != settings.get(name):
            raise ValueError(
                f"--out {out} holds answers of another evaluation: its {name} is {kept.get(name)!s:.80}, now it is "
                f"{settings.get(name)!s:.80}; choose another folder"
            )


def collect_answers(evaluation: Evaluation, model: Any) -> None:
    """Have `model` (an adapter that writes to `out / ANSWERS`) answer everything that has no answer yet."""
    evaluate_tasks(model, evaluation.tasks, evaluation.manager, limit=evaluation.limit, answers_only=True)


def leave_ranks() -> bool:
    """End the work with other ranks; whether this process goes on alone, which is the first one."""
    import torch.distributed as dist

    first = ParallelDims.of_run().first
    if process_group_exists():
        from accelerate.state import AcceleratorState

        dist.barrier()
        dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK"):
        os.environ.pop(name, None)
    return first


def score_answers(
    evaluation: Evaluation, answers: Path, on_scores: Callable[[str, Scores | None], None] | None = None
) -> None:
    """Let the harness score recorded answers (a file, or a folder of files), benchmark by benchmark, into
    `evaluation.scores` and files; what a judge would have to score is left out without one.

    Raises:
        ConnectionError: the judge failed; the scores of the benchmarks before are kept.
    """
    from .lmms_replay import ReplayChat

    for name in evaluation.tasks:
        judged = name in evaluation.judged_tasks
        if judged and evaluation.judge is None:
            if on_scores is not None:
                on_scores(name, None)
            continue
        model = ReplayChat(str(answers))
        told = {"limit": evaluation.limit, "out": evaluation.out / "harness"}
        if judged:
            with evaluation.judge.intercept():
                results = evaluate_tasks(model, [name], evaluation.manager, threads=_JUDGING_THREADS, **told)
        else:
            results = evaluate_tasks(model, [name], evaluation.manager, **told)
        if not results or not results.get("samples"):
            raise RuntimeError(f"lmms-eval returned no samples of {name}: its own messages above say why")
        scores = evaluation.scores[name] = score(name, results["samples"], results["results"])
        _write_results(evaluation.out, name, results, scores)
        if on_scores is not None:
            on_scores(name, scores)


def _write_results(out: Path, name: str, results: dict[str, Any], scores: Scores) -> None:
    for folder in ("scores", "samples"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for task, rows in results["samples"].items():
        lines = [json_line({**row, "arguments": None}, default=str) for row in rows]
        write_whole(out / "samples" / f"{task}.jsonl", b"".join(lines))
    write_json(out / "scores" / f"{name}.json", scores.as_dict())


def reading_facts(answers: Path, tasks: Sequence[str]) -> dict[str, Any]:
    """Videos, frames and seconds behind the recorded answers of some tasks."""
    rows = [row for file in files_of(answers) for row in read_rows(file) if row["task"] in tasks]
    media = {(tuple(row.get("media", ())), row.get("frames")): row for row in rows if row.get("frames")}
    frames = [row["frames"] for row in media.values()]
    if not frames:
        return {"questions": len(rows)}
    reading = sum(row["read_seconds"] for row in media.values())
    answering = sum(row["answer_seconds"] for row in rows)
    return {
        "questions": len(rows),
        "videos": len(media),
        "frames_per_video": {"mean": sum(frames) / len(frames), "least": min(frames), "most": max(frames)},
        "seconds_per_video": (reading + answering) / len(media),
        "reading_seconds_per_video": reading / len(media),
        "answering_seconds_per_question": answering / len(rows),
        "unreadable": sum("error" in row for row in rows),
    }


def today() -> str:
    """Local date as YYYY-MM-DD, as reports write it."""
    return time.strftime("%Y-%m-%d")


def check_data(tasks: Mapping[str, Any], limit: int | None = None) -> dict[str, int]:
    """See that the media of all documents exist; returns the number of documents of each task.

    A task that decodes its videos itself is asked for its first document only.

    Raises:
        ValueError: media are missing; tasks, numbers and first files are named.
    """
    counts, complaints = {}, []
    for name, task in tasks.items():
        docs = task.eval_docs
        total = len(docs) if limit is None else min(limit, len(docs))
        missing: list[str] = []
        for number in range(total if task.config.doc_to_visual is not None else 0):
            found = _missing(task, docs[number])
            if found is None:
                break
            missing += found
        if missing:
            complaints.append(f"{name} lacks {len(missing)} media, the first is {missing[0]}")
        counts[name] = total
    if complaints:
        raise ValueError("; ".join(complaints) + ": download them, or name the folder of a local copy with --data")
    return counts


def _missing(task: Any, doc: Any) -> list[str] | None:
    """What a document's media lack; None where they are pictures in memory."""
    try:
        visuals = task.doc_to_visual(doc) or []
    except (SystemExit, AssertionError, OSError) as error:
        return [str(error).removeprefix("video path:").split(" does not exist")[0] or "a file that its task looks for"]
    paths = [visual for visual in visuals if isinstance(visual, str)]
    if visuals and not paths:
        return None
    return [path for path in paths if "://" not in path and not os.path.exists(path)]
