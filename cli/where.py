"""`video-ma2mba where`: which seconds of a video an answer rests on, as a picture and as numbers."""

from pathlib import Path
from typing import Annotated

import typer

from video_ma2mba.loading import check_loading

from .ask import relevance_progress
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
    TrustRemoteCode,
    check_out_file,
    check_video,
    chosen_frames,
)
from .run_facts import require_matplotlib
from .terminal import echo_json, given_text, note


def where(
    video: Annotated[str, typer.Argument(help="Video file, image, directory of images, or URL.", show_default=False)],
    question: Annotated[str, typer.Argument(help="What is asked about it.", show_default=False)],
    answer: Annotated[str | None, typer.Option(help="Explain this answer.", show_default="the model's own")] = None,
    out: Annotated[
        Path | None, typer.Option(help="PNG: frames that matter most, and curves.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all curves with times, as one JSON object.")] = False,
    json_file: Annotated[
        Path | None, typer.Option(help="JSON file: all curves with times.", show_default=False)
    ] = None,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="CSV file: one line a second.", show_default=False)
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Add the decay of every layer to the JSON.")] = False,
    steps: Annotated[int, typer.Option(help="Steps of integrated gradients; 0: gradient x input only.", min=0)] = 8,
    strip: Annotated[int, typer.Option(help="Frames in the picture.", min=1, max=12)] = 6,
    memory: Annotated[
        str | None, typer.Option(help="Memory for recomputation.", show_default="what a GPU has free; 2GB on a CPU")
    ] = None,
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
    """Show where in a video an answer comes from: attribution of the answer to frames, and decay of the state.

    Prints the answer, the second that speaks most for it, and, where the answer names a time, whether the two agree.
    """
    question, answer = given_text(question), None if answer is None else given_text(answer)
    if not question:
        raise ValueError("the question is empty: ask something about the video")
    if layers and json_file is None and not as_json:
        raise ValueError("--layers adds to the JSON: give --json, or name a file with --json-file")
    for option, path in {"--out": out, "--json-file": json_file, "--csv": csv_file}.items():
        check_out_file(option, path)
    if out is not None:
        if out.suffix.lower() != ".png":
            raise ValueError(f"--out {out}: the picture is a PNG, name a file that ends in .png")
        require_matplotlib("the picture")
    from video_ma2mba.modeling_video_ma2mba.state_header import is_state_file
    from video_ma2mba.processing.video_source_names import is_address, local_path, shown_name

    if not is_address(video) and is_state_file(local_path(video)):
        raise ValueError(
            f"{shown_name(video)} is a state file, which holds no frames to look at: name the video itself"
        )
    check_loading(model, device, dtype)
    chosen = chosen_frames(fps, num_frames, start, end, subtitles)
    check_video(video, chosen)
    pipe = load_pipeline(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    from video_ma2mba.explain import check_time, relevance

    settings = {"steps": steps, "memory": memory, "max_new_tokens": max_new_tokens, **chosen}
    with relevance_progress(shown_name(video)) as told:
        settings |= told
        found = relevance(pipe.model, pipe.processor, video, question, answer, **settings)
    if as_json:
        echo_json(found.as_dict(layers))
    else:
        typer.echo(found.answer)
    note(f"peak of {found.method.replace('_', ' ')}: {found.peak:.1f} s")
    if (check := check_time(found)) is not None:
        note(str(check))
    if json_file is not None:
        found.save_json(json_file, layers)
    if csv_file is not None:
        found.save_csv(csv_file)
    if out is not None:
        from video_ma2mba.explain.filmstrip import save_filmstrip

        sampled = {name: value for name, value in chosen.items() if name != "subtitles"}
        save_filmstrip(found, video, out, strip, pipe.processor.video_processor.sampling(**sampled))
