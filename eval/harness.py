"""lmms-eval from Python: its tasks are found quickly, its errors arrive, nothing of it depends on the shell."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .benchmarks import folders_of

OWN_TASKS = Path(__file__).parent / "lmms_tasks"


def task_manager(tasks: Sequence[str], include: Sequence[str] = ()) -> Any:
    """lmms-eval's index of tasks. Where all `tasks` are known here, only their folders are looked through, which takes
    a moment instead of the seconds that two thousand task files take.

    Args:
        include: further folders with task files.

    Raises:
        ValueError: no such task.
    """
    import lmms_eval.tasks
    from lmms_eval.tasks import TaskManager

    root = Path(lmms_eval.tasks.__file__).parent
    folders = folders_of(tasks)
    own = [str(OWN_TASKS), *include]
    if folders is None:
        manager = TaskManager(include_path=own, model_name="video_ma2mba")
    else:
        paths = [*own, *(str(root / folder) for folder in folders)]
        manager = TaskManager(include_path=paths, include_defaults=False, model_name="video_ma2mba")
    for task in tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, n=3)
            hint = f"; do you mean {', '.join(near)}?" if near else ""
            raise ValueError(f"--tasks {task}: neither this command nor lmms-eval has such a task{hint}")
    return manager


def load_tasks(tasks: Sequence[str], manager: Any, kind: str = "chat") -> dict[str, Any]:
    """lmms-eval's task objects by name, groups taken apart; loads (or downloads) their data sets.

    Raises:
        ValueError: a data set cannot be loaded.
    """
    from lmms_eval.evaluator_utils import get_task_list
    from lmms_eval.tasks import get_task_dict

    found: dict[str, Any] = {}
    for task in tasks:
        try:
            for output in get_task_list(get_task_dict([task], manager, kind)):
                found[output.task_name] = output.task
        except Exception as error:
            cause = getattr(error, "last_attempt", None)
            cause = cause.exception() if cause is not None else error
            raise ValueError(
                f"the data of task {task} cannot be loaded ({type(cause).__name__}: {cause}): be online, or name the "
                "folder of a local copy with --data"
            ) from error
    return found


def evaluate_tasks(
    model: Any,
    tasks: Sequence[str],
    manager: Any,
    *,
    limit: int | None = None,
    answers_only: bool = False,
    threads: int = 1,
    out: Path | None = None,
) -> dict[str, Any] | None:
    """`simple_evaluate`: what it raises arrives here. None on ranks other than the first.

    Args:
        model: an adapter. answers_only: score nothing. limit: documents of each task.
        threads: that score documents at the same time; one makes random choices of a task repeatable.
        out: folder for what tasks write themselves.
    """
    from lmms_eval.evaluator import simple_evaluate

    told = argparse.Namespace(output_path=None if out is None else str(out), process_with_media=False)
    return simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        predict_only=answers_only,
        log_samples=True,
        bootstrap_iters=0,
        process_docs_parallel=threads,
        cli_args=told,
    )


def quiet_harness(verbose: bool = False) -> None:
    """Warnings and errors of the harness only; its log otherwise covers everything else."""
    import logging
    import sys

    from loguru import logger

    logger.remove()
    logger.add(sys.stderr, level="INFO" if verbose else "WARNING", format="{level}: {message}")
    if not verbose:
        logging.getLogger("datasets").setLevel(logging.ERROR)
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
