"""`video-ma2mba ask`: answer questions from a video, read once, or from a state file; without questions, a chat."""

import sys
import time
from contextlib import contextmanager
from typing import Annotated

import typer

from .loading import load_pipeline
from .options import Device, Dtype, End, Fps, MaxNewTokens, Model, NumFrames, Start, TrustRemoteCode, chosen_frames
from .terminal import echo_json, given_text


def ask(
    video: Annotated[
        str,
        typer.Argument(help="Video file, image, directory of images, URL, or state file.", show_default=False),
    ],
    questions: Annotated[
        list[str] | None, typer.Argument(help="Questions; none opens a conversation.", show_default=False)
    ] = None,
    model: Model = None,
    fps: Fps = None,
    num_frames: NumFrames = None,
    start: Start = None,
    end: End = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_new_tokens: MaxNewTokens = 64,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per question and line.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Answer questions about a video. The video is read once, in memory that does not grow with it.

    A state file written by `read` needs no reading. Without a question, questions are read from standard input.
    Answers go to standard output as they are generated; progress and figures go to standard error.
    """
    questions = [given_text(question) for question in questions or []]
    if not all(questions):
        raise ValueError("a question is empty: ask something about the video")
    if as_json and not questions:
        raise ValueError("--json answers questions given on the command line: add one")
    from video_ma2mba.modeling_video_ma2mba.state_files import is_state_file
    from video_ma2mba.modeling_video_ma2mba.state_video import VideoState
    from video_ma2mba.processing.video_source_names import is_address, local_path, shown_name

    name, file = shown_name(video), video if is_address(video) else local_path(video)
    frames_wanted = chosen_frames(fps, num_frames, start, end)
    loaded = VideoState.load(file) if is_state_file(file) else None
    if loaded is not None and frames_wanted:
        raise ValueError(
            f"{name} is a state file, whose frames are read already: leave {', '.join(frames_wanted)} out"
        )
    pipe = load_pipeline(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    began = time.perf_counter()
    if loaded is not None:
        pipe.check(loaded)
        state = loaded
    else:
        with reading_progress(f"reading {name}") as on_frames:
            state = pipe.read(video, on_frames=on_frames, **frames_wanted)
    read_seconds = time.perf_counter() - began
    frames = int(state.metadata.get("frames", 0))
    if not questions:
        from .chat import chat

        chat(pipe, state, max_new_tokens)
        return

    for question in questions:
        if as_json:
            began = time.perf_counter()
            record = {
                "video": name,
                "question": question,
                "answer": pipe.ask(state, question, max_new_tokens=max_new_tokens),
                "frames": frames,
                "state_bytes": state.nbytes,
                "read_seconds": round(read_seconds, 3),
                "answer_seconds": round(time.perf_counter() - began, 3),
            }
            echo_json(record)
        else:
            if len(questions) > 1:
                typer.echo(question, err=True)
            streamer = stdout_streamer(pipe.processor.tokenizer)
            pipe.ask(state, question, max_new_tokens=max_new_tokens, streamer=streamer)
    if not as_json and loaded is None:
        typer.echo(f"{frames} frames read in {read_seconds:.1f} s; state {size_text(state.nbytes)}", err=True)


def size_text(nbytes: int) -> str:
    """Bytes for people: `1.1 MB`, `26.0 kB`."""
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.1f} kB"


def stdout_streamer(tokenizer):
    """Writes the generated text to standard output token by token."""
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


@contextmanager
def reading_progress(label: str):
    """A progress bar on standard error, shown only on a terminal. Yields the `on_frames(seen, expected)` callback."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(escape(label), total=None)
        yield lambda seen, expected=None: bar.update(task, completed=seen, total=expected)
