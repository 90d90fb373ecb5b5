"""`video-ma2mba read`: read a video into a state file, from which questions are answered later."""

import os
from pathlib import Path
from typing import Annotated

import typer

from video_ma2mba.loading import load_pipeline, pick_state_dtype

from .ask import reading_progress, size_text
from .options import (
    Device,
    Dtype,
    End,
    Fps,
    Model,
    NumFrames,
    SaveEvery,
    Start,
    StateDtype,
    TrustRemoteCode,
    chosen_frames,
)
from .out_files import check_out_file


def read(
    video: Annotated[str, typer.Argument(help="Video file, image, directory of images, or URL.", show_default=False)],
    out: Annotated[Path, typer.Option(help="State file to write.", show_default=False)],
    model: Model = None,
    fps: Fps = None,
    num_frames: NumFrames = None,
    start: Start = None,
    end: End = None,
    save_every: SaveEvery = 30.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out where it exists.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    state_dtype: StateDtype = "float32",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Read a video once and keep what the model remembers, in a file of constant size.

    Interrupted, the same command continues from OUT.partial and ends with the same state.
    """
    from video_ma2mba.modeling_video_ma2mba.state_writing import is_written_through

    check_out_file("--out", out)
    if out.is_file() and not overwrite and not is_written_through(out):
        raise ValueError(f"--out {out} exists: name another file, or pass --overwrite")
    rounded = pick_state_dtype(state_dtype)
    pipe = load_pipeline(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    chosen = chosen_frames(fps, num_frames, start, end)
    read_into_file(pipe, video, out, rounded, save_seconds=save_every, **chosen)


def read_into_file(pipe, video: str, out: Path, state_dtype=None, **settings) -> None:
    """Read a video and save the state; interrupted, the same call continues from OUT.partial.

    Args:
        pipe: the question-answering pipeline.
        state_dtype: of the file, as in `VideoState.save`; an unfinished state is always saved as it is.
        settings: of `pipe.read`.
    """
    from video_ma2mba.modeling_video_ma2mba.state_writing import is_written_through
    from video_ma2mba.processing.video_source_names import shown_name

    partial: Path | None = Path(f"{os.fspath(out)}.partial")
    if is_written_through(out):  # nothing that could be read again
        partial = None
    if partial is not None and partial.exists():
        typer.echo(f"continuing from {partial}", err=True)
    try:
        with reading_progress(f"reading {shown_name(video)}") as on_frames:
            state = pipe.read(video, on_frames=on_frames, partial=partial, **settings)
    except KeyboardInterrupt:
        if partial is not None and partial.exists():
            typer.echo(f"interrupted: the same command continues from {partial}", err=True)
        raise
    state.save(out, state_dtype)
    if partial is not None:
        partial.unlink(missing_ok=True)
    seen = f"{state.metadata['frames']} frames of {float(state.metadata['seconds']):g} s"
    typer.echo(f"{out}: {seen}, {size_text(out.stat().st_size if partial is not None else state.nbytes)}", err=True)
