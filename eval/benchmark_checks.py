"""Is all there that an evaluation needs? Looked at before hours are spent on it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any


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
