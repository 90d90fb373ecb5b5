"""Convert checkpoints to this package's layout and back: `convert_checkpoint`.

Every tensor is accounted for before anything is written; the result appears under its name only when it is complete.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from video_ma2mba.conversion.compose import (
    build_processor,
    local_folder,
    pixel_statistics,
    text_tokenizer,
    vision_parts,
    without_loading_warnings,
)
from video_ma2mba.modeling_video_ma2mba.configuration_video_ma2mba import VideoMa2mbaConfig
from video_ma2mba.modeling_video_ma2mba.modeling_video_ma2mba import VideoMa2mbaForConditionalGeneration

from .layouts import OURS
from .official_layout import official_config, official_target
from .report import RECORD, ConversionReport
from .tensor_plan import CheckpointSource, TensorPlan, plan_tensors
from .tensor_store import DTYPES, TensorSpec, TensorStore, write_shards

_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")


def convert_checkpoint(
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    to: Literal["ours", "official"] = "ours",
    tokenizer: str | None = None,
    vision_config: str | None = None,
    leave_out: Sequence[str] = (),
    max_shard_bytes: int = 5_000_000_000,
    dry_run: bool = False,
    on_bytes: Callable[[int], Any] | None = None,
) -> ConversionReport:
    """Convert a checkpoint, or several that hold a part each, to one of this package's layout (or back).

    Values and types of all tensors stay as they are. Memory: one file of the source, and one tensor.

    Args:
        sources: directories, Hub ids or single files (projectors). Recognised by their tensors: released Video-Ma2mba
            checkpoints, Mamba-2 language models (transformers' or state-spaces' names), CLIP or SigLIP towers (whole
            or vision part), projectors, and this package's own. Together they must make up a whole model.
        out: directory to write; it must be new or empty.
        to: "ours", or "official": the layout of the released checkpoints, from one checkpoint of ours.
        tokenizer: directory or Hub id. Default: the language model's, else GPT-NeoX's.
        vision_config: directory or Hub id whose config.json describes the tower, where the checkpoint's does not.
        leave_out: patterns (`mm_model.image_*`) of tensors that may be left out although nothing is known of them.
        max_shard_bytes: largest file to write.
        dry_run: check everything and write nothing.
        on_bytes: called with the size of every tensor that is about to be written, in bytes.

    Returns:
        What became of every tensor; also written to `out/conversion.json`.

    Raises:
        ConversionError: tensors are missing, unknown, mis-shaped or contradict config.json; with all their names.
        ValueError: wrong arguments, or a configuration that this model does not have.
        OSError: a source that does not exist, cannot be fetched or is incomplete; no room to write.
    """
    names = [str(source) for source in ([sources] if isinstance(sources, str | Path) else sources)]
    out = Path(out)
    if to not in ("ours", "official"):
        raise ValueError(f"to={to!r} is no layout: use 'ours' or 'official'")
    if not names:
        raise ValueError("name a checkpoint to convert")
    if not dry_run and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty directory: choose another")
    opened = [_open(name) for name in names]
    if to == "official":
        return _to_official(opened[0], out, len(opened), leave_out, max_shard_bytes, dry_run)
    vision, statistics = (None, {}) if vision_config is None else vision_parts(vision_config)
    plan = plan_tensors(
        opened,
        head_is_embedding=lambda head, embedding: _same_bytes(_read(opened, head), _read(opened, embedding)),
        vision_config=vision.to_dict() if vision is not None else None,
        statistics=statistics or _statistics(opened),
        leave_out=leave_out,
    )
    for index, name in plan.positions.items():
        _check_positions(opened[index], name)
    text = _tokenizer(opened[plan.language_source], tokenizer, plan.config)
    if dry_run:
        return plan.report
    specs = {canonical: opened[i].specs[name] for canonical, (i, name) in plan.tensors.items()}

    def read(canonical: str) -> Tensor:
        if on_bytes is not None:
            on_bytes(specs[canonical].nbytes)
        return _read(opened, plan.tensors[canonical])

    def write(folder: Path) -> None:
        _write_model_files(folder, plan.config, specs, text)
        _write_shards(folder, specs, read, opened, max_shard_bytes)
        record = plan.report.to_dict() | {"official": _reverse_record(plan, opened)}
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    _write_whole(out, sum(spec.nbytes for spec in specs.values()), write)
    return plan.report


def _open(name: str) -> CheckpointSource:
    path = Path(name).expanduser()
    if path.is_file():
        return CheckpointSource(name, TensorStore(path, name), {}, None)
    folder = local_folder(name)
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"config.json of {name} is damaged: {error}") from error
    return CheckpointSource(name, TensorStore(folder, name), fields, folder)


def _read(opened: list[CheckpointSource], place: tuple[int, str]) -> Tensor:
    index, name = place
    return opened[index].store.read(name)


def _write_shards(
    folder: Path,
    specs: dict[str, TensorSpec],
    read: Callable[[str], Tensor],
    opened: list[CheckpointSource],
    max_shard_bytes: int,
) -> None:
    try:
        write_shards(folder, specs, read, max_shard_bytes)
    finally:
        for source in opened:
            source.store.close()


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    return same_kind and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def _check_positions(source: CheckpointSource, name: str) -> None:
    with closing(source.store):
        numbers = source.store.read(name).flatten()
    if not torch.equal(numbers, torch.arange(len(numbers), dtype=numbers.dtype)):
        raise ValueError(f"{source.name}: {name} does not count 0, 1, 2, ...: this model's positions do")


def _statistics(opened: list[CheckpointSource]) -> dict[str, list[float]]:
    """Pixel statistics that the source of the tower states."""
    for source in opened:
        if source.layout.tower is not None and source.folder is not None:
            return pixel_statistics(source.folder)
    return {}


def _tokenizer(source: CheckpointSource, tokenizer: str | None, config: VideoMa2mbaConfig) -> PreTrainedTokenizerBase:
    """The text tokenizer with `<video>` and `<pad>`; enters their ids into the configuration."""
    if tokenizer is None and source.folder is None:
        raise ValueError(f"{source.name} is a single file: name its tokenizer")
    rows = config.text_config.vocab_size
    with without_loading_warnings():  # transformers does not know the released checkpoints' model_type
        text, config.video_token_id = text_tokenizer(tokenizer, source.folder, config.text_config, {})
    if config.text_config.vocab_size != rows:
        raise ValueError(
            f"the tokenizer has {len(text)} tokens with <video> and <pad>, {source.name}'s embedding {rows} rows: "
            "name another tokenizer, or compose a model with `video-ma2mba init`, which adds rows"
        )
    config.pad_token_id = config.text_config.pad_token_id = text.pad_token_id
    return text


def _write_model_files(
    folder: Path, config: VideoMa2mbaConfig, specs: dict[str, TensorSpec], text: PreTrainedTokenizerBase
) -> None:
    """Everything but the weights: configuration, generation settings, code, tokenizer, processor."""
    bytes_by_dtype = Counter()
    for spec in specs.values():
        bytes_by_dtype[DTYPES[spec.dtype]] += spec.nbytes
    with torch.device("meta"):
        model = VideoMa2mbaForConditionalGeneration(config)
    model.to(bytes_by_dtype.most_common(1)[0][0])
    model.generation_config.pad_token_id = config.pad_token_id
    with _no_progress_bars():
        model.save_pretrained(folder, state_dict={})  # all files but the weights; would remove those of before
    build_processor(config, text).save_pretrained(folder)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """A bar over no weights at all says nothing."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _reverse_record(plan: TensorPlan, opened: list[CheckpointSource]) -> dict[str, Any] | None:
    """What `--to official` needs to restore the very names; None for what never was one checkpoint."""
    if len(opened) > 1 or opened[0].layout == OURS:
        return None
    positions = {name: list(opened[i].specs[name].shape) for i, name in plan.positions.items()}
    return {
        "layout": opened[0].layout.to_dict(),
        "has_head": plan.head_stored,
        "positions": positions,
        "config": opened[0].fields,
    }


def _to_official(
    source: CheckpointSource, out: Path, sources: int, leave_out: Sequence[str], max_shard_bytes: int, dry_run: bool
) -> ConversionReport:
    if sources > 1:
        raise ValueError(
            "one checkpoint at a time goes to the official layout: convert the parts to one of ours first"
        )
    if source.fields.get("model_type") != VideoMa2mbaConfig.model_type or source.folder is None:
        raise ValueError(
            f"{source.name} is no checkpoint of this package (model_type {source.fields.get('model_type')!r}): only "
            "those go to the official layout"
        )
    opened = [source]
    config = VideoMa2mbaConfig.from_dict(source.fields)
    plan = plan_tensors(
        opened,
        head_is_embedding=lambda head, embedding: _same_bytes(_read(opened, head), _read(opened, embedding)),
        config=config,
        leave_out=leave_out,
    )
    record_path = source.folder / RECORD
    record = json.loads(record_path.read_text(encoding="utf-8")).get("official") if record_path.is_file() else None
    target = official_target(plan, source, record)
    if dry_run:
        return target.report

    def read(name: str) -> Tensor:
        if name in target.positions:
            return torch.arange(target.specs[name].numel).reshape(target.specs[name].shape)
        return source.store.read(target.stored[name])

    def write(folder: Path) -> None:
        _write_shards(folder, target.specs, read, opened, max_shard_bytes)
        fields = record["config"] if record else official_config(config)
        (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        pixels = {"image_mean": config.image_mean, "image_std": config.image_std}
        (folder / "preprocessor_config.json").write_text(json.dumps(pixels, indent=2) + "\n", encoding="utf-8")
        for pattern in _TOKENIZER_FILES:
            for file in source.folder.glob(pattern):
                shutil.copyfile(file, folder / file.name)
        (folder / RECORD).write_text(json.dumps(target.report.to_dict(), indent=1) + "\n", encoding="utf-8")

    _write_whole(out, sum(spec.nbytes for spec in target.specs.values()), write)
    return target.report


def _write_whole(out: Path, nbytes: int, write: Callable[[Path], None]) -> None:
    """Write to a folder beside `out` that takes its name when everything is written."""
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if nbytes > free:
        raise OSError(f"{out} needs {nbytes / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB left")
    partial = out.with_name(f"{out.name}.partial")
    if partial.exists():
        raise FileExistsError(f"{partial} is left from an interrupted conversion: remove it")
    partial.mkdir()
    try:
        write(partial)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
