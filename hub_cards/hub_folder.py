"""Writes the one folder that goes to the Hub: weights, configuration, processor, code and card, and nothing else."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from video_ma2mba import EXAMPLE_VIDEOS

from .checkpoint_facts import read_facts, read_json, weight_files
from .evaluations import read_evaluation
from .link_bundled import HUB_FOLDERS, ROOT
from .measured_cost import measured_cost
from .model_card import model_card, own_words, read_metadata

# What save_pretrained of a model, a processor or an adapter writes beside weights and code.
_KEPT = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "model.safetensors.index.json",
    "familiarity.safetensors",
    "LICENSE*",
    "NOTICE*",
)
_NEEDED = ("processor_config.json", "tokenizer.json", "chat_template.jinja")


class HubFolder(NamedTuple):
    """What `write_hub_folder` tells.

    Attributes:
        left_out: names that stayed behind.
        tag: names the content on the Hub, so that the card can say which revision to load.
    """

    left_out: list[str]
    tag: str


def write_hub_folder(
    source: Path,
    target: Path,
    repo_id: str,
    *,
    license: str | None = None,
    base_model: str | None = None,
    results: Sequence[Path] = (),
    measured_on: str | None = None,
    pin: bool = True,
) -> HubFolder:
    """Copy what belongs on the Hub from `source` to `target`, with the package's code and a generated card.

    Args:
        source: folder written by `save_pretrained` of model and processor, or of a LoRA adapter. It is not changed.
        target: an empty or new folder; what is in it stays.
        license: identifier such as apache-2.0; None takes the one in the metadata of `source`'s README.md.
        base_model: Hub id that the checkpoint was made from; None takes the README's, or the adapter's.
        results: what was measured, for `read_evaluation`; measured_on: with what and when, for the tables among it.
        pin: let the card name the tag as the revision to load.

    Returns:
        What was left out, and the tag that the card names.

    Raises:
        FileNotFoundError: something is missing. ValueError: something is foreign, unsafe or unknown, in one sentence.
    """
    facts = read_facts(source)
    _refuse_links_outside(source)
    earlier = read_metadata(source / "README.md")
    license = license or earlier.get("license")
    if not license or license == "unknown":
        raise ValueError(f"{source} names no licence: give one, such as --license apache-2.0")
    base_model = base_model or _hub_id(earlier.get("base_model"))
    evaluations = [read_evaluation(path, measured_on) for path in results]
    names = {path.name for path in weight_files(source)}
    names |= {path.name for path in source.iterdir() if any(fnmatch.fnmatch(path.name, kept) for kept in _KEPT)}
    code: dict[str, Path] = {}
    if facts.adapter is None:
        missing = [name for name in _NEEDED if name not in names]
        if missing:
            raise FileNotFoundError(f"{source} lacks {', '.join(missing)}: save the processor there, too")
        code = _code_for(source)
    else:
        base_model = base_model or _hub_id(facts.adapter.get("base_model_name_or_path"))
    target.mkdir(parents=True, exist_ok=True)
    for name in sorted(names):
        shutil.copyfile(source / name, target / name)
    if facts.adapter is not None:  # a path of this machine would be of no use to others
        _write_json(target / "adapter_config.json", facts.adapter | {"base_model_name_or_path": base_model})
    for name, path in code.items():
        shutil.copyfile(path, target / name)
    for evaluation in evaluations:
        for name, path in evaluation.files.items():
            shutil.copyfile(path, target / name)
    tag = _content_tag(target)
    title, words = own_words(source / "README.md")
    card = model_card(
        facts,
        repo_id,
        revision=tag if pin else None,
        license=license,
        base_model=base_model,
        metadata=earlier,
        title=title,
        words=words,
        evaluations=evaluations,
        cost=measured_cost(facts.config) if facts.config is not None else None,
    )
    (target / "README.md").write_text(card, encoding="utf-8")
    known = {*names, *code, "README.md", "__pycache__"}
    left_out = sorted(path.name for path in source.iterdir() if path.name not in known)
    return HubFolder(left_out, tag)


def _content_tag(folder: Path) -> str:
    """A name for what is in `folder`, known before any commit is made: the same content has the same name."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.name != "README.md"):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return f"checkpoint-{digest.hexdigest()[:12]}"


def _refuse_links_outside(source: Path) -> None:
    """Links to the package's own code are fine: its content is copied. Any other would publish a file of elsewhere."""
    inside = source.resolve()
    own_code = {(ROOT / folder) for folder in HUB_FOLDERS}
    for path in sorted(source.rglob("*")):
        if path.is_symlink():
            real = path.resolve()
            if not real.is_relative_to(inside) and not (real.suffix == ".py" and real.parent in own_code):
                raise ValueError(f"{path} is a link to a file outside {source}: replace it by a copy of the file")


def _code_for(source: Path) -> dict[str, Path]:
    """The package's files that the checkpoint's configurations name, and all that those import."""
    from transformers.dynamic_module_utils import get_relative_import_files

    config, processor = read_json(source / "config.json"), read_json(source / "processor_config.json")
    pipelines = {task: entry.get("impl") for task, entry in config.get("custom_pipelines", {}).items()}
    video_processor = processor.get("video_processor", {})
    named = [config.get("auto_map"), pipelines, processor.get("auto_map"), video_processor.get("auto_map")]
    if not all(named):
        raise ValueError(
            f"{source} does not name its code (auto_map, custom_pipelines): save model and processor with "
            "save_pretrained of this package"
        )
    modules = {reference.split(".")[0] for group in named for reference in group.values()}
    found: dict[str, Path] = {}
    for module in sorted(modules):
        path = next((p for f in HUB_FOLDERS if (p := ROOT / f / f"{module}.py").is_file()), None)
        if path is None:
            raise ValueError(f"{source} names the code file {module}.py, which is not of this package")
        for file in (path, *map(Path, get_relative_import_files(path))):
            found[file.name] = file
    return found


def holds_only_our_code(folder: Path) -> bool:
    """Whether a folder's own code, which `trust_remote_code` would run, is this package's, byte for byte."""
    ours = {path.name: path for part in HUB_FOLDERS for path in (ROOT / part).glob("*.py")}
    found = list(folder.rglob("*.py"))
    return folder.is_dir() and all(
        path.parent == folder and path.name in ours and path.read_bytes() == ours[path.name].read_bytes()
        for path in found
    )


def _hub_id(name: Any) -> str | None:
    """`name` if it is `owner/name` on the Hub and no path of this machine."""
    if isinstance(name, list):
        name = name[0] if len(name) == 1 else None
    is_id = isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/", "~"))
    return name if is_id and not Path(name).exists() else None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


_SPACE = Path(__file__).parent / "space"
_PAGE = ("app.py", "requirements.txt", "README.md")
CHECKPOINT = "checkpoint"  # where `app.py` looks for the model


def write_space_folder(source: Path, target: Path, **card: Any) -> HubFolder:
    """Copy the page and the checkpoint in `source` to `target`; see `write_hub_folder`, whose settings `card` takes.

    Raises:
        ValueError: a LoRA adapter, which a Space cannot run alone; and what `write_hub_folder` raises.
    """
    if (source / "adapter_config.json").is_file():
        raise ValueError(
            f"{source} is an adapter: merge it into its model (merge_and_unload) and save that for a Space"
        )
    written = write_hub_folder(source, target / CHECKPOINT, CHECKPOINT, pin=False, **card)  # by its path in the Space
    for name in _PAGE:
        shutil.copyfile(_SPACE / name, target / name)
    shutil.copytree(_SPACE / "web", target / "web", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(EXAMPLE_VIDEOS, target / "examples")
    return written
