"""`video-ma2mba init`: compose a fresh, untrained model from a language model and a vision tower."""

import re
from pathlib import Path
from typing import Annotated

import typer

from video_ma2mba.loading import check_loading

from .loading import while_loading
from .options import check_path_or_id


def init(
    out: Annotated[Path, typer.Option(help="Directory to write; it must be empty or new.", show_default=False)],
    language_model: Annotated[
        str | None,
        typer.Option(help="Mamba-2 checkpoint (transformers' or state-spaces' layout): directory or Hub id."),
    ] = None,
    vision_tower: Annotated[
        str | None,
        typer.Option(
            help="Vision tower: directory or Hub id of a CLIP, SigLIP or VideoMamba, or videomamba-{ti,s,m,b} (fresh)."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer: directory or Hub id.", show_default="the language model's")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="The paper's sizes with CLIP-L/14-336, random weights: 370m, 1.3b or 2.7b.")
    ] = None,
    config_only: Annotated[bool, typer.Option("--config-only", help="Write config.json only, no weights.")] = False,
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "bf16",
    seed: Annotated[int, typer.Option(help="Seed of everything that starts random.")] = 0,
) -> None:
    """Compose a model to train: its projector is new, and so is all that no checkpoint was named for."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists and is not an empty directory: choose another")
    from video_ma2mba.conversion.presets import check_parts

    check_parts(language_model, vision_tower, preset)
    check_loading(None, dtype=dtype)
    for source in (language_model, vision_tower, tokenizer):
        if source is not None and source.endswith(".pth") and Path(source).is_file():
            raise ValueError(f"{source} is a file: video-ma2mba convert {source} --out DIR makes a directory of it")
        if source is not None and not re.fullmatch(r"videomamba-\w+", source):
            check_path_or_id(source, f"there is no directory {source} (and it is no Hub id such as owner/name)")
    with while_loading():
        import torch

        from video_ma2mba.conversion.compose import compose
    from video_ma2mba.loading import pick_dtype

    written = compose(
        language_model=language_model,
        vision_tower=vision_tower,
        tokenizer=tokenizer,
        preset=preset,
        out=out,
        dtype=pick_dtype(dtype, torch.device("cpu")),
        config_only=config_only,
        seed=seed,
    )
    typer.echo(f"{written}")
