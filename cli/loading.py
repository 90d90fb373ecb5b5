"""Loading a model for a command: what is wrong is told before the seconds of imports, which begin with a sign of life.

The functions behind it are those of `video_ma2mba.loading`.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from video_ma2mba import loading
from video_ma2mba.loading import load_classifier, pick_device, pick_dtype, resolve_model

from .terminal import step, verbosity

__all__ = ["load_classifier", "load_pipeline", "pick_device", "pick_dtype", "resolve_model", "while_loading"]


def load_pipeline(model: str | None = None, device: str = "auto", dtype: str = "auto", **settings: Any) -> Any:
    """`video_ma2mba.loading.load_pipeline`, for a command."""
    loading.check_loading(model, device, dtype, kind="video_ma2mba")
    with while_loading():
        pipe = loading.load_pipeline(model, device=device, dtype=dtype, **settings)
    step(
        f"{model or 'the bundled checkpoint'} loaded, {str(pipe.model.dtype).removeprefix('torch.')} on {pipe.device}"
    )
    return pipe


@contextmanager
def while_loading() -> Iterator[None]:
    """Says on a terminal that something is being loaded; imports inside take a fifth less time.

    Garbage is not looked for among the objects of some thousand files, all of which stay.
    """
    shown = sys.stderr.isatty() and verbosity() >= 0
    if shown:
        typer.echo("loading …", err=True, nl=False)
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        if shown:
            typer.echo("\r         \r", err=True, nl=False)
