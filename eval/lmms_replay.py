"""Recorded answers instead of a model: scored again, or judged later, by the harness's own tasks.

python -m lmms_eval --model video_ma2mba_replay --model_args answers=answers.jsonl --tasks …
"""

from __future__ import annotations

from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.model import lmms

from .answer_log import files_of, read_rows
from .lmms_requests import job_of


class ReplaySimple(lmms):
    """Gives the answers of one or more files (or a folder of them): rows with "task", "doc_id" and "answer".

    Raises:
        FileNotFoundError: no such file. ValueError: two rows answer one question differently.
    """

    is_simple = True

    def __init__(self, answers: str, batch_size: Any = 1, device: Any = None, max_batch_size: Any = None) -> None:
        super().__init__()
        self.device = torch.device("cpu")
        files = files_of(Path(answers).expanduser())
        if not files:
            raise FileNotFoundError(f"answers={answers}: there is no file of answers")
        self.known: dict[tuple[str, int, int], str] = {}
        failed: dict[tuple[str, int, int], str] = {}
        for file in files:
            for row in read_rows(file):
                place = (row["task"], int(row["doc_id"]), row.get("round", 0))
                if "error" in row:
                    failed.setdefault(place, row["answer"])
                    continue
                if self.known.setdefault(place, row["answer"]) != row["answer"]:
                    raise ValueError(f"{file} holds a second answer to {place[0]}, document {place[1]}")
        self.known = failed | self.known

    def generate_until(self, requests: list[Any]) -> list[str]:
        """ValueError for questions that have no recorded answer."""
        return [rounds[0] for rounds in self._rounds(requests)]

    def generate_until_multi_round(self, requests: list[Any]) -> list[list[str]]:
        """As many rounds as were recorded. ValueError for questions that have no recorded answer."""
        return self._rounds(requests)

    def _rounds(self, requests: list[Any]) -> list[list[str]]:
        jobs = [job_of(request) for request in requests]
        missing = [job for job in jobs if (job.task, job.doc_id, 0) not in self.known]
        if missing:
            raise ValueError(
                f"{len(missing)} questions have no recorded answer, the first is {missing[0].task}, "
                f"document {missing[0].doc_id}"
            )
        found = []
        for job in jobs:
            rounds = takewhile(lambda n, job=job: (job.task, job.doc_id, n) in self.known, count())
            found.append([self.known[job.task, job.doc_id, n] for n in rounds])
        return found

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("recorded answers hold no likelihoods")


class ReplayChat(ReplaySimple):
    """Recorded answers for tasks of the chat interface."""

    is_simple = False
