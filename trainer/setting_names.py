"""What a recipe may hold, and what is wrong with it by itself; needs neither torch nor TRL.

The names of the trainer's settings are read in the source of the classes that define them: importing these takes long.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

BUNDLED = "bundled"
"""As `model`: the checkpoint that comes with the package."""
_NUMBERS = ("float", "int", "float | None", "int | None", float, int, float | None, int | None)
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
# Each class with the file of which package; one after the other inherits from the next.
_CLASSES = (
    ("VideoMa2mbaTrainingConfig", None, "training_config.py"),
    ("SFTConfig", "trl", "trainer/sft_config.py"),
    ("_BaseConfig", "trl", "trainer/base_config.py"),
    ("TrainingArguments", "transformers", "training_args.py"),
)


@dataclass(frozen=True)
class Recipe:
    """What a recipe says beside the trainer's settings.

    Attributes:
        model: directory or Hub id to start from; `bundled` is the checkpoint that comes with the package.
        train_data: what `load_training_data` takes: a file, a folder, a Hub id, or a list of these; likewise
            eval_data. base_dir: folder of the videos where it is another than the data's.
        eval_share: of the training rows, put aside for evaluation where there is no eval_data.
        merge_by_video: all questions about one video make one chat (clips of one video always make one sample).
        streaming: read rows as they are needed (set max_steps).
        lora_rank: train adapters of this rank beside the frozen model; None trains the model itself.
        lora_alpha, lora_dropout: as in PEFT. lora_vision: adapters in the vision tower, too.
        four_bit: QLoRA: the language model's projections are kept in 4 bits (NF4) beside the adapters, which takes
            bitsandbytes; what is merged has all its bits again.
        merge_adapter: also write the model with the adapters merged into it, to output_dir/merged.
        resume: go on from the newest complete checkpoint in output_dir, if there is one.
        smoke_data: kind of rendered data of a smoke run; see `smoke_data.SMOKE_DATA`.
    """

    model: str | None = None
    train_data: Any = None
    eval_data: Any = None
    base_dir: str | None = None
    eval_share: float = 0.0
    merge_by_video: bool = False
    streaming: bool = False
    lora_rank: int | None = None
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_vision: bool = False
    four_bit: bool = False
    merge_adapter: bool = True
    resume: bool = False
    smoke_data: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.eval_share < 1:
            raise ValueError(f"eval_share={self.eval_share} is not valid: it must be in 0..1")
        if self.four_bit and self.lora_rank is None:
            raise ValueError("four_bit=true is for adapters, whole models do not train in 4 bits: give lora_rank, too")


def check_settings(content: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as they are meant: YAML 1.1 takes 4e-5 for a text and no for False.

    Args:
        known: the type of every setting, as in `dataclasses.fields`.

    Raises:
        ValueError: an unknown key; a text where a number is meant.
    """
    for key in content:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            raise ValueError(f"{key!r} is no setting" + (f": do you mean {close[0]!r}?" if close else ""))
    content = {key: _meant(key, value) for key, value in content.items()}
    for key in known:
        if isinstance(content.get(key), str) and known[key] in _NUMBERS:
            raise ValueError(f"{key}={content[key]} is not valid: it must be a number")
    return content


def _meant(key: str, value: Any) -> Any:
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    return "no" if value is False and key.endswith("_strategy") else value


def check_recipe(content: Mapping[str, Any], smoke: bool = False) -> Recipe | None:
    """Refuse a recipe that cannot be right, before anything is imported that takes seconds; `build_recipe` and
    `run_recipe` say the same, and all the rest.

    Args:
        smoke: what is trained, and on what, need not be named.

    Returns:
        The recipe; None where it cannot be told without importing.

    Raises:
        ValueError: an unknown key, a value that makes no sense, no model or data.
    """
    if (known := written_settings()) is None:
        return None
    content = check_settings(content, known)
    own = {field.name for field in fields(Recipe)}
    recipe = Recipe(**{key: value for key, value in content.items() if key in own})
    for name in () if smoke else ("model", "train_data"):
        require_named(name, getattr(recipe, name))
    return recipe


def require_named(name: str, value: Any) -> None:
    """ValueError where a recipe names no `name`."""
    if value is None:
        raise ValueError(f"the recipe names no {name}: add {name}=...")


def written_settings() -> dict[str, str] | None:
    """The type of every setting of a recipe as its source says, without importing it; None where the classes are
    arranged in another way than known here."""
    found = {field.name: str(field.type) for field in fields(Recipe)}
    for (name, package, place), following in zip(_CLASSES, [*_CLASSES[1:], None], strict=True):
        folder = Path(__file__).parent if package is None else _folder(package)
        known = folder and _fields_of(folder / place, name, [following[0]] if following else [])
        if known is None:
            return None
        found = {**known, **found}
    return found


def _folder(package: str) -> Path | None:
    spec = find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _fields_of(file: Path, name: str, bases: list[str]) -> dict[str, str] | None:
    """Fields of a data class with their types as written; None unless it is there and has exactly these bases."""
    if not file.is_file():
        return None
    classes = (node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef))
    found = next((node for node in classes if node.name == name), None)
    if found is None or [ast.unparse(base) for base in found.bases] != bases:
        return None
    fields = (item for item in found.body if isinstance(item, ast.AnnAssign))
    made = (item for item in fields if item.value is None or "init=False" not in ast.unparse(item.value))
    return {ast.unparse(item.target): ast.unparse(item.annotation) for item in made}
