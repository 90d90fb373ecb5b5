"""`video-ma2mba batch`: a long queue of questions about videos, answered into a file that survives interruptions."""

import re
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .batch_queue import Item, Results, read_queue
from .batch_work import Tell, Worker, batches, note_contents
from .loading import load_pipeline
from .options import (
    Device,
    Dtype,
    End,
    Fps,
    MaxNewTokens,
    Model,
    NumFrames,
    Start,
    Subtitles,
    Times,
    TrustRemoteCode,
    check_frames,
    check_out_file,
    chosen_frames,
)
from .terminal import note

_ADDRESS = re.compile(r"auto|local|ray://\S+|[\w.-]+:\d+")
_FLUSH_SECONDS = 1.0  # a power failure costs what was answered since, a killed process nothing


def batch(
    queue: Annotated[
        str,
        typer.Argument(
            help='JSONL: {"video": ..., "question": ... or "questions": [...]} a line, with "id", "start", "end", '
            '"subtitles" if you like; or a CSV table with such columns.',
            show_default=False,
        ),
    ],
    out: Annotated[
        str, typer.Argument(help="JSONL file of results, also s3:// and the like; continued where it exists.")
    ],
    batch_size: Annotated[int, typer.Option(help="Questions that are answered together.", min=1)] = 8,
    videos: Annotated[
        Path | None, typer.Option(help="Folder that relative video paths start from.", show_default="this one")
    ] = None,
    states: Annotated[
        str | None,
        typer.Option(
            help="Keep the videos' states in this folder (also s3:// and the like), and read none again. Lines may "
            "then be without a question.",
            show_default=False,
        ),
    ] = None,
    model: Model = None,
    fps: Fps = None,
    num_frames: NumFrames = None,
    start: Start = None,
    end: End = None,
    subtitles: Subtitles = "off",
    times: Times = False,
    max_new_tokens: MaxNewTokens = 64,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Try again where OUT holds an error.")] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS]",
            help="Work on a Ray cluster: ray://host:port, host:port, local (this machine), or without ADDRESS the "
            "one that Ray finds.",
            show_default=False,
        ),
    ] = None,
    ray_workers: Annotated[int | None, typer.Option(help="Workers.", show_default="as many as fit", min=1)] = None,
    ray_gpus: Annotated[
        float | None, typer.Option(help="GPUs of a worker, such as 0.5.", show_default="1 where there are some", min=0)
    ] = None,
    ray_cpus: Annotated[float, typer.Option(help="CPU cores of a worker.", min=0)] = 1.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Answer a queue of questions about videos; every video is read once for all its questions.

    One line comes into OUT for each line of the queue, as soon as it is answered: what was asked with "answer" or
    "answers", or with "error". Interrupted, the same command goes on where it stopped. An "id" is handed through.
    Ends with exit code 1 where OUT holds an error.
    """
    from video_ma2mba.processing.video_source_names import is_address

    queue, out, states = _plain(queue), _plain(out), None if states is None else _plain(states)
    if queue == out:
        raise ValueError(f"OUT {out} is the queue itself: name another file")
    items = read_queue(queue, needs_question=states is None)
    if not items:
        raise ValueError(f"{queue} holds no questions")
    if not is_address(out):
        check_out_file("OUT", Path(out))
    if videos is not None and not videos.is_dir():
        raise FileNotFoundError(f"--videos {videos}: there is no such folder")
    frames = {"fps": fps, "num_frames": num_frames, "start": start, "end": end}
    check_frames(chosen_frames(**frames, subtitles=subtitles))
    folder = None if videos is None else str(videos)
    work = {"frames": frames, "folder": folder, "size": batch_size, "max_new_tokens": max_new_tokens, "states": states}
    work |= {"subtitles": subtitles, "times": times}
    loading = {"model": model, "device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    began = time.perf_counter()
    with ExitStack() as stack:
        if ray is None:
            if ray_workers is not None or ray_gpus is not None:
                raise ValueError("--ray-workers and --ray-gpus are those of a cluster: add --ray")
            crew: Any = Alone(Worker(load_pipeline(**loading), **work))
        else:
            from .batch_ray import Cluster

            crew = stack.enter_context(Cluster(ray, ray_workers, ray_gpus, ray_cpus, loading, work))
        settings = crew.settings()
        there, errors = _answer_all(crew, items, settings, out, folder, batch_size, retry_errors)
    fresh, failed = len(items) - there, errors[1] - errors[0]
    note(f"{out}: {fresh - failed} answered, {failed} errors in {time.perf_counter() - began:.1f} s")
    if errors[1]:
        note(f"{out}: {errors[1]} of {len(items)} results are errors (--retry-errors tries them again)")
        raise typer.Exit(1)


class BatchCommand(TyperCommand):
    """`--ray` may be given without its address."""

    def parse_args(self, ctx, args):
        for place in (number for number, word in enumerate(args) if word == "--ray"):
            if not _ADDRESS.fullmatch(args[place + 1] if place + 1 < len(args) else ""):
                args = [*args[:place], "--ray=auto", *args[place + 1 :]]
        return super().parse_args(ctx, args)


class Alone:
    """Does the work in this process."""

    def __init__(self, worker: Worker):
        self._worker = worker
        self.settings = worker.settings
        self.note_contents = note_contents

    def answered(self, groups: Iterable[list[Item]]) -> Iterator[list[dict[str, Any]]]:
        """The results of groups of items, one by one as they come; a bar for what is being read."""
        for group in groups:
            with ExitStack() as bars:
                yield from ([result] for result in self._worker.answered(group, _reading_bar(bars)))


def _reading_bar(bars: ExitStack) -> Tell:
    """Shows a bar of its own once something is read; it goes with the context."""
    from video_ma2mba.files.progress import progress

    bar = None

    def tell(label: str, done: int, total: int) -> None:
        nonlocal bar
        bar = bar or bars.enter_context(progress(f"reading {label}"))
        bar(done, total)

    return tell


def _answer_all(
    crew: Any, items: list[Item], settings: dict, out: str, folder: str | None, size: int, retry_errors: bool
) -> tuple[int, tuple[int, int]]:
    """Have everything answered that `out` lacks; results that were there, and errors in it before and now."""
    from video_ma2mba.files.progress import progress

    crew.note_contents(items, folder)
    with Results(out, settings, items, retry_errors) as results, progress("answered", "lines", len(items)) as tell:
        there, errors, flushed = len(results.done), results.errors, time.monotonic()
        if results.torn:
            note(f"{out}: an unfinished line at the end was taken away")
        if results.stale:
            note(f"{out}: {results.stale} results are about other contents of their videos: done anew")
        if there:
            note(f"{out}: {there} of {len(items)} results are there already")
        tell(there)
        try:
            todo = [item for item in items if item.line not in results.done]
            for found in crew.answered(batches(todo, size)):
                for result in found:
                    results.add(result)
                tell(len(results.done), remark=f"{results.errors} errors" if results.errors else "")
                if time.monotonic() - flushed > _FLUSH_SECONDS:
                    results.flush()
                    flushed = time.monotonic()
            results.flush()
        except KeyboardInterrupt:
            note(f"interrupted after {len(results.done)} of {len(items)}: the same command goes on")
            raise
    return there, (errors, results.errors)


def _plain(place: str) -> str:
    """A `file:` address, or `~/name`, as the path it means; other addresses stay."""
    from video_ma2mba.processing.video_source_names import is_address, local_path

    return place if is_address(place) else str(local_path(place))
