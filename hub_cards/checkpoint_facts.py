"""What can be said about a checkpoint by looking at its files, without loading its weights."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

WEIGHT_FILES = ("model*.safetensors", "adapter_model*.safetensors")
_PARTS = {"vision_tower.": "vision tower", "multi_modal_projector.": "projector"}  # all the rest is the language model


@dataclass(frozen=True)
class CheckpointFacts:
    """Sizes of a model or of an adapter.

    Attributes:
        parameters: numbers of the weights stored, by part ("vision tower", "projector", "language model").
        dtypes: names of their types as safetensors writes them, the most frequent first.
        weight_bytes: size of the weight files.
        config: the model's configuration; None for an adapter.
        adapter: `adapter_config.json`; None for a model.
        state_bytes: size of what the model remembers of a video, in the weights' type; 0 for an adapter.
    """

    parameters: dict[str, int]
    dtypes: tuple[str, ...]
    weight_bytes: int
    config: Any
    adapter: dict[str, Any] | None
    state_bytes: int


def read_facts(folder: Path) -> CheckpointFacts:
    """Facts about the model or LoRA adapter saved in `folder`.

    Raises:
        FileNotFoundError: there is no folder, no model in it, or a weight file is missing.
        ValueError: a model of another type, or a damaged file.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no directory: name the one that save_pretrained wrote")
    adapter = None
    if (folder / "adapter_config.json").is_file():
        adapter = read_json(folder / "adapter_config.json")
        if adapter.get("peft_type") != "LORA":
            raise ValueError(
                f"{folder} holds an adapter of the type {adapter.get('peft_type')}: only LORA is published"
            )
    elif not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds neither config.json nor adapter_config.json: it is not a saved model")
    else:
        kind = read_json(folder / "config.json").get("model_type")
        if kind != "video_ma2mba":
            raise ValueError(
                f"{folder} holds a model of the type {kind}, not a Video-Ma2mba model: push publishes ours"
            )

    files = weight_files(folder)
    parameters: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    for file in files:
        for name, (dtype, shape) in tensors_in(file).items():
            part = next((part for mark, part in _PARTS.items() if mark in name), "language model")
            parameters[part] += prod(shape)
            dtypes[dtype] += prod(shape)
    config, state_bytes = None, 0
    if adapter is None:
        import torch

        from ..modeling_video_ma2mba.configuration_video_ma2mba import VideoMa2mbaConfig
        from ..modeling_video_ma2mba.state_video import VideoState

        config = VideoMa2mbaConfig.from_pretrained(folder)
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        state_bytes = VideoState.zeros(config.text_config, device="meta", dtype=dtype).nbytes
    return CheckpointFacts(
        parameters=dict(parameters),
        dtypes=tuple(name for name, _ in dtypes.most_common()),
        weight_bytes=sum(file.stat().st_size for file in files),
        config=config,
        adapter=adapter,
        state_bytes=state_bytes,
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the weights.

    Raises:
        FileNotFoundError: there are none, or the index names one that is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        missing = [name for name in names if not (folder / name).is_file() or Path(name).name != name]
        if missing or not names:
            raise FileNotFoundError(f"{index} names weight files that {folder} lacks: {', '.join(missing) or 'none'}")
        return [folder / name for name in names]
    found = sorted(path for pattern in WEIGHT_FILES for path in folder.glob(pattern))
    if not found:
        raise FileNotFoundError(f"{folder} holds no weights in safetensors files: save the model with save_pretrained")
    return found


def tensors_in(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of each tensor of a safetensors file, from its header.

    Raises:
        ValueError: the file is damaged or cut off.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
            return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut off ({error}): copy or save it again") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content
