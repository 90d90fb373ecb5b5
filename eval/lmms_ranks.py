"""Who answers what: requests about the same media go together, and over several ranks each medium to one of them.

The harness deals documents out to ranks one by one, so that the questions about a video land on different ranks, and
each would read it. Here the ranks put their requests together and deal media out instead. Long films, which would keep
one rank busy when the others have finished, are read by all ranks together, and the questions about them dealt out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import distributed

from ..files.progress import progress
from ..modeling_video_ma2mba.parallel_dims import process_group_exists
from .answering import Answerer
from .lmms_requests import Job
from .ranks import everyone
from .time_estimate import benchmark_estimate, media_left

Document = Callable[[Job], Any]


@dataclass
class Work:
    """Requests about the same media. `label` is None where telling would mean decoding: then it is one request."""

    label: str | None
    weight: int = 0
    keys: list[str] = field(default_factory=list)
    long: bool = False  # all ranks read it together


def answer_together(
    answerer: Answerer, jobs: Mapping[str, Job], document: Document, rank: int = 0, world: int = 1
) -> dict[str, dict[str, Any]]:
    """Answer what is not in the log yet, each medium being read once.

    Args:
        jobs: this rank's requests by key. document: gives the task's document of a request.

    Returns:
        The log's rows of `jobs`.
    """
    log = answerer.log
    todo = {key: job for key, job in jobs.items() if not log.holds(key)}
    answerer.reused += len(jobs) - len(todo)
    works = _grouped_by_media(todo, document)
    shared = world > 1 and process_group_exists()
    together: list[Work] = []
    if shared:
        _find_long(works, todo, document, answerer)
        works, together, todo = _share_of_rank(works, todo, jobs, rank, world)
    total, done = sum(len(work.keys) for work in works + together), 0
    if answerer.announce is not None and rank == 0 and works:
        media = media_left(works, todo, document)
        answerer.announce(benchmark_estimate(answerer.pipe, answerer.store.reading, media, total))
    with progress("answering", "questions", total) if rank == 0 else nullcontext(lambda _: None) as tell:
        for work in together + works:
            asked = [(key, todo[key], todo[key].prompt(document(todo[key]))) for key in work.keys]
            if work.long:
                answerer.answer_together(asked, distributed.group.WORLD, rank, world)
            else:
                answerer.answer(asked)
            done += len(work.keys)
            tell(done)
    if shared:
        own = [key for work in works for key in work.keys] + [key for w in together for key in w.keys[rank::world]]
        for rows in everyone({key: log.answers[key] for key in own}):
            log.answers.update(rows)  # each is in the file of the rank that gave it
    return {key: log.answers[key] for key in jobs}


def _grouped_by_media(todo: Mapping[str, Job], document: Document) -> list[Work]:
    """Requests by media, in the order in which media first occur."""
    cheap: dict[str, bool] = {}
    works: dict[str, Work] = {}
    for key, job in todo.items():
        prompt = None
        if job.task not in cheap:  # one look tells: media of a task are paths, or pictures that it decodes itself
            prompt = job.prompt(document(job))
            cheap[job.task] = not any(medium.in_memory for medium in prompt.media)
        if not cheap[job.task]:
            works[key] = Work(None, 0, [key])
            continue
        prompt = prompt or job.prompt(document(job))
        if prompt.whole or not prompt.media:
            works[key] = Work(None, 0, [key])
            continue
        label = "|".join(medium.label for medium in prompt.media)
        if label not in works:
            works[label] = Work(label, sum(medium.weight() for medium in prompt.media))
        works[label].keys.append(key)
    return list(works.values())


def _find_long(works: list[Work], todo: Mapping[str, Job], document: Document, answerer: Answerer) -> None:
    """Mark the work whose media have at least `answerer.share_frames` frames."""
    if not answerer.share_frames:
        return
    for work in works:
        if work.label is not None:
            prompt = todo[work.keys[0]].prompt(document(todo[work.keys[0]]))
            work.long = answerer.store.frames(prompt.media) >= answerer.share_frames


def _share_of_rank(
    works: list[Work], todo: dict[str, Job], jobs: Mapping[str, Job], rank: int, world: int
) -> tuple[list[Work], list[Work], dict[str, Job]]:
    """This rank's share of all ranks' work, heaviest first, to whom has least; and what all ranks do together."""
    told = [(work.label, work.weight, work.long, [(key, _as_tuple(todo[key])) for key in work.keys]) for work in works]
    all_told = everyone((told, {job.task for job in jobs.values()}))
    merged: dict[str, Work] = {}
    requests: dict[str, tuple] = {}
    for shares, _ in all_told:
        for label, weight, long, members in shares:
            fresh = [(key, request) for key, request in members if key not in requests]
            if fresh:
                work = merged.setdefault(label or fresh[0][0], Work(label, weight, long=long))
                work.keys += [key for key, _ in fresh]
                requests.update(fresh)
    wanted = {request[0] for request in requests.values()}
    if any(wanted - tasks for _, tasks in all_told):
        for work in works:
            work.long = False
        return works, [], todo  # a rank without a request of a task lacks the task's functions
    load, mine, together = [0] * world, [], []
    for work in sorted(merged.values(), key=lambda work: (-work.weight, work.keys[0])):
        if work.long:
            together.append(work)
            continue
        lightest = load.index(min(load))
        load[lightest] += work.weight + len(work.keys)
        if lightest == rank:
            mine.append(work)
    like = {job.task: job for job in jobs.values()}
    return mine, together, {key: _from_tuple(requests[key], like) for work in mine + together for key in work.keys}


def _as_tuple(job: Job) -> tuple:
    return job.task, job.split, job.doc_id, job.context, job.settings, job.repeat


def _from_tuple(told: tuple, like: Mapping[str, Job]) -> Job:
    task, split, doc_id, context, settings, repeat = told
    model = like[task]
    return Job(task, split, doc_id, context, settings, model.source, model.is_chat, model.rounds, repeat)
