"""`video-ma2mba convert`: released checkpoints into this package's layout, and back."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from .loading import while_loading
from .options import check_path_or_id
from .terminal import note, warn

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def convert(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Directory, Hub id or single file; several if each holds a part (language model, tower, projector).",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory to write; it must be empty or new.", show_default=False)],
    to: Annotated[
        str, typer.Option(help="Layout to write: ours, or official (of the released checkpoints).")
    ] = "ours",
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer: directory or Hub id.", show_default="the language model's")
    ] = None,
    vision_config: Annotated[
        str | None, typer.Option(help="Where the tower's config.json is, if SOURCE has none: directory or Hub id.")
    ] = None,
    leave_out: Annotated[
        list[str] | None, typer.Option(help="Pattern of unknown tensors that may be dropped; may be repeated.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file to write, such as 500MB.")] = "5GB",
    num_frames: Annotated[
        int | None, typer.Option(help="VideoMamba: frames of a clip, if others than the file's.", min=1)
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="VideoMamba: side of frames, if another.", min=1)] = None,
    tubelet: Annotated[int, typer.Option(help="VideoMamba: frames a token spans, of an image model.", min=1)] = 1,
    inflate: Annotated[
        str, typer.Option(help="VideoMamba: an image model's kernel in time: center or mean.")
    ] = "center",
    labels: Annotated[
        Path | None, typer.Option(help="VideoMamba: file with the names of the classes, a line each, or JSON.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list every tensor; write nothing.")] = False,
) -> None:
    """Convert a checkpoint to this package's layout, or back. Refuses what would not make up a whole model.

    Prints what became of every tensor with --dry-run; otherwise that list is in conversion.json of the result.
    """
    size = re.fullmatch(r"(\d+)\s*(KB|MB|GB)?", max_shard_size.upper())
    if size is None or int(size[1]) == 0:
        raise ValueError(f"--max-shard-size {max_shard_size} is no size: write 500MB or 5GB")

    if to not in ("ours", "official"):
        raise ValueError(f"--to {to} is no layout: use ours or official")
    for source in sources:
        if not source.endswith(".pth"):
            check_path_or_id(source, f"there is no directory {source} (and it is no Hub id such as owner/name)")
        elif not Path(source).expanduser().is_file() and (source.startswith((".", "/")) or source.count("/") < 2):
            raise FileNotFoundError(f"{source}: no such file (and no file of the Hub such as owner/name/file.pth)")
    for source in (tokenizer, vision_config):
        if source is not None:
            check_path_or_id(source, f"there is no directory {source} (and it is no Hub id such as owner/name)")
    single = out.suffix == ".pth" and to == "official"
    if not dry_run and out.exists() and (single or not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists{'' if single else ' and is not an empty directory'}: choose another")
    for source in sources:
        folder = Path(source).expanduser()
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{source} holds no config.json: it is not a checkpoint")
        if to == "official" and source.endswith(".pth"):
            raise ValueError(f"{source} has the official layout already: --to official is for directories of ours")
        if folder.is_dir() and len(sources) == 1 and not single:
            kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
            if str(kind).startswith("videomamba"):
                raise ValueError(f"{source} is a VideoMamba of ours; back goes --to official --out FILE.pth")
    with while_loading():
        from video_ma2mba.conversion.convert_checkpoint import convert_checkpoint
        from video_ma2mba.conversion.report import ConversionError
        from video_ma2mba.conversion.videomamba_checkpoint import convert_videomamba, restore_videomamba

    if to == "official" and out.suffix == ".pth" and len(sources) == 1:
        note(f"{restore_videomamba(Path(sources[0]), out)} tensors")
        typer.echo(f"{out}")
        return
    videomamba = len(sources) == 1 and sources[0].endswith(".pth")
    if not videomamba and (num_frames or image_size or labels):
        raise ValueError("--num-frames, --image-size and --labels are for a single VideoMamba file (.pth)")
    try:
        if videomamba:
            report = convert_videomamba(
                sources[0],
                out,
                num_frames=num_frames,
                image_size=image_size,
                tubelet_size=tubelet,
                inflate=inflate,
                labels=labels,
                leave_out=leave_out or (),
                dry_run=dry_run,
            )
        else:
            report = convert_checkpoint(
                sources,
                out,
                to=to,
                tokenizer=tokenizer,
                vision_config=vision_config,
                leave_out=leave_out or (),
                max_shard_bytes=int(size[1]) * _UNITS[size[2] or ""],
                dry_run=dry_run,
            )
    except ConversionError as error:
        for kind, items in error.problems.items():
            for item in items:
                warn(f"{kind}: {item}")
        raise
    if dry_run:
        for row in report.rows:
            typer.echo(f"{row}")
    for source, layout in zip(report.sources, report.layouts, strict=True):
        note(f"{source}: {layout}")
    note(f"{report}")
    if not dry_run:
        typer.echo(f"{out}")
