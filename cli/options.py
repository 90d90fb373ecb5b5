"""Options that several verbs share, declared once: same names, same meaning, same help."""

import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer


def time_option(text: str | float) -> float:
    """A time as it is given to a command: `90`, `1:30` or `0:01:30.5`, in seconds."""
    from video_ma2mba.processing.frame_sampling import seconds_of

    try:
        if (found := seconds_of(text, "time")) is not None:
            return found
    except ValueError:
        pass
    raise typer.BadParameter(f"{text!r} is no time: write seconds, m:ss or h:mm:ss")


def _pause_option(text: str | float) -> float:
    """A time of at least 0 seconds."""
    if not (found := time_option(text)) >= 0:
        raise typer.BadParameter(f"{text!r} is no time of at least 0 seconds")
    return found


TIME: dict[str, Any] = {"parser": time_option, "metavar": "TIME"}

Model = Annotated[str | None, typer.Option(help="Model directory or Hub id.", show_default="the bundled checkpoint")]
Fps = Annotated[float | None, typer.Option(help="Frames read per second of video.", show_default="1")]
NumFrames = Annotated[
    int | None, typer.Option(help="Read this many frames, evenly spread, instead.", show_default=False)
]
Start = Annotated[float | None, typer.Option(help="Begin here: seconds, m:ss or h:mm:ss.", show_default=False, **TIME)]
Subtitles = Annotated[
    str,
    typer.Option(
        help="auto (the video's text track, or a file beside it), a file (SRT, WebVTT, ASS, whisper's JSON), or off.",
        metavar="auto|FILE|off",
    ),
]
Times = Annotated[bool, typer.Option("--times", help="Answer with the seconds of the video that show it.")]
End = Annotated[float | None, typer.Option(help="Stop here: seconds, m:ss or h:mm:ss.", show_default=False, **TIME)]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)]
SaveEvery = Annotated[
    float, typer.Option(help="Time between saves of the unfinished state.", parser=_pause_option, metavar="TIME")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto (bf16 on CUDA, else fp32), fp32, fp16 or bf16.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run model code from the checkpoint.")]
StateDtype = Annotated[
    str, typer.Option(help="Of the file: float32 is exact; bfloat16 or float16 halve it, rounded.", metavar="TYPE")
]


def chosen_frames(
    fps: float | None, num_frames: int | None, start: float | None, end: float | None, subtitles: str = "off"
) -> dict[str, Any]:
    """The options about what is read of a video that were given, by name."""
    told = None if subtitles == "off" else subtitles
    given = {"fps": fps, "num_frames": num_frames, "start": start, "end": end, "subtitles": told}
    return {name: value for name, value in given.items() if value is not None}


def check_video(video: str, frames: dict[str, Any]) -> None:
    """Refuse a video that is not there, and frames that cannot be chosen, before anything is loaded.

    Args:
        frames: from `chosen_frames`.

    Raises:
        FileNotFoundError, ValueError: as when it is read.
    """
    from video_ma2mba.processing.video_source_names import (
        IMAGE_SUFFIXES,
        check_source,
        is_address,
        local_path,
        shown_name,
    )

    check_source(video)
    check_frames(frames)
    if is_address(video) or local_path(video).is_dir() or local_path(video).suffix.lower() in IMAGE_SUFFIXES:
        return
    from video_ma2mba.processing.video_decoding import open_stream

    with open_stream(local_path(video), shown_name(video)):
        pass


def check_frames(frames: dict[str, Any]) -> None:
    """Refuse frames, from `chosen_frames`, that cannot be chosen of any video. ValueError, FileNotFoundError."""
    sampled = {name: value for name, value in frames.items() if name != "subtitles"}
    if sampled:
        from video_ma2mba.processing.frame_sampling import Sampling

        Sampling(**sampled)
    if frames.get("subtitles", "auto") != "auto":
        from video_ma2mba.processing.video_subtitles import read_subtitles

        read_subtitles(frames["subtitles"])


def check_path_or_id(text: str, missing: str) -> None:
    """FileNotFoundError with the words `missing`, unless a path exists, or could be a Hub id (`owner/name`)."""
    from video_ma2mba.processing.video_source_names import local_path

    if not os.path.exists(local_path(text)) and not re.fullmatch(r"[\w-][\w.-]*/[\w.:-]+", text):
        raise FileNotFoundError(missing)


def check_training_data(source: str) -> None:
    """Refuse what can be no training data before anything is loaded that takes seconds.

    Raises:
        FileNotFoundError: no such file or folder, and no Hub id. ValueError: a file of another kind.
    """
    from video_ma2mba.processing.video_source_names import local_path, shown_name
    from video_ma2mba.trainer.setting_names import check_data_file

    check_path_or_id(source, f"{source}: no such file or folder (and it is no data set id such as owner/name)")
    if local_path(source).is_file():
        check_data_file(local_path(source), shown_name(source))


def check_out_file(option: str, path: Path | None) -> None:
    """Refuse a file that could not be written; None is no file. Of a symbolic link, its target is meant.

    Raises:
        FileNotFoundError: its folder does not exist. ValueError: it is a folder. PermissionError: its folder, or the
            file itself, is not writable.
    """
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder: name a file")
    if os.path.exists(path) and not path.is_file():  # a device or a pipe
        if not os.access(path, os.W_OK):
            raise PermissionError(f"{option} {path}: writing there is not permitted")
        return
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{option} {path}: there is no folder {str(path.parent)!r}")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise PermissionError(f"{option} {path}: writing there is not permitted")
