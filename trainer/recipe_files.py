"""Recipe files: found by name, read, overridden. What their settings mean, `recipe` says, with torch and TRL."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).with_name("recipes")
SMOKE = "smoke"  # the section of a recipe that makes it a run of a minute on a CPU
CHOICES = "choices"  # the section with settings that go together, of which a key chooses: `size=ti`


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package; those of a family begin with its folder, `videomamba/k400`."""
    return shipped_in(FOLDER)


def shipped_in(folder: Path) -> list[str]:
    """Names of the YAML files in a folder, then of those below it, by their paths from there."""
    names = (path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    return sorted(names, key=lambda name: ("/" in name, name))


def recipe_content(source: str | os.PathLike[str], overrides: Sequence[str] = (), smoke: bool = False) -> dict:
    """The settings of a recipe file, or of the shipped one of that name, with overrides laid over them.

    A section `choices: {size: {ti: {...}, s: {...}}}` holds settings that go together: the key `size`, given beside it
    or as an override, says which of them are laid over the file's. Later keys lie over earlier ones.

    Args:
        overrides: `key=value` texts; the value is read as YAML.
        smoke: take the recipe's smoke section, too, which turns it into a short run on rendered videos.

    Raises:
        FileNotFoundError: no such file or recipe.
        ValueError: no YAML, an override that is none or has no value, something that cannot be chosen, or no smoke
            section.
    """
    return laid_over(source, parse_overrides(overrides), smoke)


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """What `key=value` texts say, values read as YAML.

    Raises:
        ValueError: a text that is none, has no value, or one that is not YAML.
    """
    own: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f"{text!r} is no override: write key=value, such as learning_rate=1e-5")
        if not value.strip():
            raise ValueError(f"{text!r} has no value: write {key.strip()}=null where none is meant")
        try:
            own[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"{text!r} has a value that is not valid YAML: put quotes around it") from None
    return own


def laid_over(source: str | os.PathLike[str], own: dict[str, Any], smoke: bool = False) -> dict[str, Any]:
    """`recipe_content` with settings of one's own as plain data.

    Raises:
        FileNotFoundError, ValueError: as of `recipe_content`.
    """
    content = read_yaml(source, FOLDER, "recipe")
    short, choices = content.pop(SMOKE, None), content.pop(CHOICES, None) or {}
    if smoke and not isinstance(short, dict):
        raise ValueError(f"{source} has no section {SMOKE!r}: leave --smoke away")
    layers = [content, own] if not smoke else [content, short, own]
    chosen: dict[str, Any] = {}
    for key, ways in choices.items():
        asked = next((layer[key] for layer in reversed(layers) if key in layer), None)
        found = {str(name): settings for name, settings in ways.items()}
        if str(asked) not in found:
            raise ValueError(f"{key}={asked} is not valid: this recipe knows {', '.join(found)}")
        chosen |= found[str(asked)] or {}
    whole = content | chosen | (short if smoke else {}) | own
    return {key: value for key, value in whole.items() if key not in choices}


def read_yaml(source: str | os.PathLike[str], folder: Path, kind: str) -> dict[str, Any]:
    """Settings of a YAML file, or of the one of that name in `folder` that comes with the package.

    Raises:
        FileNotFoundError: there is neither. ValueError: no YAML, or no settings.
    """
    path = Path(source)
    if not path.is_file():
        known = shipped_in(folder)
        if str(source) not in known:
            raise FileNotFoundError(f"there is no {kind} {source}: name a YAML file or one of {', '.join(known)}")
        path = folder / f"{source}.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold settings, one `key: value` a line")
    return content
