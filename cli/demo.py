"""`video-ma2mba demo` (and `make demo`): questions with known answers about a folder of videos."""

import json
import time
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer

from .ask import reading_progress, size_text
from .loading import load_pipeline
from .options import Device, Dtype, Model

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "videos"


def load_questions(folder: Path) -> list[dict]:
    """The objects of `questions.jsonl`: `video, kind, question, options, answer, frames`, videos in turn.

    Raises:
        FileNotFoundError: the folder has no such file.
    """
    file = folder / "questions.jsonl"
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} holds no questions.jsonl: make one with `video-ma2mba world render --out DIR`"
        )
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def demo(
    folder: Annotated[
        Path, typer.Argument(help="Folder written by `world render`.", show_default="the repository's examples/videos")
    ] = EXAMPLES,
    model: Model = None,
    fps: Annotated[float, typer.Option(help="Frames read per second of video.")] = 1.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Answer questions whose right answers are known, and say which came out right."""
    questions = load_questions(folder)
    pipe = load_pipeline(model, device=device, dtype=dtype)
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
