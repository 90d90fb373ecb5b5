"""Bad input ends in `error: …` on one line and exit code 2; anything unexpected keeps its traceback.

Warnings (a damaged video, say) are one line each as well, without the place in the code that gave them. Nothing
that is printed here tells a password or a token.
"""

import os
import sys
import traceback
import warnings

import typer
from typer.core import TyperGroup

from .defaults import name_source, prepare, warn_of_unknown_variables
from .terminal import echo_json, prepare_streams, printable, verbosity, warn

# What wrong arguments, files and checkpoints raise, here and in transformers. PyTorch and transformers report tensors
# of the wrong shape as RuntimeError, which is also what real defects raise: those are told apart by their text.
_EXPECTED = (ValueError, OSError)
# Of safetensors and huggingface_hub: a damaged file; a value of a configuration that cannot be.
_EXPECTED_NAMES = ("SafetensorError", "StrictDataclass")
_EXPECTED_RUNTIME_TEXTS = ("out of memory", "size mismatch", "state_dict", "ignore_mismatched_sizes")
_LONGEST = 600  # characters of a message: no more than a terminal's screen
_TAIL = 200  # of these, how many of the end are kept: what is wrong often stands there


def is_expected(error: Exception) -> bool:
    """Whether `error` says what the user can change, rather than that the program is wrong."""
    if isinstance(error, BrokenPipeError):
        return False
    if isinstance(error, ImportError):
        return not (error.name or "").startswith("video_ma2mba")  # an optional package that is not installed
    if isinstance(error, RecursionError):
        return "JSON" in str(error)  # a file that is nested too deeply
    if isinstance(error, RuntimeError):
        return any(text in str(error) for text in _EXPECTED_RUNTIME_TEXTS)
    return isinstance(error, _EXPECTED) or type(error).__name__.startswith(_EXPECTED_NAMES)


def one_line(error: Exception | Warning) -> str:
    """The error's message on a single line, never empty, never longer than a terminal's screen, without secrets."""
    text = str(error)
    if isinstance(error, OSError) and error.filename and text.startswith("[Errno"):  # the system's own words
        text = f"{error.filename2 or error.filename}: {error.strerror}"
    if isinstance(error, RecursionError):
        text = "a JSON file is nested too deeply"
    text = masked(" ".join(text.split()))
    text = printable(text)
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST - _TAIL - 3]} … {text[-_TAIL:]}"
    return text or type(error).__name__


def tell_failed(name: str, error: Exception, as_json: bool) -> None:
    """One of several videos failed: a line that names it, and with `--json` one for programs."""
    told = one_line(error)
    warn(f"error: {told if told.startswith((name, os.path.normpath(name))) else f'{name}: {told}'}")
    if as_json:
        echo_json({"video": name, "error": told})


def masked(text: str) -> str:
    """A message without passwords and tokens."""
    if not any(mark in text for mark in "@=:?"):  # nothing that could hold one: errors come at once
        return text
    from video_ma2mba.processing.video_source_names import without_secrets

    return without_secrets(text)


class OneLineErrors(TyperGroup):
    """A group of commands that reports expected errors on one line, unless `--debug` was given.

    Options of its commands have defaults in the environment and in a file.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        prepare(self)

    def main(self, *args, **kwargs):
        prepare_streams()
        return super().main(*args, **kwargs)

    def make_context(self, *args, **kwargs):
        try:
            return super().make_context(*args, **kwargs)
        except Exception as error:
            if hasattr(error, "format_message") or not is_expected(error):
                raise
            typer.echo(f"error: {one_line(error)}", err=True)
            raise typer.Exit(2) from None

    def invoke(self, ctx):
        warnings.showwarning = _show_warning
        warn_of_unknown_variables(self)
        try:
            if not _folder_is_there():  # PyTorch's libraries would end the process with words of their own
                raise FileNotFoundError("the folder that this was started in is gone: change to one that is there")
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            if sys.stderr.isatty():
                typer.echo(err=True)  # the shell's prompt begins a line of its own, not the one that ^C stands in
            raise
        except Exception as error:
            if not ctx.params.get("debug") and not said_first("error"):
                raise typer.Exit(2) from None
            if hasattr(error, "format_message"):  # of the command line's parser
                name_source(error)
                error.message = masked(error.message)
                raise
            if not ctx.params.get("debug") and is_expected(error):
                warn(f"error: {one_line(error)}")
                raise typer.Exit(2) from None
            if not _tells_secrets(error):
                raise
            typer.echo(masked("".join(traceback.format_exception(error))), err=True, nl=False)
            raise typer.Exit(1) from None


def _folder_is_there() -> bool:
    try:
        return bool(os.getcwd())
    except FileNotFoundError:
        return False


def _show_warning(message: Warning, *_, **__) -> None:
    if isinstance(message, FutureWarning | DeprecationWarning) and verbosity() < 1:
        return  # from one library to the next: nothing that who gives a command could do
    line = f"warning: {one_line(message)}"
    if said_first(line):
        warn(line)


def said_first(what: str) -> bool:
    """Whether no other process of this run has said it yet: several that meet the same error say one line together.

    What follows from the first error in the others (a connection that is closed, say) is not worth a line either.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    import hashlib
    from datetime import timedelta

    from torch.distributed import TCPStore

    run = [os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")]
    key = hashlib.sha256("\0".join([*run, what]).encode()).hexdigest()
    try:  # torchrun keeps the store, whatever becomes of its processes
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))
        return store.add(f"video_ma2mba/said/{key}", 1) == 1
    except (KeyError, ValueError, RuntimeError):
        return True


def _tells_secrets(error: BaseException | None) -> bool:
    """Whether a message of an error, or of one behind it, would tell a secret."""
    while error is not None:
        if masked(str(error)) != str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
