"""`video-ma2mba world`: videos with questions and answers, made from a seed."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="The rendered world: videos with questions and answers, made from a seed.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def world() -> None:
    """The rendered world: videos with questions and answers, made from a seed."""


@app.command()
def render(
    out: Annotated[Path, typer.Option(help="Folder to write to; an interrupted rendering is completed.")],
    count: Annotated[int, typer.Option(help="Number of videos.", min=1)],
    kinds: Annotated[
        str, typer.Option(help="Kinds of question, separated by commas: colour, shape, count, … (default: all).")
    ] = "",
    frames: Annotated[str, typer.Option(help="Shortest..longest video in frames.")] = "8..64",
    seed: Annotated[int, typer.Option(help="Another seed gives other videos.", min=0)] = 0,
    size: Annotated[int, typer.Option(help="Width and height in pixels.")] = 64,
    fps: Annotated[float, typer.Option(help="Frames per second of the files.")] = 1.0,
    split: Annotated[str, typer.Option(help="train, validation or test; no video is in two of them.")] = "test",
    rename: Annotated[
        str, typer.Option(help="Other words in questions and answers, as 'the card=the poster': something to teach.")
    ] = "",
) -> None:
    """Write mp4 files and questions.jsonl (one object a line: video, kind, question, options, answer, frames)."""
    from video_ma2mba.world import KINDS, check_kinds, parse_frames
    from video_ma2mba.world.video_files import render_to_folder

    chosen = check_kinds(kind.strip() for kind in kinds.split(",")) if kinds else KINDS
    words = _renamed(rename)
    target = render_to_folder(out, count, chosen, parse_frames(frames), seed, size, split, fps=fps, rename=words)
    typer.echo(f"{count} videos and their questions: {target}")


def _renamed(text: str) -> dict[str, str]:
    """Words and what stands for them, from `red=crimson,the card=the poster`."""
    words = dict(part.strip().partition("=")[::2] for part in text.split(",") if part.strip())
    if not all(old and new for old, new in words.items()):
        raise ValueError(
            f"--rename {text}: write words=other words, separated by commas, as in red=crimson,blue=azure"
        )
    return words


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `render` wrote.", show_default=False)],
    license_name: Annotated[str, typer.Option("--license", help="Such as apache-2.0.", show_default=False)],
) -> None:
    """Write DIR/README.md, a data set card for the Hub, with chance levels computed from the folder's questions."""
    from video_ma2mba.hub_cards.dataset_card import dataset_card

    target = folder / "README.md"
    text = dataset_card(folder, license=license_name)
    if target.exists():
        raise ValueError(f"{target} exists: remove it to have it written anew")
    target.write_text(text, encoding="utf-8")
    typer.echo(f"{target}")
