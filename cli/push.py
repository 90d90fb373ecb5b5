"""`video-ma2mba push`: a checkpoint to the Hub, with code and card, tried out before."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from .options import TrustRemoteCode
from .terminal import note


def push(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Saved model with its processor, or a LoRA adapter.", show_default=False),
    ],
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME", help="Repository on the Hub.", show_default=False)],
    space: Annotated[
        bool, typer.Option("--space", help="Publish the demo page with this checkpoint in it, as a Space.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write and try the exact folder, upload nothing; needs no network.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Where --dry-run writes the folder.", show_default="hub/USER/NAME")
    ] = None,
    license_name: Annotated[
        str | None, typer.Option("--license", help="Such as apache-2.0.", show_default="that of DIR/README.md")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id this was made from.", show_default="that of DIR/README.md")
    ] = None,
    card_results: Annotated[
        list[Path] | None,
        typer.Option(
            help="For the card: folder of `eval`, or CSV of world.accuracy; may be repeated.", show_default=False
        ),
    ] = None,
    card_measured_on: Annotated[
        str | None, typer.Option(help='What measured the CSV, such as "H200, bf16, 2026-11-21".', show_default=False)
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Publish a checkpoint in one commit: weights, configuration, processor, code, and a card made from its data.

    Before that, a clean process without this package loads the folder and answers a question about a small video.
    """
    if out is not None and not dry_run:
        raise ValueError("--out is where --dry-run writes: add --dry-run, or leave --out away")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no directory: name the one that save_pretrained wrote")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise FileNotFoundError(f"{folder} holds neither config.json nor adapter_config.json: it is not a saved model")
    from huggingface_hub import HfApi

    from video_ma2mba.hub_cards.checkpoint_facts import read_facts
    from video_ma2mba.hub_cards.hub_folder import CHECKPOINT, holds_only_our_code, write_hub_folder, write_space_folder
    from video_ma2mba.hub_cards.preflight import ask_remote_code, refuse_secrets, refuse_wrong_sizes
    from video_ma2mba.hub_cards.upload import check_login, check_repo_id, upload

    from .ask import size_text

    check_repo_id(repo_id)
    api = HfApi()
    if not dry_run:
        check_login(api)
    adapter = read_facts(folder).adapter
    base = adapter["base_model_name_or_path"] if adapter else None
    if base and not trust_remote_code and not holds_only_our_code(Path(base)):
        raise ValueError(f"trying the adapter runs the code of {base}: read it, then add --trust-remote-code")
    with _new_folder((out or Path("hub", repo_id)) if dry_run else None) as target:
        card = {
            "license": license_name,
            "base_model": base_model,
            "results": card_results or (),
            "measured_on": card_measured_on,
        }
        if space:
            left_out, _ = write_space_folder(folder, target, **card)
            model, tag = target / CHECKPOINT, None
        else:
            left_out, tag = write_hub_folder(folder, target, repo_id, **card)
            model = target
        refuse_wrong_sizes(target)
        refuse_secrets(target)
        note("trying the folder in a process without this package …")
        # an adapter is tried on the base model that it was trained on, which may be a folder of this machine
        answer = ask_remote_code(model, base)
        note(f"it answers: {answer!r}")
        if left_out:
            note(f"left out: {', '.join(left_out)}")
        if dry_run:
            for path in sorted(path for path in target.rglob("*") if path.is_file()):
                typer.echo(f"{size_text(path.stat().st_size):>10}  {path.relative_to(target).as_posix()}")
            note(f"nothing was uploaded; the folder is {target}")
            return
        commit = upload(target, repo_id, tag=tag, private=private, space=space, api=api)
    typer.echo(f"{commit.commit_url}")
    if tag is not None:
        note(f'pinned: revision="{tag}", the tag on the card; or revision="{commit.oid}"')


@contextmanager
def _new_folder(wanted: Path | None) -> Iterator[Path]:
    """The folder to write: `wanted`, taken away again if anything goes wrong, or (None) one for the time being."""
    if wanted is None:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch) / "checkpoint"
        return
    if wanted.exists() and (not wanted.is_dir() or any(wanted.iterdir())):
        raise ValueError(f"{wanted} exists and is not an empty directory: choose another with --out")
    try:
        yield wanted
    except BaseException:
        shutil.rmtree(wanted, ignore_errors=True)
        raise
