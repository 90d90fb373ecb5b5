"""`video-ma2mba describe`: captions with times, chapters and a summary, as subtitles, JSON or Markdown."""

from pathlib import Path
from typing import Annotated

import typer

from video_ma2mba.loading import check_loading

from .ask import reading_progress
from .loading import load_pipeline
from .options import (
    TIME,
    Device,
    Dtype,
    End,
    Fps,
    MaxNewTokens,
    Model,
    NumFrames,
    Start,
    Subtitles,
    TrustRemoteCode,
    check_out_file,
    check_video,
    chosen_frames,
)
from .terminal import note


def describe(
    video: Annotated[str, typer.Argument(help="Video file, image, directory of images, or URL.", show_default=False)],
    every: Annotated[float, typer.Option(help="Length of a caption's stretch of video.", **TIME)] = 10.0,
    out_format: Annotated[
        str | None, typer.Option("--format", help="srt, vtt, json or md.", show_default="by --out, else srt")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write.", show_default="standard output")] = None,
    question: Annotated[
        str | None,
        typer.Option(help="Ask this for each caption; {start} and {end} are its times.", show_default=False),
    ] = None,
    summary: Annotated[str | None, typer.Option(help="Ask this for the summary.", show_default=False)] = None,
    model: Model = None,
    fps: Fps = None,
    num_frames: NumFrames = None,
    start: Start = None,
    end: End = None,
    subtitles: Subtitles = "off",
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_new_tokens: MaxNewTokens = 64,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Describe a video: a caption every few seconds, chapters and a summary, from one reading.

    The state is forked along the way, so an hour is read once. SRT and WebVTT files are what players show.
    """
    from video_ma2mba.processing.video_source_names import shown_name

    kinds = ("srt", "vtt", "json", "md")
    kind = out_format or (out.suffix.lower().lstrip(".") if out is not None and out.suffix else "srt")
    if kind not in kinds:
        raise ValueError(f"--format {kind} is not one of {', '.join(kinds)}: name one")
    if not every > 0:
        raise ValueError(f"--every {every:g}: a caption must last more than 0 seconds")
    check_out_file("--out", out)
    check_loading(model, device, dtype)
    chosen = chosen_frames(fps, num_frames, start, end, subtitles)
    check_video(video, chosen)
    pipe = load_pipeline(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    from video_ma2mba.explain.description import SUMMARY, describe_video
    from video_ma2mba.modeling_video_ma2mba.state_writing import write_whole

    with reading_progress(f"describing {shown_name(video)}") as on_frames:
        found = describe_video(
            pipe.model,
            pipe.processor,
            video,
            every,
            question=question,
            summary=summary or SUMMARY,
            max_new_tokens=max_new_tokens,
            on_frames=on_frames,
            **chosen,
        )
    if out is None:
        typer.echo(found.text(kind), nl=False)
        return
    write_whole(out, found.text(kind))
    note(f"{out}: {len(found.segments)} captions, {len(found.chapters)} chapters of {found.duration:g} s")
