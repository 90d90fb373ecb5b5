"""The command's front door: mounts the verbs and turns expected errors into one line.

Verb files import torch, transformers and the like inside their functions, so that `--help` answers at once.
"""

import atexit
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from .ask import AskCommand, ask
from .batch import BatchCommand, batch
from .classify import classify
from .convert import convert
from .data import app as data
from .defaults import FILE_VARIABLE, config_file, take_file, take_quiet, take_verbose
from .demo import demo
from .describe import describe
from .errors import OneLineErrors
from .eval import evaluate
from .init import init
from .niah import niah
from .pipeline import pipeline
from .plan import plan
from .push import push
from .retrieve import retrieve
from .serve import serve
from .state import app as state
from .state import read
from .train import train
from .watch import watch
from .where import where
from .world import app as world

app = typer.Typer(
    cls=OneLineErrors,
    name="video-ma2mba",
    help="Ask questions about videos of any length; compose and plan models that do.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command(cls=AskCommand)(ask)
app.command(cls=BatchCommand)(batch)
app.command()(classify)
app.command()(convert)
app.command()(demo)
app.command()(describe)
app.command("eval")(evaluate)
app.command()(init)
app.command()(niah)
app.command()(pipeline)
app.command()(plan)
app.command()(push)
app.command()(read)
app.command()(retrieve)
app.command()(serve)
app.command()(train)
app.command()(watch)
app.command()(where)
app.add_typer(data, name="data")
app.add_typer(state, name="state")
app.add_typer(world, name="world")


def _print_version(wanted: bool) -> None:
    if wanted:
        from video_ma2mba import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of every error.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", callback=take_quiet, help="No progress, no figures: errors and results.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", callback=take_verbose, help="Say what is done, and what it takes.")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config-file",
            envvar=FILE_VARIABLE,
            callback=take_file,
            is_eager=True,
            exists=True,
            dir_okay=False,
            help="Defaults of options, as TOML.",
            show_default=str(config_file()),
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Ask questions about videos of any length; compose and plan models that do."""


def main() -> None:
    """Entry point of the console script and of `python -m video_ma2mba`."""
    # Read when torch loads: threads that wait by spinning made a busy machine 40 times slower, sleeping ones do not.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    ended: list[object] = []
    atexit.register(_leave, ended)  # the first to be registered is the last to be called
    try:
        app()
    except SystemExit as error:
        ended.append(error.code)
        raise


def _leave(ended: list[object]) -> None:
    """End the process, where a command has ended it, without taking torch and transformers apart piece by piece."""
    failed_later = getattr(sys, "last_value", None) is not None  # in a program that went on after the command
    if "torch" not in sys.modules or failed_later or not ended or not isinstance(ended[0], int | None):
        return
    code = ended[0] or 0
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # as Python does where nobody listens any more
            code = 120
    os._exit(code)
