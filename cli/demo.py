"""`video-ma2mba demo` (and `make demo`): questions with known answers about a folder of videos; `--web`: a page."""

from __future__ import annotations

import time
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from video_ma2mba import EXAMPLE_VIDEOS
from video_ma2mba.files.text_files import check_text, parse_json, text_lines

from .ask import reading_progress, size_text
from .loading import load_pipeline
from .options import Device, Dtype, Model
from .terminal import note

if TYPE_CHECKING:
    from video_ma2mba import VideoQuestionAnsweringPipeline


def load_questions(folder: Path) -> list[dict]:
    """The objects of `questions.jsonl`: `video, kind, question, options, answer, frames`, videos in turn.

    Raises:
        FileNotFoundError: the folder has no such file. ValueError: a line of it is no question.
    """
    file = folder / "questions.jsonl"
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} holds no questions.jsonl: make one with `video-ma2mba world render --out DIR`"
        )
    questions = []
    for number, line in enumerate(text_lines(file), 1):
        if not line.strip():
            continue
        try:
            check_text(line)
            question = parse_json(line)
            if not all(isinstance(question[name], str) for name in ("video", "question", "answer")):
                raise ValueError("video, question and answer must be texts")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {number}, is no question: {error}") from None
        questions.append(question)
    return questions


def demo(
    folder: Annotated[
        Path, typer.Argument(help="Folder written by `world render`.", show_default="four example clips")
    ] = EXAMPLE_VIDEOS,
    model: Model = None,
    fps: Annotated[float, typer.Option(help="Frames read per second of video.")] = 1.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    web: Annotated[
        bool, typer.Option("--web", help="Serve a page: upload or pick a video, read it, ask, keep the state.")
    ] = False,
    port: Annotated[
        int | None, typer.Option(help="Of the page.", show_default="the first free one from 7860", min=1, max=65535)
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="Have this server (`serve`) read and answer instead.", show_default=False)
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with a key of that server.", show_default=False)
    ] = None,
) -> None:
    """Answer questions whose right answers are known, and say which came out right. With --web, serve a page."""
    if port is not None and not web:
        raise ValueError("--port is that of the page: add --web, or leave --port away")
    if server is not None and model is not None:
        raise ValueError("--server answers with its own model: leave --model away")
    questions = load_questions(folder)
    pipe: Any
    if server is None:
        pipe = load_pipeline(model, device=device, dtype=dtype)
    else:
        from video_ma2mba.serving.remote import ServerPipeline, first_key

        pipe = ServerPipeline(server, first_key(api_key_file))
    if web:
        serve_page(folder, pipe, port, server)
        return
    right = 0
    for video, asked in groupby(questions, key=lambda line: line["video"]):
        began = time.perf_counter()
        with reading_progress(f"reading {video}") as on_frames:
            state = pipe.read(str(folder / video), fps=fps, on_frames=on_frames)
        seconds = time.perf_counter() - began
        typer.echo(
            f"\n{video}: {state.metadata['frames']} frames seen in {seconds:.2f} s, state {size_text(state.nbytes)}"
        )
        for line in asked:
            began = time.perf_counter()
            answer = pipe.ask(state, line["question"], max_new_tokens=32).strip()
            seconds = time.perf_counter() - began
            is_right = answer.casefold() == line["answer"].casefold()
            right += is_right
            verdict = "right" if is_right else f"expected {line['answer']}"
            typer.echo(f"  {line['question']}\n    {answer}  ({verdict}, {seconds:.2f} s)")
    typer.echo(f"\n{right} of {len(questions)} answers right.")
    note("Your own videos and questions: `video-ma2mba demo --web` opens a page.")


def serve_page(
    folder: Path, pipe: VideoQuestionAnsweringPipeline, port: int | None = None, server: str | None = None
) -> None:
    """Serve the page of the Space on this machine alone, until interrupted. The arguments are those of `demo_page`.

    Raises:
        ImportError: gradio is not installed. OSError: the port is taken.
    """
    page = demo_page(folder, pipe, server)
    from video_ma2mba.hub_cards.space.web.examples import load_examples
    from video_ma2mba.hub_cards.space.web.layout import serve

    serve(page, load_examples(folder), server_name="127.0.0.1", server_port=port)


def demo_page(folder: Path, pipe: VideoQuestionAnsweringPipeline, server: str | None = None) -> Any:
    """The page of the Space, about this machine.

    Args:
        folder: example videos with `questions.jsonl`.
        server: address of the server that `pipe` asks, where it is one; a server shows no pictures of where answers
            come from.

    Raises:
        ImportError: gradio is not installed.
    """
    try:
        from video_ma2mba.hub_cards.space.web.layout import about_model, build_page
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ImportError("the page needs gradio: pip install 'video-ma2mba[demo]'", name="gradio") from None
    from video_ma2mba.hub_cards.relevance_strip import relevance_strip
    from video_ma2mba.hub_cards.space.web.examples import load_examples
    from video_ma2mba.processing.video_source_names import shown_name

    where = "It runs on this machine; nothing leaves it."
    if server is not None:
        where = f"Videos and questions go to the server {shown_name(server)}."
    about = f"{about_model(Path(pipe.model.name_or_path))} {where}"
    strip = relevance_strip if server is None else None
    return build_page(pipe, load_examples(folder), "Ask a video", about, strip)
