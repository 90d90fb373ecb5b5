"""`video-ma2mba read` and `state`: videos into state files, what is in one, whose it is, and reading on from it."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from video_ma2mba.loading import check_loading, check_state_dtype, pick_state_dtype, shared_run

from .ask import reading_progress, size_text
from .loading import load_pipeline
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
    Subtitles,
    TrustRemoteCode,
    check_out_file,
    check_video,
    chosen_frames,
)
from .terminal import echo_json, note

app = typer.Typer(help="State files: show, check, and read on.", no_args_is_help=True, pretty_exceptions_enable=False)
StateFile = Annotated[Path, typer.Argument(help="State file written by `read`.", show_default=False)]
_JSON_FACTS = ("model_config", "processor", "sources", "chat")  # shown in parts, or with --json whole


@app.callback()
def state() -> None:
    """State files: show, check, and read on."""


@app.command()
def show(
    file: StateFile,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as one JSON object.")] = False,
) -> None:
    """Say what a state file has seen and which model it belongs to; no model is loaded."""
    from video_ma2mba.modeling_video_ma2mba.state_header import summarise

    header, kinds, nbytes = summarise(file)
    facts = {**header.metadata, "tokens": str(header.seen_tokens), "bytes": str(nbytes)}
    facts |= {"format": str(header.format_version), "layers": _layers(kinds)}
    parsed = {name: json.loads(facts[name]) for name in _JSON_FACTS if name in facts}
    if as_json:
        echo_json({**facts, **parsed})
        return
    for name, value in facts.items():
        if name not in _JSON_FACTS and value:
            typer.echo(f"{name}: {value}")
    for source in parsed.get("sources", []):
        chosen = ", ".join(f"{name} {value}" for name, value in source.items() if value is not None and name != "name")
        typer.echo(f"source {source['name']}: {chosen}")
    if "chat" in parsed:
        typer.echo(f"chat: {len(parsed['chat']) // 2} questions answered")


@app.command()
def check(
    file: StateFile,
    model: Model = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Check that a state file is whole, and that it belongs to a model and its processor."""
    from video_ma2mba.modeling_video_ma2mba.state_header import summarise

    summarise(file)
    pipe = load_pipeline(model, device="cpu", dtype="auto", trust_remote_code=trust_remote_code)
    from video_ma2mba import VideoState

    found = VideoState.load(file)
    pipe.check(found)
    kept = f"format {found.format_version}, {_layers(found.kinds)}"
    typer.echo(f"{file}: whole ({kept}), and read by this model ({pipe.identity()['model']})")


def _layers(kinds: list[str]) -> str:
    """How many layers of which kinds a state has, such as `24 mamba2`."""
    return ", ".join(f"{count} {kind}" for kind, count in Counter(kinds).items())


@app.command()
def append(
    file: StateFile,
    video: Annotated[str, typer.Argument(help="What to read on with: as for `read`.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="State file to write.", show_default="FILE itself")] = None,
    model: Model = None,
    fps: Fps = None,
    num_frames: NumFrames = None,
    start: Start = None,
    end: End = None,
    subtitles: Subtitles = "off",
    save_every: SaveEvery = 30.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    state_dtype: StateDtype = "float32",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Read more video into a state, as if it had followed the first without a break.

    Interrupted, the same command continues from OUT.partial and ends with the same state. Several processes
    (torchrun -m video_ma2mba state append …) share the video out.
    """
    from video_ma2mba.modeling_video_ma2mba.state_header import summarise

    check_out_file("--out", out)
    check_state_dtype(state_dtype)
    check_loading(model, device, dtype, kind="video_ma2mba")
    summarise(file)
    chosen = chosen_frames(fps, num_frames, start, end, subtitles)
    check_video(video, chosen)
    with shared_run(device) as (own, group, first):
        pipe = load_pipeline(model, device=own, dtype=dtype, trust_remote_code=trust_remote_code)
        from video_ma2mba import VideoState

        settings = {"state": VideoState.load(file), "save_seconds": save_every, "group": group, **chosen}
        rounded = pick_state_dtype(state_dtype)
        read_into_file(pipe, video, out or file, rounded, quiet=not first, **settings)


def read(
    video: Annotated[str, typer.Argument(help="Video file, image, directory of images, or URL.", show_default=False)],
    out: Annotated[Path, typer.Option(help="State file to write.", show_default=False)],
    model: Model = None,
    fps: Fps = None,
    num_frames: NumFrames = None,
    start: Start = None,
    end: End = None,
    subtitles: Subtitles = "off",
    save_every: SaveEvery = 30.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out where it exists.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    state_dtype: StateDtype = "float32",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Read a video once and keep what the model remembers, in a file of constant size.

    Interrupted, the same command continues from OUT.partial and ends with the same state. Several processes
    (torchrun --nproc_per_node 2 -m video_ma2mba read …) share the video out and reach that state sooner.
    """
    from video_ma2mba.modeling_video_ma2mba.state_writing import is_written_through

    check_out_file("--out", out)
    if out.is_file() and not overwrite and not is_written_through(out):
        raise ValueError(f"--out {out} exists: name another file, or pass --overwrite")
    check_state_dtype(state_dtype)
    check_loading(model, device, dtype, kind="video_ma2mba")
    chosen = chosen_frames(fps, num_frames, start, end, subtitles)
    check_video(video, chosen)
    with shared_run(device) as (own, group, first):
        pipe = load_pipeline(model, device=own, dtype=dtype, trust_remote_code=trust_remote_code)
        settings = {"save_seconds": save_every, "group": group, **chosen}
        read_into_file(pipe, video, out, pick_state_dtype(state_dtype), quiet=not first, **settings)


def read_into_file(pipe, video: str, out: Path, state_dtype=None, quiet: bool = False, **settings) -> None:
    """Read a video and save the state; interrupted, the same call continues from OUT.partial.

    Args:
        pipe: the question-answering pipeline.
        state_dtype: of the file, as in `VideoState.save`; an unfinished state is always saved as it is.
        quiet: only help another process that writes the file and tells how far it is.
        settings: of `pipe.read`.
    """
    from video_ma2mba.modeling_video_ma2mba.state_writing import is_written_through
    from video_ma2mba.processing.video_source_names import shown_name

    partial: Path | None = Path(f"{os.fspath(out)}.partial")
    if is_written_through(out):  # nothing that could be read again
        partial = None
    if quiet:
        pipe.read(video, partial=partial, **settings)
        return
    if partial is not None and partial.exists():
        note(f"continuing from {partial}")
    try:
        with reading_progress(f"reading {shown_name(video)}") as on_frames:
            state = pipe.read(video, on_frames=on_frames, partial=partial, **settings)
    except KeyboardInterrupt:
        if partial is not None and partial.exists():
            note(f"interrupted: the same command continues from {partial}")
        raise
    state.save(out, state_dtype)
    if partial is not None:
        partial.unlink(missing_ok=True)
    seen = f"{state.metadata['frames']} frames of {float(state.metadata['seconds']):g} s"
    note(f"{out}: {seen}, {size_text(out.stat().st_size if partial is not None else state.nbytes)}")
