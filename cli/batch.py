"""`video-ma2mba batch`: a long queue of questions about videos, answered into a file that survives interruptions."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from .ask import reading_progress
from .batch_queue import Item, Results, by_video, read_queue
from .errors import is_expected, one_line
from .loading import load_pipeline
from .options import Device, Dtype, End, Fps, MaxNewTokens, Model, NumFrames, Start, TrustRemoteCode, chosen_frames
from .terminal import note


def batch(
    queue: Annotated[
        Path, typer.Argument(help='JSONL file: {"video": ..., "question": ... or "questions": [...]} a line.')
    ],
    out: Annotated[Path, typer.Argument(help="JSONL file of results; continued where it exists.")],
    batch_size: Annotated[int, typer.Option(help="Questions that are answered together.", min=1)] = 8,
    videos: Annotated[
        Path | None, typer.Option(help="Folder that relative video paths start from.", show_default="this one")
    ] = None,
    model: Model = None,
    fps: Fps = None,
    num_frames: NumFrames = None,
    start: Start = None,
    end: End = None,
    max_new_tokens: MaxNewTokens = 64,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Try again where OUT holds an error.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Answer a queue of questions about videos; every video is read once for all its questions.

    One line comes into OUT for each line of the queue, as soon as it is answered: what was asked with "answer" or
    "answers", or with "error". Interrupted, the same command goes on where it stopped. An "id" is handed through.
    """
    items = read_queue(queue)
    if not items:
        raise ValueError(f"{queue} holds no questions")
    if videos is not None and not videos.is_dir():
        raise FileNotFoundError(f"--videos {videos}: there is no such folder")
    frames = {"fps": fps, "num_frames": num_frames, "start": start, "end": end}
    from video_ma2mba.processing.frame_sampling import Sampling

    if given := chosen_frames(**frames):
        Sampling(**given)
    pipe = load_pipeline(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    pipe.processor.video_processor.sampling(**frames)  # what makes no sense is refused once, not for every video
    identity = pipe.identity()
    settings = {name: identity[name] for name in ("model_config", "weights", "processor", "dtype")}
    settings |= {**frames, "max_new_tokens": max_new_tokens}
    _note_contents(items, videos)
    began, errors = time.perf_counter(), 0
    with Results(out, settings, items, retry_errors) as results, reading_progress("answered") as tell:
        there = len(results.done)
        if results.torn:
            note(f"{out}: an unfinished line at the end was taken away")
        if results.stale:
            note(f"{out}: {results.stale} results are about other contents of their videos: done anew")
        if there:
            note(f"{out}: {there} of {len(items)} results are there already")
        tell(there, len(items))
        try:
            todo = [item for item in items if item.line not in results.done]
            for group in _batches(todo, batch_size):
                for result in _answered(pipe, group, frames, videos, batch_size, max_new_tokens):
                    results.add(result)
                    errors += "error" in result
                    tell(len(results.done), len(items))
                results.flush()
        except KeyboardInterrupt:
            note(f"interrupted after {len(results.done)} of {len(items)}: the same command goes on")
            raise
    seconds = time.perf_counter() - began
    note(f"{out}: {len(items) - there - errors} answered, {errors} errors in {seconds:.1f} s")


def _path(video: str, folder: Path | None) -> str:
    from video_ma2mba.processing.video_source_names import is_address, local_path

    return video if folder is None or is_address(video) else str(folder / local_path(video))


def _note_contents(items: list[Item], folder: Path | None) -> None:
    """Give each item the digest of what its video holds now."""
    from video_ma2mba.eval.media import Medium

    known: dict[str, str | None] = {}
    for item in items:
        if item.error is None:
            if item.video not in known:
                try:
                    known[item.video] = Medium(_path(item.video, folder)).digest()[:16]
                except (OSError, ValueError):  # what is wrong with it is told when it is read
                    known[item.video] = None
            item.shown = known[item.video]


def _batches(items: list[Item], size: int) -> Iterator[list[Item]]:
    """Items that are worked on together: whole videos, until there are `size` questions."""
    group: list[Item] = []
    for same in by_video(items):
        group += same
        if sum(len(item.questions) for item in group) >= size:
            yield group
            group = []
    if group:
        yield group


def _answered(
    pipe, group: list[Item], frames: dict, folder: Path | None, size: int, max_new_tokens: int
) -> Iterator[dict]:
    """The results of some items, whatever goes wrong with them."""
    states, facts = _read(pipe, sorted({item.video for item in group if item.error is None}), frames, folder)
    asked: list[tuple[Item, str]] = []
    for item in group:
        if item.error is not None:
            yield item.result(error=item.error)
        elif isinstance(states[item.video], Exception):
            yield item.result(error=_error_text(states[item.video]), **facts[item.video])
        else:
            asked += [(item, question) for question in item.questions]
    answers: dict[int, list[str]] = {}
    for first in range(0, len(asked), size):
        part = asked[first : first + size]
        for (item, _), answer in zip(part, _answers(pipe, part, states, max_new_tokens), strict=True):
            given = answers.setdefault(item.line, [])
            given.append(answer)
            if len(given) < len(item.questions):
                continue
            wrong = next((answer for answer in given if isinstance(answer, Exception)), None)
            if wrong is not None:
                found = {"error": _error_text(wrong)}
            else:
                found = {"answers": given} if item.several else {"answer": given[0]}
            yield item.result(**found, **facts[item.video])


def _read(pipe, videos: list[str], frames: dict, folder: Path | None) -> tuple[dict, dict]:
    """For each video its state, or what went wrong; and frames read and warnings, for the results."""
    from video_ma2mba.modeling_video_ma2mba.answering_questions import chunks_of_all, video_prefix

    model, processor = pipe.model, pipe.processor
    prefix, size = video_prefix(processor), model.config.read_chunk_frames
    states: dict[str, object] = {}
    readers: dict[str, object] = {}
    try:
        for video in videos:
            try:
                readers[video] = processor.video_processor.open(_path(video, folder), **frames)
            except Exception as error:
                states[video] = error
        opened = list(readers)
        try:
            found = model.read_together(prefix, chunks_of_all(list(readers.values()), size))
        except Exception:  # too much for the memory, say: one by one may do
            found = [
                _result_or_error(lambda v=video: model.read(prefix, [readers[v].chunks(size)])) for video in opened
            ]
        states |= dict(zip(opened, found, strict=True))
    finally:
        for reader in readers.values():
            reader.close()
    facts: dict[str, dict] = {video: {} for video in videos}
    for video, reader in readers.items():
        if not isinstance(states[video], Exception):
            facts[video]["frames"] = int(states[video].metadata["frames"])
        if reader.warnings:
            facts[video]["warnings"] = reader.warnings
    return states, facts


def _answers(pipe, part: list[tuple[Item, str]], states: dict, max_new_tokens: int) -> list:
    """The answer to each question, or what went wrong."""
    import torch

    from video_ma2mba.modeling_video_ma2mba.answering_batches import answer_together
    from video_ma2mba.modeling_video_ma2mba.answering_questions import question_ids

    def together(rows: list[tuple[Item, str]]) -> list[str]:
        ids = [question_ids(pipe.processor, question) for _, question in rows]
        with pipe.device_placement(), torch.no_grad():
            found = answer_together(
                pipe.model,
                pipe.processor.tokenizer,
                [states[item.video] for item, _ in rows],
                ids,
                max_new_tokens=max_new_tokens,
            )
        return [row[0]["answer"] for row in found]

    try:
        return together(part)
    except Exception:  # one of them, or too many for the memory
        return [_result_or_error(lambda r=row: together([r])[0]) for row in part]


def _result_or_error(run):
    try:
        return run()
    except Exception as error:
        return error


def _error_text(error: Exception) -> str:
    """An error as a result tells it; what nobody expected with its kind."""
    return one_line(error) if is_expected(error) else f"{type(error).__name__}: {one_line(error)}"
