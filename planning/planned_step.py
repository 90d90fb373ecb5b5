"""The step that `plan(...)` predicts, described from a model or a configuration: parameters are counted only."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..modeling_video_ma2mba.configuration_video_ma2mba import Ma2mbaTextConfig, VideoMa2mbaConfig
from ..modeling_video_ma2mba.cost_memory import StackShape, Workload
from ..modeling_video_ma2mba.cost_step import StepJob
from ..modeling_video_ma2mba.cost_vision import VisionLoad
from ..modeling_video_ma2mba.vision_features import used_tower_modules
from ..modeling_video_ma2mba.vision_towers import tower_adapter
from .adapters import Adapters
from .plan_options import DTYPES, OPTIMIZERS, PARTS, check_parts, require


def model_and_config(given: Any, train: Sequence[str] | None) -> tuple[nn.Module, Any]:
    """A model (on the meta device for a configuration) with `requires_grad` set, and its configuration."""
    if isinstance(given, nn.Module):
        model, config = given, getattr(given, "config", None)
        while hasattr(model, "get_base_model"):  # PEFT
            model = model.get_base_model()
    else:
        model, config = None, given
        if getattr(config, "model_type", None) == "mamba2":
            config = VideoMa2mbaConfig(text_config=config.to_dict(), video_token_id=0).text_config
        parts = PARTS if train is None else train
    kind = getattr(config, "model_type", None)
    require(
        kind in (VideoMa2mbaConfig.model_type, Ma2mbaTextConfig.model_type),
        f"{type(given).__name__} ({kind}) has no Mamba-2 blocks of Video-Ma2mba: there is nothing to plan",
    )
    if model is None:
        # Imported here: the models import the engine, and the engine the planner.
        from ..modeling_video_ma2mba.modeling_video_ma2mba import VideoMa2mbaForConditionalGeneration
        from ..modeling_video_ma2mba.stack_language_model import Ma2mbaTextModel

        with torch.device("meta"):
            whole = kind == VideoMa2mbaConfig.model_type
            model = VideoMa2mbaForConditionalGeneration(config) if whole else Ma2mbaTextModel(config)
        set_trainable(model, parts)
    elif train is not None:
        raise ValueError("train is for configurations: a model's own requires_grad says what trains")
    return model, config


def set_trainable(model: nn.Module, parts: Sequence[str]) -> None:
    """Let exactly these of `PARTS` train; the head belongs to the language model, unused layers stay frozen."""
    check_parts(parts)
    base = getattr(model, "model", model)
    model.requires_grad_("lm" in parts)
    if hasattr(base, "vision_tower"):
        base.multi_modal_projector.requires_grad_("projector" in parts)
        base.vision_tower.requires_grad_("vision" in parts)
        base.freeze_unused_parameters()


def _count(*modules: nn.Module, trainable: bool = False) -> int:
    unique = {id(p): p for module in modules for p in module.parameters()}
    return sum(p.numel() for p in unique.values() if p.requires_grad or not trainable)


def describe_step(
    model: nn.Module,
    config: Any,
    tokens: int,
    frames: int | None,
    batch: int,
    optimizer: str,
    dtype: str,
    labels: int,
    adapters: Adapters | None = None,
) -> StepJob:
    """The step of a model whose `requires_grad` says what trains; sizes are those of one GPU.

    Args:
        adapters: train in place of the language model (which must be frozen, as the tower) and beside the projector.
    """
    weight_bytes, compute_bytes = DTYPES[dtype]
    base = getattr(model, "model", model)
    stack = getattr(base, "language_model", base)
    shape = StackShape.of(stack.config, compute_bytes, kernels=compute_bytes == 2)
    layer_parameters = _count(stack.layers, trainable=True) // len(stack.layers)
    mixers = [layer.mixer for layer in stack.layers]
    trainable = _count(model, trainable=True)
    head = getattr(model, "lm_head", stack.embeddings)
    sizes = [(trainable, weight_bytes)]  # what trains: parameters, and bytes of each
    weights = _count(model) * weight_bytes
    in_tower = 0
    if adapters is not None:
        layer_parameters = adapters.in_language_model(stack)
        added = layer_parameters * len(stack.layers)
        if hasattr(base, "vision_tower"):
            in_tower = adapters.in_tower(base.vision_tower, tower_adapter(config.vision_config).lora_targets)
        sizes.append((added + in_tower, adapters.itemsize))
        # PEFT keeps the frozen projector beside the one that trains.
        weights += int(sum(count * size for count, size in sizes) - adapters.saved_weights(stack, weight_bytes))
    vision = None
    if frames is not None:
        tower, projector = base.vision_tower, base.multi_modal_projector
        used = list(used_tower_modules(tower, config))
        vision = VisionLoad.of(
            config,
            max(1, frames * batch),
            tower_trains=bool(in_tower or _count(*used, trainable=True)),
            projector_trains=bool(_count(projector, trainable=True)),
            tower_parameters=in_tower or _count(*used, trainable=True),
            projector_parameters=_count(projector, trainable=True),
            weight_bytes=weight_bytes,
        )
    work = Workload(
        tokens=tokens,
        batch=batch,
        kept=min(labels, tokens) * batch,
        layer_parameters=layer_parameters,
        weight_bytes=weight_bytes if adapters is None else adapters.itemsize,
        autocast=dtype == "mixed",
        projections_train=adapters is not None
        or any(p.requires_grad for mixer in mixers for p in mixer.in_proj.parameters()),
        head_trains=any(p.requires_grad for p in head.parameters()),
        input_gradient=adapters is not None or trainable > layer_parameters * len(stack.layers),
    )
    return StepJob(
        shape,
        work,
        vision=vision,
        weights=weights,
        gradients=sum(count * size for count, size in sizes),
        optimizer=int(sum(count * OPTIMIZERS[optimizer](size) for count, size in sizes)),
        plain_segment=getattr(stack, "prefill_segment_length", 4096),
        input_follows_plan=True,
    )
