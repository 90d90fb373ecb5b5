"""lmms-eval from Python: its tasks are found quickly, its errors arrive, nothing of it depends on the shell."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from .benchmarks import BENCHMARKS, folders_of

OWN_TASKS = Path(__file__).parent / "lmms_tasks"
_NAMES = re.compile(r"^(?:task|group|tag): *[\"']?([\w.-]+)", re.M)


def check_tasks(tasks: Sequence[str], include: Sequence[str] = ()) -> None:
    """Refuse a mistyped name, one that is no word of any task file, before seconds go into importing the harness.

    Args:
        include: further folders with task files.

    Raises:
        ValueError: no such task.
    """
    unknown = {task: re.compile(rf"(?<![\w-]){re.escape(task)}(?![\w-])") for task in tasks if task not in BENCHMARKS}
    if not unknown:
        return
    found = importlib.util.find_spec("lmms_eval")
    folders = [
        OWN_TASKS,
        *include,
        *(Path(path, "tasks") for path in (found and found.submodule_search_locations) or ()),
    ]
    names: set[str] = set(BENCHMARKS)
    for file in (file for folder in folders for file in Path(folder).rglob("*.yaml")):
        text = file.read_text(encoding="utf-8", errors="replace")
        names.update(_NAMES.findall(text))
        for task in [task for task, word in unknown.items() if word.search(text)]:
            del unknown[task]
        if not unknown:
            return
    raise ValueError(_no_task(next(iter(unknown)), names))


def _no_task(task: str, names: Collection[str]) -> str:
    near = difflib.get_close_matches(task, names, n=3)
    hint = f"; do you mean {', '.join(near)}?" if near else ""
    return f"--tasks {task}: neither this command nor lmms-eval has such a task{hint}"


def task_manager(tasks: Sequence[str], include: Sequence[str] = ()) -> Any:
    """lmms-eval's index of tasks. Where only those that are known here and those of `include` are wanted, only their
    folders are looked through, which takes a moment instead of the seconds that two thousand task files take.

    Args:
        include: further folders with task files.

    Raises:
        ValueError: no such task.
    """
    import lmms_eval.tasks
    from lmms_eval.tasks import TaskManager

    root = Path(lmms_eval.tasks.__file__).parent
    paths = [str(OWN_TASKS), *include, *(str(root / folder) for folder in folders_of(tasks))]
    manager = TaskManager(include_path=paths, include_defaults=False, model_name="video_ma2mba")
    if any(task not in manager.all_tasks for task in tasks):
        manager = TaskManager(include_path=[str(OWN_TASKS), *include], model_name="video_ma2mba")
    for task in tasks:
        if task not in manager.all_tasks:
            raise ValueError(_no_task(task, manager.all_tasks))
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


class _Answered(BaseException):
    """All is answered. The harness has no mode that ends there: to predict only, it scores with another metric, and
    fails at tasks of several rounds. It calls `clean()` of the model between answering and scoring."""


def _raise_answered() -> None:
    raise _Answered


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
    """`simple_evaluate`: what it raises arrives here. None on ranks other than the first, and without scores.

    Args:
        model: an adapter. answers_only: score nothing. limit: documents of each task.
        threads: that score documents at the same time; one makes random choices of a task repeatable.
        out: folder for what tasks write themselves.
    """
    from lmms_eval.evaluator import simple_evaluate

    if answers_only:
        model.clean = _raise_answered
    told = argparse.Namespace(output_path=None if out is None else str(out), process_with_media=False)
    try:
        return simple_evaluate(
            model=model,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            log_samples=True,
            bootstrap_iters=0,
            process_docs_parallel=threads,
            cli_args=told,
        )
    except _Answered:
        del model.clean
        model.clean()
        return None
    except SystemExit as error:  # how tasks end a run when a video is missing
        raise FileNotFoundError(str(error)) from error
    except Exception as error:
        attempt = getattr(error, "last_attempt", None)  # tenacity hides what happened
        if attempt is None:
            raise
        raise RuntimeError(f"lmms-eval fails to score {', '.join(tasks)}: {attempt.exception()!r}") from error


def prepare_environment(data: Path | None = None) -> None:
    """What the harness's tasks take from the environment when they are imported; call it before that.

    Args:
        data: folder with local copies: data sets under their Hub ids, videos in `hf_home`. It becomes the current one,
            as `datasets` looks there.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if data is not None:
        if not data.is_dir():
            raise FileNotFoundError(f"--data {data} is no folder")
        os.chdir(data)
        os.environ["HF_HOME"] = str(data.resolve() / "hf_home")
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    os.environ["HF_HOME"] = str(Path(home).expanduser().resolve())  # some tasks fail without it, some if relative
    os.environ["API_TYPE"] = "openai"  # else judged tasks cannot even be imported


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
