"""`video-ma2mba classify`: what a VideoMamba classifier says that videos show."""

import json
from typing import Annotated

import typer

from video_ma2mba.loading import check_loading, load_classifier

from .loading import while_loading
from .options import Device, Dtype, TrustRemoteCode, check_video


def classify(
    videos: Annotated[
        list[str], typer.Argument(help="Video files, images, directories of images or URLs.", show_default=False)
    ],
    model: Annotated[str, typer.Option(help="Directory or Hub id of a VideoMamba classifier.", show_default=False)],
    top: Annotated[int, typer.Option(help="Classes to name for each video.", min=1)] = 5,
    segments: Annotated[
        int, typer.Option(help="Clips of a video, spread over it; their votes are averaged.", min=1)
    ] = 1,
    crops: Annotated[int, typer.Option(help="Crops of a clip along its longer side; averaged, too.", min=1)] = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per video and line.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Name the most probable classes of videos: one line a class with its probability, best first."""
    check_loading(model, device, dtype)
    for video in videos:
        check_video(video, {})
    with while_loading():
        classifier = load_classifier(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    for video in videos:
        found = classifier(video, top=top, num_segments=segments, num_crops=crops)
        if as_json:
            typer.echo(json.dumps({"video": video, "classes": found}, ensure_ascii=False))
            continue
        if len(videos) > 1:
            typer.echo(video)
        for entry in found:
            typer.echo(f"{entry['score']:.4f}  {entry['label']}")
