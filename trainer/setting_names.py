"""What a recipe may hold, and what is wrong with it by itself; needs neither torch nor TRL.

The names of the trainer's settings are read in the source of the classes that define them: importing these takes long.
"""

from __future__ import annotations

import ast
import difflib
import functools
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
DATA_SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
BUNDLED = "bundled"
"""As `model`: the checkpoint that comes with the package."""
LORA_ALSO = ("projector", "embeddings", "norms")
"""What may train whole beside adapters."""


def check_data_file(path: Path, name: str) -> None:
    """ValueError for a file, called `name`, that can be no training data by its ending."""
    if path.suffix not in DATA_SUFFIXES:
        raise ValueError(f"{name}: a file of training data must end in {', '.join(DATA_SUFFIXES)}")


def check_shares(shares: Any, sources: int) -> None:
    """ValueError unless `shares` are numbers above 0, one for each of the sources."""
    if not isinstance(shares, list | tuple) or not all(isinstance(s, int | float) and s > 0 for s in shares):
        raise ValueError(f"train_shares={shares} is not valid: it must be a list of numbers above 0")
    if len(shares) != sources:
        raise ValueError(f"train_shares={shares} has {len(shares)} numbers for {sources} sources: give one each")


_LEAST = {  # what other packages say late, in words of their own, or not at all
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "global_batch_size": 1,
    "dataloader_num_workers": 0,
    "lora_rank": 1,
    "shuffle_buffer": 0,
    "lora_dropout": 0,
    "fps": 0.001,
    "num_frames": 1,
    "max_frames": 1,
    "max_length": 1,
    "carry_window": 1,
    "num_train_epochs": 0,
    "learning_rate": 0,
    "vision_learning_rate": 0,
    "projector_learning_rate": 0,
    "weight_decay": 0,
    "warmup_steps": 0,
}
_OF_ATTENTION = re.compile("rope|rotary|yarn|ntk_|max_position|position_interpolation", re.IGNORECASE)
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
        streaming: read rows as they are needed (set max_steps); several sources take turns.
        train_shares: chance of each source of train_data to give the next sample, [0.7, 0.3], until it ends.
        shuffle_buffer: of rows that stream, those among which the next one is drawn; 0: as they come.
        lora_rank: train adapters of this rank beside the frozen model; None trains the model itself.
        lora_alpha, lora_dropout: as in PEFT. lora_vision: adapters in the vision tower, too.
        lora_also: what trains whole beside them, of projector, and of the language model's embeddings and norms,
            separated by commas.
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
    train_shares: Any = None
    shuffle_buffer: int = 0
    lora_rank: int | None = None
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_vision: bool = False
    lora_also: str = "projector"
    four_bit: bool = False
    merge_adapter: bool = True
    resume: bool = False
    smoke_data: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.eval_share < 1:
            raise ValueError(f"eval_share={self.eval_share} is not valid: it must be in 0..1")
        if unknown := set(self.whole_parts) - set(LORA_ALSO):
            names = ", ".join(sorted(unknown))
            raise ValueError(f"lora_also={self.lora_also} is not valid: {names} is none of {', '.join(LORA_ALSO)}")
        if self.four_bit and self.lora_rank is None:
            raise ValueError("four_bit=true is for adapters, whole models do not train in 4 bits: give lora_rank, too")

    @property
    def whole_parts(self) -> tuple[str, ...]:
        """`lora_also` as names."""
        return tuple(part.strip() for part in (self.lora_also or "").split(",") if part.strip())


def check_settings(content: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as they are meant: YAML 1.1 takes 4e-5 for a text and no for False.

    Args:
        known: the type of every setting, as in `dataclasses.fields`.

    Raises:
        ValueError: an unknown key; a value of another type than the setting's, or below what makes sense.
    """
    for key in content:
        if key not in known:
            if _OF_ATTENTION.search(key):
                raise ValueError(
                    f"{key!r} has no counterpart here: a Mamba-2 language model has no rotary positions to stretch "
                    "for longer texts. Leave it out, and raise max_length"
                )
            close = difflib.get_close_matches(key, known, 1)
            raise ValueError(f"{key!r} is no setting" + (f": do you mean {close[0]!r}?" if close else ""))
    return {key: _meant(key, value, _type_names(known[key])) for key, value in content.items()}


def checked_settings(content: Mapping[str, Any], kinds: Sequence[type]) -> dict[str, Any]:
    """`check_settings` for the fields of some data classes; no more workers than there are processors.

    Raises:
        ValueError: as of `check_settings`.
    """
    known = {field.name: field.type for kind in reversed(kinds) for field in fields(kind) if field.init}
    content = check_settings(content, known)
    if workers := content.get("dataloader_num_workers"):
        content["dataloader_num_workers"] = min(workers, _processors())  # more of them slow each other down
    return content


def made_of(content: Mapping[str, Any], kinds: Sequence[type]) -> tuple[Any, ...]:
    """One of each data class, with those of the settings that are fields of it."""
    own = [{field.name for field in fields(kind) if field.init} for kind in kinds]
    given = ({name: value for name, value in content.items() if name in names} for names in own)
    return tuple(kind(**settings) for kind, settings in zip(kinds, given, strict=True))


def _processors() -> int:
    """Those this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _type_names(kind: Any) -> set[str]:
    """The alternatives of a type, by name."""
    text = kind if isinstance(kind, str) else kind.__name__ if type(kind) is type else str(kind)
    text = re.sub(r"(?:typing\.)?Optional\[(.*)\]", r"\1 | None", text)
    return {part.strip() for part in re.sub(r"\[.*\]", "", text).split("|")}


def _meant(key: str, value: Any, types: set[str]) -> Any:
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        value = float(value)
    if value is False and key.endswith("_strategy"):
        return "no"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is None and types <= {"int", "float", "bool"}:
        raise ValueError(f"{key}=null is not valid: it needs a value")
    if value is not None and types <= {"bool", "None"} and not isinstance(value, bool):
        raise ValueError(f"{key}={value} is not valid: it must be true or false")
    if value is not None and types <= {"int", "float", "None"}:
        if not is_number or not math.isfinite(value):
            raise ValueError(f"{key}={value} is not valid: it must be a number")
        if "float" not in types and value != int(value):
            raise ValueError(f"{key}={value} is not valid: it must be a whole number")
        value = value if "float" in types else int(value)
    if is_number and key in _LEAST and value < _LEAST[key]:
        raise ValueError(f"{key}={value} is not valid: it must be at least {_LEAST[key]}")
    if types <= {"str", "None"} and value is not None and not isinstance(value, str | bool):
        return str(value)  # a folder called 2026
    return value


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


@functools.cache
def written_settings() -> dict[str, str] | None:
    """The type of every setting of a recipe as its source says, without importing it; None where the classes are
    arranged in another way than known here."""
    found = {field.name: str(field.type) for field in fields(Recipe)}
    for (name, package, place), following in zip(_CLASSES, [*_CLASSES[1:], None], strict=True):
        folder = Path(__file__).parent if package is None else _folder(package)
        known = folder and fields_of(folder / place, name, [following[0]] if following else [])
        if known is None:
            return None
        found = {**known, **found}
    return found


def _folder(package: str) -> Path | None:
    spec = find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def fields_of(file: Path, name: str, bases: list[str]) -> dict[str, str] | None:
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
