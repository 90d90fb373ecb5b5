"""The model that a training starts from: fresh, saved, or released, fitted to the recipe's clips and classes; and the
rates at which its parts learn."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...conversion.videomamba_checkpoint import convert_videomamba, read_videomamba, resize_clips
from ...modeling_video_ma2mba.configuration_videomamba import VideoMambaConfig
from ...modeling_video_ma2mba.modeling_videomamba import NO_DECAY, VideoMambaForVideoClassification
from .training_settings import VideoMambaRecipe

_EMBEDDINGS = ("patch_embed.", "cls_token", "pos_embed", "temporal_pos_embedding")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def stored_model(source: str, setting: str = "model") -> tuple[dict[str, Any], dict[str, Tensor], Path | None]:
    """The configuration's fields, all weights, and the folder (none of a `.pth`) of a VideoMamba: encoder, classifier
    or retrieval model; a folder of ours, a Hub id, or a released `.pth` file. setting: that named it, for messages.

    Raises:
        FileNotFoundError: there is no such model. ValueError: it is no VideoMamba.
    """
    if source.endswith(".pth"):
        with tempfile.TemporaryDirectory() as parent:
            convert_videomamba(source, Path(parent, "model"))
            return *stored_model(str(Path(parent, "model")))[:2], None
    folder = Path(source)
    if not folder.is_dir():
        if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
            raise FileNotFoundError(f"{setting}={source}: there is no such folder, .pth file or Hub id")
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.txt"]))
    return *read_videomamba(folder, f"{setting}={source}"), folder


def encoder_weights(source: str, setting: str = "model") -> tuple[VideoMambaConfig, dict[str, Tensor]]:
    """Configuration and weights, named as in the encoder, of what `stored_model` finds. A classifier's head comes as
    `head.weight` and `head.bias`; of a retrieval model what reads texts is left aside.

    Raises:
        FileNotFoundError: there is no such model. ValueError: it is no VideoMamba.
    """
    fields, stored, _ = stored_model(source, setting)
    if "vision_config" in fields:
        start, fields = "vision_encoder.", fields["vision_config"]
    else:
        start = "videomamba." if any(name.startswith("videomamba.") for name in stored) else ""
    weights = {name.removeprefix(start): t for name, t in stored.items() if name.startswith((start, "head."))}
    return VideoMambaConfig.from_dict(fields), weights


def model_config(recipe: VideoMambaRecipe, drop_path_rate: float, **fields: Any) -> VideoMambaConfig:
    """The configuration of a fresh model, as the recipe says."""
    own = recipe.model_config or {}
    asked = {
        "image_size": recipe.image_size,
        "tubelet_size": recipe.tubelet_size,
        "num_frames": recipe.num_frames,
        "drop_path_rate": drop_path_rate,
        **fields,
    }
    return VideoMambaConfig.preset(recipe.model_size, **{**asked, **own})


def starting_encoder(
    recipe: VideoMambaRecipe, drop_path_rate: float, setting: str = "model", **fields: Any
) -> tuple[VideoMambaConfig, dict[str, Tensor]]:
    """Configuration and weights (none of a fresh model) for the recipe's clips.

    Args:
        setting: that names the model, for messages. fields: of the configuration, over what the model to start from
            has.

    Raises:
        ValueError: the model is one of videos, and a model of pictures is asked for; and what `encoder_weights`
            raises.
    """
    if recipe.model is None:
        return model_config(recipe, drop_path_rate, **fields), {}
    config, weights = encoder_weights(recipe.model, setting)
    if config.is_video and recipe.tubelet_size is None:
        raise ValueError(f"{setting}={recipe.model} takes clips: it cannot become a model of pictures")
    asked = {**(recipe.model_config or {})}
    side = asked.pop("image_size", recipe.image_size)
    frames = None if recipe.tubelet_size is None else asked.pop("num_frames", recipe.num_frames)
    config = resize_clips(config, weights, frames, side, recipe.tubelet_size or 1)
    kept = {name: value for name, value in config.to_dict().items() if name not in ("id2label", "label2id")}
    if "num_labels" not in fields and "id2label" not in fields:
        kept |= {"id2label": config.id2label, "label2id": config.label2id}
    return VideoMambaConfig.from_dict({**kept, "drop_path_rate": drop_path_rate, **asked, **fields}), weights


def load_encoder_(model: nn.Module, weights: dict[str, Tensor], source: str | None, setting: str = "model") -> None:
    """Put an encoder's weights into `model.videomamba`.

    Raises:
        ValueError: something is missing, or has another shape.
    """
    wanted = model.videomamba.state_dict()
    wrong = [name for name, value in wanted.items() if name not in weights or weights[name].shape != value.shape]
    if wrong:
        are = "is" if len(wrong) == 1 else "are"
        raise ValueError(f"{setting}={source} does not fit: {', '.join(wrong[:4])} {are} missing or of another shape")
    model.videomamba.load_state_dict({name: weights[name].to(value.dtype) for name, value in wanted.items()})


def starting_classifier(
    recipe: VideoMambaRecipe, drop_path_rate: float, classes: Sequence[str], regression: bool
) -> VideoMambaForVideoClassification:
    """A classifier with a class for each of `classes`, or one that predicts a value; a head with as many outputs is
    taken over from the model to start from, else it is fresh."""
    names = {0: "value"} if regression else dict(enumerate(classes))
    if recipe.num_labels is not None and not regression:
        if recipe.num_labels < len(names):
            raise ValueError(f"num_labels={recipe.num_labels}, but the training list has {len(names)} classes")
        names |= {number: str(number) for number in range(len(names), recipe.num_labels)}
    config, weights = starting_encoder(
        recipe,
        drop_path_rate,
        id2label=names,
        label2id={name: number for number, name in names.items()},
        problem_type="regression" if regression else "single_label_classification",
    )
    model = VideoMambaForVideoClassification(config)
    if weights:
        load_encoder_(model, weights, recipe.model)
        head = model.head.state_dict()
        if all(f"head.{name}" in weights and weights[f"head.{name}"].shape == t.shape for name, t in head.items()):
            model.head.load_state_dict({name: weights[f"head.{name}"] for name in head})
    return model


def layer_of(name: str, layers: int) -> int:
    """Number of a parameter's layer: 0 for what makes tokens, 1..layers for blocks, then the rest."""
    if any(part in name for part in _EMBEDDINGS):
        return 0
    found = _LAYER.search(name)
    return int(found[1]) + 1 if found else layers + 1


def decays(name: str, parameter: nn.Parameter, no_decay: Sequence[str] = NO_DECAY) -> bool:
    """Whether weight decay applies: to matrices and convolutions (`A_log` among them), not to vectors, biases, and
    what `no_decay` names (positions and the class token)."""
    return parameter.ndim > 1 and not name.endswith(".bias") and name.rpartition(".")[2] not in no_decay


def rate_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    *,
    rate: float,
    weight_decay: float,
    layers: int,
    layer_decay: float,
    of: str,
    no_decay: Sequence[str] = NO_DECAY,
) -> list[dict[str, Any]]:
    """An optimizer's parameter groups: the rate falls by `layer_decay` from layer to layer below the head.

    Args:
        no_decay: see `decays`.
        of: "layers" slows every layer, "embeddings" only what makes tokens, by `layer_decay ** (layers + 1)`.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        layer = layer_of(name, layers)
        scale = layer_decay ** (layers + 1 - layer) if of == "layers" or layer == 0 else 1.0
        groups.setdefault((scale, decays(name, parameter, no_decay)), []).append(parameter)
    ordered = sorted(groups.items(), key=lambda item: (-item[0][0], not item[0][1]))  # the log shows the first one's
    return [
        {"params": members, "lr": rate * scale, "weight_decay": weight_decay if decay else 0.0}
        for (scale, decay), members in ordered
    ]


@torch.no_grad()
def frozen(model: nn.Module) -> nn.Module:
    """A teacher: in evaluation mode, without gradients."""
    return model.eval().requires_grad_(False)
