"""Recipe files: found by name, read, overridden. What their settings mean, `recipe` says, with torch and TRL."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).with_name("recipes")
SMOKE = "smoke"  # the section of a recipe that makes it a run of a minute on a CPU


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def recipe_content(source: str | os.PathLike[str], overrides: Sequence[str] = (), smoke: bool = False) -> dict:
    """The settings of a recipe file, or of the shipped one of that name, with overrides laid over them.

    Args:
        overrides: `key=value` texts; the value is read as YAML.
        smoke: take the recipe's smoke section, too, which turns it into a short run on rendered videos.

    Raises:
        FileNotFoundError: no such file or recipe.
        ValueError: no YAML, an override that is none, or no smoke section.
    """
    content = _read_yaml(source)
    short = content.pop(SMOKE, None)
    if smoke:
        if not isinstance(short, dict):
            raise ValueError(f"{source} has no section {SMOKE!r}: leave --smoke away")
        content |= short
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f"{text!r} is no override: write key=value, such as learning_rate=1e-5")
        content[key.strip()] = yaml.safe_load(value)
    return content


def _read_yaml(source: str | os.PathLike[str]) -> dict[str, Any]:
    path = Path(source)
    if not path.is_file():
        shipped = FOLDER / f"{path.name}.yaml"
        if str(source) != path.name or not shipped.is_file():
            raise FileNotFoundError(
                f"there is no recipe {source}: name a YAML file or one of {', '.join(shipped_recipes())}"
            )
        path = shipped
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold settings, one `key: value` a line")
    return content
