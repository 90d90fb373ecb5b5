"""Defaults of options: from the environment (`VIDEO_MA2MBA_FPS=2`) and from a file; and -q and -v on every command.

The command line comes first, then the environment, then the file, then the command's own default. In both, an option
may be set for all commands that have it (`fps`) or for one of them (`[batch] fps`, `VIDEO_MA2MBA_BATCH_FPS`).
"""

import copy
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from .terminal import set_verbosity, step, verbosity, warn

PREFIX = "VIDEO_MA2MBA_"
FILE_VARIABLE = f"{PREFIX}CONFIG"
_SHARED = ("quiet", "verbose")
_NOT_SET = {"debug", "version", "config_file", "help", "install_completion", "show_completion"}


def config_file() -> Path:
    """Where defaults are kept unless another file is named."""
    return Path(typer.get_app_dir("video-ma2mba")) / "config.toml"


def prepare(group: Any) -> None:
    """Let every option of a group's commands be set in the environment; give each command the group's -q and -v."""
    shared = [option for option in group.params if option.name in _SHARED]
    for path, command in _commands(group):
        for option in _settable(command):
            option.envvar = [_variable(*path, _word(option)), _variable(_word(option))]
            option.show_envvar = False
        for option in shared:
            own = copy.copy(option)
            own.expose_value = False
            command.params.append(own)
    for option in shared:
        option.envvar, option.show_envvar = _variable(option.name), False


def take_quiet(context: typer.Context, value: bool) -> bool:
    """Callback of `--quiet`."""
    return _take_verbosity(context, value, -1)


def take_verbose(context: typer.Context, value: bool) -> bool:
    """Callback of `--verbose`."""
    return _take_verbosity(context, value, 1)


def _take_verbosity(context: typer.Context, value: bool, level: int) -> bool:
    if value and verbosity() == -level:
        raise typer.BadParameter("--quiet and --verbose exclude each other: give one")
    if value:
        set_verbosity(level)
    return value


def take_file(context: typer.Context, value: Path | None) -> Path | None:
    """Callback of `--config-file`: what stands in the file becomes the commands' defaults."""
    set_verbosity(0)  # a new command begins
    if context.resilient_parsing:
        return value
    path = value or config_file()
    if value is None and not path.is_file():
        return None
    context.default_map = read_defaults(path, context.command)
    step(f"defaults of {path}")
    return path


def read_defaults(path: Path, group: Any) -> dict[str, Any]:
    """The defaults in a TOML file, in the form that a group's context takes.

    Raises:
        ValueError: it is no TOML, or names what is no option or no command. OSError: it cannot be read.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: this is not TOML ({error})") from None
    found: dict[str, Any] = {}
    known = {words: list(_settable(command)) for words, command in _commands(group)}
    shared = [option for option in group.params if option.name in _SHARED]
    sections = {words[:length] for words in known for length in range(len(words) + 1)}

    def take(section: tuple[str, ...], values: dict[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, dict) and (*section, key) in sections:
                continue
            word, taken = key.replace("-", "_"), False
            for words, options in known.items():
                for option in options if words[: len(section)] == section else ():
                    if _word(option) == word:
                        place = found
                        for name in words:
                            place = place.setdefault(name, {})
                        place[option.name] = _value(option, value, f"{path}: {'.'.join((*section, key))}")
                        taken = True
            for option in shared if not section else ():
                if option.name == word:
                    found[word], taken = _value(option, value, f"{path}: {key}"), True
            if not taken:
                where = f"of {' '.join(section)}" if section else "of any command"
                raise ValueError(f"{path}: {'.'.join((*section, key))} is no option {where}, and no command")
        for key, value in values.items():  # behind what is for all, so that it stands over it
            if isinstance(value, dict) and (*section, key) in sections:
                take((*section, key), value)

    take((), given)
    return found


def name_source(error: Any) -> None:
    """Say in a message about an option's value that it came from the environment or the file."""
    context, option = getattr(error, "ctx", None), getattr(error, "param", None)
    if context is None or option is None or not hasattr(option, "opts"):
        return
    source = getattr(context.get_parameter_source(option.name), "name", "")
    if source == "ENVIRONMENT":
        names = [option.envvar] if isinstance(option.envvar, str) else option.envvar
        error.message += f" (from {next(name for name in names if os.environ.get(name))})"
    elif source == "DEFAULT_MAP":
        root = context.find_root()
        error.message += f" (from {root.params.get('config') or config_file()})"


def warn_of_unknown_variables(group: Any) -> None:
    """Say which variables of the environment are almost called as one of ours."""
    known = {FILE_VARIABLE, *map(_variable, _SHARED)}
    for _, command in _commands(group):
        known |= {name for option in _settable(command) for name in option.envvar or ()}
    for name in sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known):
        import difflib

        words = [other.removeprefix(PREFIX) for other in known]
        if near := difflib.get_close_matches(name.removeprefix(PREFIX), words, n=1, cutoff=0.65):
            warn(f"warning: {name} is set, but no option is called so (is {PREFIX}{near[0]} meant?)")


def _commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, (*path, name))
        else:
            yield (*path, name), command


def _settable(command: Any) -> Iterator[Any]:
    """The options of a command that can be set elsewhere."""
    return (o for o in command.params if _word(o) and o.name not in _NOT_SET and o.expose_value)


def _word(option: Any) -> str:
    """What an option is called elsewhere, as on the command line; nothing for an argument."""
    return next((name[2:].replace("-", "_") for name in option.opts if name.startswith("--")), "")


def _variable(*words: str) -> str:
    return PREFIX + "_".join(words).upper().replace("-", "_")


def _value(option: Any, value: Any, where: str) -> Any:
    """A value as the command line would give it, so that it is checked in the same way."""
    is_flag = bool(getattr(option, "is_flag", False))
    if is_flag != isinstance(value, bool):
        raise ValueError(f"{where}: {'true or false is meant' if is_flag else 'true and false are no values of it'}")
    if is_flag:
        return value
    values = value if isinstance(value, list) else [value]
    if isinstance(value, list) != bool(option.multiple) and isinstance(value, list):
        raise ValueError(f"{where}: one value is meant, not a list")
    if not all(isinstance(item, str | int | float) for item in values):
        raise ValueError(f"{where}: a text or a number is meant")
    texts = [str(item) for item in values]
    return texts if option.multiple else texts[0]
