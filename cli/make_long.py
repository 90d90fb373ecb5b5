"""`video-ma2mba data make-long`: instruction data about long videos, as LongVILA makes it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from video_ma2mba.loading import check_loading
from video_ma2mba.processing.video_source_names import shown_name

from .ask_words import split_words
from .options import TIME, Device, Dtype, TrustRemoteCode
from .terminal import note

TRUTH = "truth"


def make_long(
    videos: Annotated[list[str], typer.Argument(help="Videos, and folders of videos.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for the data; one that was begun is completed.")],
    captioner: Annotated[
        str, typer.Option(help="Who describes clips: a model directory, an address http://HOST:PORT/v1, or truth.")
    ],
    writer: Annotated[
        str, typer.Option(help="Who writes the summary and the questions: the same choice, of language models too.")
    ],
    clip: Annotated[float, typer.Option(help="Length of a clip, about.", **TIME)] = 10.0,
    kinds: Annotated[
        str | None, typer.Option(help="Kinds of questions, one of each a video.", show_default="all seven")
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="Key for an address.", show_default="none")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Cut long videos into clips, caption each, and write a summary and a question of each kind about the whole.

    An address is that of any server of OpenAI's API (http://HOST:PORT/v1#MODEL where it has several). "truth" knows
    what videos of `world render` show. Interrupted, the same command goes on. Ends with exit code 1 where a video
    could not be read; captions and questions that are of no use are in refused.jsonl.
    """
    from video_ma2mba.files.progress import progress
    from video_ma2mba.trainer.data.long_models import is_endpoint
    from video_ma2mba.trainer.data.long_videos import LONGVILA, OURS, QUESTION_KINDS, LongSettings, LongVideos

    places = [Path(video) for video in split_words(videos, [])[0]]
    chosen = QUESTION_KINDS if kinds is None else dict.fromkeys(kind.strip() for kind in kinds.split(","))
    settings = LongSettings(_public(captioner), _public(writer), clip, tuple(chosen))
    for name in (captioner, writer):
        if name != TRUTH and not is_endpoint(name):
            check_loading(name, device, dtype)
    data = LongVideos(out, settings)
    try:
        describe, write = _models(captioner, writer, api_key_file, device, dtype, trust_remote_code)
        counts: Counter[str] = Counter()
        with progress("making", "captions and questions", sum(map(data.units, places))) as tell:
            for place in places:
                for unit in data.make(place, describe, write):
                    counts["done"] += 1
                    if unit.what == "video":
                        counts["unread"] += 1
                        note(unit.refused)
                    counts["refused"] += bool(unit.refused)
                    tell(counts["done"], remark=f"{counts['refused']} refused" if counts["refused"] else "")
        rows, refused = data.write(places)
    except KeyboardInterrupt:
        note(f"interrupted: the same command goes on in {out}")
        raise
    finally:
        data.close()
    note(f"{out / OURS} and {LONGVILA}: {rows} rows about {len(places) - counts['unread']} videos, {refused} refused")
    if counts["unread"] or not rows:
        raise typer.Exit(1)


def _public(name: str) -> str:
    """A model's name for the rows: of an address, without passwords."""
    address, mark, model = name.partition("#")
    return shown_name(address) + mark + model


def _models(
    captioner: str, writer: str, key_file: Path | None, device: str, dtype: str, trust_remote_code: bool
) -> tuple[Any, Any]:
    """The captioner and the writer that are named; one checkpoint that is both is loaded once."""
    from video_ma2mba.trainer.data.long_models import (
        Endpoint,
        LocalCaptioner,
        LocalWriter,
        blind_generator,
        is_endpoint,
        text_generator,
    )
    from video_ma2mba.world.long_truth import WorldTruth

    key = None
    if key_file is not None:
        from video_ma2mba.serving.settings import read_keys

        key = read_keys(key_file)[0]
    truth, pipe = WorldTruth(), None
    if captioner == TRUTH:
        describe: Any = truth.caption
    elif is_endpoint(captioner):
        describe = Endpoint(captioner, key).caption
    else:
        from .loading import load_pipeline

        pipe = load_pipeline(captioner, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        describe = LocalCaptioner(pipe)
    if writer == TRUTH:
        return describe, truth.write
    if is_endpoint(writer):
        return describe, Endpoint(writer, key).write
    if pipe is not None and writer == captioner:
        return describe, LocalWriter(blind_generator(pipe.model, pipe.processor))
    from video_ma2mba.loading import pick_device, pick_dtype, resolve_model

    place = pick_device(device)
    generate = text_generator(resolve_model(writer), place, pick_dtype(dtype, place), trust_remote_code)
    return describe, LocalWriter(generate)
