"""`video-ma2mba retrieve`: videos that texts describe, captions that videos deserve, and how often that is right."""

import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from video_ma2mba.loading import check_loading, pick_device, pick_dtype

from .errors import is_expected, tell_failed
from .loading import while_loading
from .options import Device, Dtype, TrustRemoteCode, check_out_file, check_path_or_id
from .terminal import echo_json, note

_SEARCHED, _MEASURED = 16, 128  # candidates that are ranked again


def retrieve(
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help="What to look for.", show_default=False)
    ] = None,
    videos: Annotated[
        Path | None,
        typer.Option(
            help="Folder of videos, with all folders in it, or one video.", show_default="what --index holds"
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="Directory or Hub id of a retrieval model.", show_default=False)] = "",
    index: Annotated[
        Path | None,
        typer.Option(
            help="File that keeps what was read of the videos.",
            show_default="retrieval.safetensors in DIR; with LIST named after it",
        ),
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(
            help="The other way: the best of these captions, one a line, for each video.", show_default=False
        ),
    ] = None,
    recall: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Measure recall both ways on a list of videos with captions (ActivityNet, DiDeMo, MSRVTT, LSMDC, "
            "MSVD and others); --videos is where the files are.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Of LIST: train, val or test.")] = "test",
    paragraphs: Annotated[
        bool, typer.Option("--paragraphs", help="Several captions of a video in LIST are one text.")
    ] = False,
    top: Annotated[int, typer.Option(help="Best ones to name.", min=1)] = 5,
    rerank: Annotated[
        int | None,
        typer.Option(
            help="Best ones to compare again by the matching head; 0 is none.", min=0, show_default="16; of LIST 128"
        ),
    ] = None,
    max_text_length: Annotated[
        int | None, typer.Option(help="Tokens of a text that are read.", min=3, show_default="the model's")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per text (or video) and line.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Find videos by what they show: the likeliest first, with their similarity and the probability of a match.

    Videos are read once, into --index; files that are new, changed or gone are noticed. Interrupted, the same command
    goes on. Videos that cannot be read stop nothing, and the exit code is 1.
    """
    texts = [text for text in texts or [] if text.strip()]
    if sum((bool(texts), captions is not None, recall is not None)) != 1:
        raise ValueError("give a TEXT to look for, or --captions FILE, or --recall LIST: one of them")
    if not model:
        raise ValueError("--model is missing: name a retrieval model, such as one that `train` made")
    check_loading(model, device, dtype, kind="videomamba_retrieval")
    if videos is not None and not videos.exists():
        raise FileNotFoundError(f"--videos {videos}: no such file or folder")
    if recall is not None:
        check_path_or_id(recall, f"--recall {recall}: no such file or folder (and it is no data set id)")
    lines = [] if captions is None else _lines(captions)
    with ExitStack() as stack:
        index = _index_file(videos, index, recall, stack)
        rows, clips = _wanted(videos, recall, split, paragraphs)
        with while_loading():
            from video_ma2mba.retrieval.loading import load_retriever
        picked = pick_device(device)
        retriever, decode, maker = load_retriever(
            model, picked, pick_dtype(dtype, picked), trust_remote_code, max_text_length
        )
        opened, failed = _up_to_date(index, maker, clips, retriever, decode, as_json)
        depth = rerank if rerank is not None else (_SEARCHED if recall is None else _MEASURED)
        if recall is not None:
            _measure(rows, opened, retriever, depth, as_json)
        elif captions is not None:
            _tell_captions(lines, opened, retriever, depth, top, as_json)
        else:
            _tell_videos(texts, opened, retriever, depth, top, as_json)
    if failed:
        note(f"{failed} of {failed + len(opened)} videos could not be read")
        raise typer.Exit(1)


def _index_file(videos: Path | None, index: Path | None, recall: str | None, stack: ExitStack) -> Path:
    """Where the index is; of one video it is made anew. ValueError, FileNotFoundError: there is no way to know."""
    if index is None and recall is not None:
        place = Path(recall)
        folder = videos if videos is not None else place if place.is_dir() else place.parent
        index = folder / f"{place.stem}.retrieval.safetensors"
    elif index is None and videos is None:
        raise ValueError("--videos is missing: name a folder of videos, or an --index that was made of one")
    elif index is None and videos is not None:
        folder = videos if videos.is_dir() else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        index = folder / "retrieval.safetensors"
    assert index is not None
    if videos is None and recall is None and not index.is_file():
        raise FileNotFoundError(f"--index {index}: there is no such file, and no --videos to make it of")
    check_out_file("--index", index)
    return index


def _lines(path: Path) -> list[str]:
    from video_ma2mba.files.text_files import check_text, text_lines

    if not path.is_file():
        raise FileNotFoundError(f"--captions {path}: no such file")
    found = list(dict.fromkeys(line.strip() for line in text_lines(path) if line.strip()))
    if not found:
        raise ValueError(f"--captions {path} holds no captions: write one a line")
    for line in found:
        check_text(line)
    return found


def _wanted(
    videos: Path | None, recall: str | None, split: str, paragraphs: bool
) -> tuple[list[Any], list[Any] | None]:
    """Rows of a list, or none; clips that the index shall hold, or None for what it holds."""
    if recall is not None:
        from video_ma2mba.trainer.videomamba.caption_rows import load_caption_rows

        rows = load_caption_rows(recall, base_dir=videos, split=split, paragraphs=paragraphs)
        return rows, [_clip(row.clip.source, row.clip.start, row.clip.end) for row in rows]
    if videos is None:
        return [], None
    from .ask_words import VIDEO_SUFFIXES

    files = [videos]
    if videos.is_dir():
        files = sorted(
            path for path in videos.rglob("*")
            if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file() and path.name[0] != "."
        )  # fmt: skip
    if not files:
        raise FileNotFoundError(f"--videos {videos}: there is no video ({', '.join(sorted(VIDEO_SUFFIXES))})")
    return [], [_clip(file) for file in files]


def _clip(source: Any, start: float | None = None, end: float | None = None) -> Any:
    from video_ma2mba.retrieval.index import Clip

    if not isinstance(source, str | os.PathLike):
        raise ValueError("--recall needs a list that names files, not a data set that holds them")
    try:
        return Clip.of(source, start, end)
    except OSError:
        return Clip(os.path.abspath(source), start, end)  # reading it tells what is wrong


def _up_to_date(
    index: Path, maker: Any, clips: list[Any] | None, retriever: Any, decode: Any, as_json: bool
) -> tuple[Any, int]:
    """The index, after reading what is new, and how many videos could not be read."""
    from video_ma2mba.files.progress import progress
    from video_ma2mba.retrieval.index import VideoIndex, update_index

    if clips is None:
        return VideoIndex(index, maker), 0
    try:
        with progress("reading", "videos", len(clips), at_once=False) as tell:
            found = update_index(index, maker, clips, decode=decode, encode=retriever.clips, tell=tell)
    except KeyboardInterrupt:
        note(f"interrupted: the same command continues from {index}.parts")
        raise
    for clip, error in found.failed:
        if not is_expected(error):
            raise error
        tell_failed(clip.part, error, as_json)
    if (found.read or found.gone) and len(clips) > 1:
        note(f"{index}: {found.read} videos read, {found.kept} as before, {found.gone} gone")
    return found.index, len(found.failed)


def _tell_videos(texts: Sequence[str], index: Any, retriever: Any, depth: int, top: int, as_json: bool) -> None:
    from video_ma2mba.retrieval.search import match_probability

    scores = retriever.texts(texts) @ index.vectors.T
    order = retriever.reranked(texts, scores, index.tokens, depth, match_probability) if depth else scores
    for row, text in enumerate(texts):
        found = [
            _named(index.clips[place]) | _scores(scores[row, place], order[row, place])
            for place in order[row].topk(min(top, len(index))).indices.tolist()
        ]
        if as_json:
            echo_json({"text": text, "videos": found})
            continue
        if len(texts) > 1:
            typer.echo(text)
        for entry in found:
            typer.echo(_line(entry, entry["video"] + _part(entry)))


def _tell_captions(captions: list[str], index: Any, retriever: Any, depth: int, top: int, as_json: bool) -> None:
    from video_ma2mba.retrieval.search import match_probability

    scores = order = retriever.texts(captions) @ index.vectors.T
    if depth:
        order = retriever.reranked_back(captions, scores, index.tokens, depth, match_probability)
    for column, clip in enumerate(index.clips):
        found = [
            {"caption": captions[number]} | _scores(scores[number, column], order[number, column])
            for number in order[:, column].topk(min(top, len(captions))).indices.tolist()
        ]
        named = _named(clip)
        if as_json:
            echo_json(named | {"captions": found})
            continue
        if len(index) > 1:
            typer.echo(named["video"] + _part(named))
        for entry in found:
            typer.echo(_line(entry, entry["caption"]))


def _scores(similarity: Any, order: Any) -> dict[str, float]:
    """What is told of a pair: how similar both are, and how probably they match where that was compared."""
    from video_ma2mba.retrieval.search import RERANKED

    told = {"similarity": round(float(similarity), 4)}
    return told | ({"match": round(float(order) - RERANKED, 4)} if float(order) > RERANKED / 2 else {})


def _measure(rows: list[Any], index: Any, retriever: Any, depth: int, as_json: bool) -> None:
    """Recall of the rows whose video could be read, by the dual encoder and re-ranked."""
    import torch

    from video_ma2mba.files.progress import progress
    from video_ma2mba.retrieval.recall import recall_both_ways

    numbers = {(clip.file, clip.start, clip.end): number for number, clip in enumerate(index.clips)}
    texts, owners, places = [], [], []
    for row in rows:
        number = numbers.get((os.path.abspath(row.clip.source), row.clip.start, row.clip.end))
        if number is not None:
            texts += row.captions
            owners += [len(places)] * len(row.captions)
            places.append(number)
    right = torch.zeros(len(texts), len(places), dtype=torch.bool)
    right[torch.arange(len(texts)), torch.tensor(owners)] = True
    scores = retriever.texts(texts) @ index.vectors[places].T
    found = {"dual encoder": recall_both_ways(scores, right)}
    if depth:

        def tokens(place: int) -> Any:
            return index.tokens(places[place])

        with progress("comparing again", "texts and videos", len(texts) + len(places)) as tell:
            again = retriever.reranked(texts, scores, tokens, depth, tell=tell)
            back = retriever.reranked_back(texts, scores, tokens, depth, tell=lambda done: tell(len(texts) + done))
        found[f"best {depth} re-ranked"] = recall_both_ways(again, right, back)
    if as_json:
        echo_json({"texts": len(texts), "videos": len(places), "recall": found})
        return
    typer.echo(f"{len(texts)} texts, {len(places)} videos")
    for name, each in found.items():
        for way, said in (("t2v", "videos by texts"), ("v2t", "texts by videos")):
            shares = ", ".join(f"R@{k} {each[f'{way}_r{k}']:.1%}" for k in (1, 5, 10))
            typer.echo(f"{said}, {name}: {shares}, median rank {each[f'{way}_median_rank']:g}")


def _named(clip: Any) -> dict[str, Any]:
    """A clip for people and programs: its file as seen from here."""
    near = os.path.relpath(clip.file)
    part = {name: getattr(clip, name) for name in ("start", "end") if getattr(clip, name) is not None}
    return {"video": clip.file if near.startswith("..") else near, **part}


def _part(entry: dict[str, Any]) -> str:
    return f" from {entry['start']:g} s" if entry.get("start") else ""


def _line(entry: dict[str, Any], name: str) -> str:
    match = f"{entry['match']:7.1%}" if "match" in entry else "      -"
    return f"{match}  {entry['similarity']:.4f}  {name}"
