"""Bad input ends in `error: …` on one line and exit code 2; anything unexpected keeps its traceback.

Warnings (a damaged video, say) are one line each as well, without the place in the code that gave them.
"""

import textwrap
import warnings

import typer
from typer.core import TyperGroup

# What wrong arguments, files and checkpoints raise, here and in transformers. PyTorch and transformers report tensors
# of the wrong shape as RuntimeError, which is also what real defects raise: those are told apart by their text.
_EXPECTED = (ValueError, OSError)
_EXPECTED_RUNTIME_TEXTS = ("out of memory", "size mismatch", "state_dict", "ignore_mismatched_sizes")


def is_expected(error: Exception) -> bool:
    """Whether `error` says what the user can change, rather than that the program is wrong."""
    if isinstance(error, BrokenPipeError):
        return False
    if isinstance(error, ImportError):
        return not (error.name or "").startswith("video_ma2mba")  # an optional package that is not installed
    if isinstance(error, RuntimeError):
        return any(text in str(error) for text in _EXPECTED_RUNTIME_TEXTS)
    return isinstance(error, _EXPECTED) or type(error).__name__ == "SafetensorError"


def one_line(error: Exception | Warning) -> str:
    """The error's message on a single line, never empty, never longer than a terminal's screen."""
    text = str(error)
    if isinstance(error, OSError) and error.filename and text.startswith("[Errno"):  # the system's own words
        text = f"{error.filename2 or error.filename}: {error.strerror}"
    return textwrap.shorten(text, 600, placeholder=" …") or type(error).__name__


class OneLineErrors(TyperGroup):
    """A group of commands that reports expected errors on one line, unless `--debug` was given."""

    def invoke(self, ctx):
        warnings.showwarning = lambda message, *_, **__: typer.echo(f"warning: {one_line(message)}", err=True)
        try:
            return super().invoke(ctx)
        except Exception as error:
            if ctx.params.get("debug") or not is_expected(error):
                raise
            typer.echo(f"error: {one_line(error)}", err=True)
            raise typer.Exit(2) from error
