"""`video-ma2mba classify`: what a VideoMamba classifier says that videos show."""

from typing import Annotated

import typer

from video_ma2mba.loading import BUNDLED_CLASSIFIER, check_loading, load_classifier
from video_ma2mba.processing.video_source_names import shown_name

from .errors import is_expected, tell_failed
from .loading import while_loading
from .options import Device, Dtype, TrustRemoteCode, check_video
from .terminal import echo_json, note, printable, warn


def classify(
    videos: Annotated[
        list[str], typer.Argument(help="Video files, images, directories of images or URLs.", show_default=False)
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Directory or Hub id of a VideoMamba classifier.", show_default="the bundled one, of rendered videos"
        ),
    ] = None,
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
    """Name the most probable classes of videos: one line a class with its probability, best first.

    Of several videos, those that cannot be read stop nothing, and the exit code is 1.
    """
    check_loading(str(BUNDLED_CLASSIFIER) if model is None else model, device, dtype, kind="videomamba")
    several, failed = len(videos) > 1, 0
    if not several:
        check_video(videos[0], {})
    with while_loading():
        classifier = load_classifier(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    if model is None:
        warn("note: the bundled classifier knows clips of the rendered world; of other videos it knows nothing")
    for video in videos:
        name = printable(shown_name(video))
        try:
            if several:
                check_video(video, {})
            found = classifier(video, top=top, num_segments=segments, num_crops=crops)
        except Exception as error:
            if not several or not is_expected(error):
                raise
            failed += 1
            tell_failed(name, error, as_json)
            continue
        if as_json:
            echo_json({"video": name, "classes": found})
            continue
        if several:
            typer.echo(name)
        for entry in found:
            typer.echo(f"{entry['score']:.4f}  {entry['label']}")
    if failed:
        note(f"{len(videos) - failed} of {len(videos)} videos classified, {failed} failed")
        raise typer.Exit(1)
