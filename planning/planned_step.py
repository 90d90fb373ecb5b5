"""The step that `plan(...)` predicts, described from a configuration (parameters are counted by formula), or a model.

Needs neither torch nor transformers, unless it is given something of theirs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..modeling_video_ma2mba.configuration_sizes import Ma2mbaTextSizes, VideoMa2mbaSizes
from ..modeling_video_ma2mba.cost_memory import StackShape, Workload
from ..modeling_video_ma2mba.cost_step import StepJob, layer_parameter_count
from ..modeling_video_ma2mba.cost_vision import VisionLoad
from ..modeling_video_ma2mba.vision_towers import tower_adapter
from .adapters import Adapters
from .plan_options import DTYPES, OPTIMIZERS, PARTS, check_parts, require


@dataclass(frozen=True)
class Counts:
    """Parameters of a model, and which of them train.

    Attributes:
        total: all. trainable: those that train. layer: those of one Mamba-2 layer that train. tower: those of the
            vision tower that train and that features depend on. projector: those of the projector that train.
        projections_train, head_trains: whether a mixer's projections and the head train.
        projections: inputs and outputs of the two linear layers of a mixer.
        tower_sides: inputs and outputs, summed, of all linear layers of the tower that adapters are put on.
        plain_segment: tokens that run together outside of training.
    """

    total: int
    trainable: int
    layer: int
    tower: int
    projector: int
    projections_train: bool
    head_trains: bool
    projections: tuple[tuple[int, int], ...]
    tower_sides: int
    plain_segment: int


def counts_and_config(given: Any, train: Sequence[str] | None) -> tuple[Counts, Any]:
    """Parameters and configuration of a model, of a configuration, or of its sizes.

    Args:
        train: parts of a configuration's model that train, all if None; a model says that by itself.
    """
    is_model = hasattr(given, "named_modules")
    config = getattr(given, "config", None) if is_model else given
    if getattr(config, "model_type", None) == "mamba2":
        config = VideoMa2mbaSizes(text_config=config.to_dict(), video_token_id=0).text_config
    kind = getattr(config, "model_type", None)
    require(
        kind in (VideoMa2mbaSizes.model_type, Ma2mbaTextSizes.model_type),
        f"{type(given).__name__} ({kind}) has no Mamba-2 blocks of Video-Ma2mba: there is nothing to plan",
    )
    if not is_model:
        return counts_of_config(config, PARTS if train is None else train), config
    require(train is None, "train is for configurations: a model's own requires_grad says what trains")
    while hasattr(given, "get_base_model"):  # PEFT
        given = given.get_base_model()
    return counts_of_model(given, config), config


def counts_of_config(config: Any, parts: Sequence[str]) -> Counts:
    """Of a fresh model of which exactly these of `PARTS` train; the head belongs to the language model, layers of the
    tower above the one whose features are used stay frozen."""
    check_parts(parts)
    text = getattr(config, "text_config", config)
    shape = StackShape.of(text)
    layer = layer_parameter_count(shape) - (0 if text.use_conv_bias else text.conv_dim)
    layer += shape.projected + shape.width if text.use_bias else 0
    language = text.vocab_size * text.hidden_size + text.num_hidden_layers * layer + text.hidden_size
    projector = used = above = sides = 0
    if text is not config:
        language += 0 if config.tie_word_embeddings else text.vocab_size * text.hidden_size
        tower = tower_adapter(config.vision_config).parameters(config)
        used, above, sides = tower.used, tower.total - tower.used, tower.lora_sides
        width = text.hidden_size
        projector = (config.vision_config.hidden_size + 1) * width + (width + 1) * width
    numbers = {"lm": language, "projector": projector, "vision": used}
    trains = {part: number if part in parts else 0 for part, number in numbers.items()}
    return Counts(
        total=sum(numbers.values()) + above,
        trainable=sum(trains.values()),
        layer=layer if "lm" in parts else 0,
        tower=trains["vision"],
        projector=trains["projector"],
        projections_train="lm" in parts,
        head_trains="lm" in parts,
        projections=((shape.width, shape.projected), (shape.inner, shape.width)),
        tower_sides=sides,
        plain_segment=getattr(config, "prefill_segment_length", 8192),
    )


def counts_of_model(model: Any, config: Any) -> Counts:
    """Of a `VideoMa2mbaForConditionalGeneration` or a `Ma2mbaTextModel`, whose `requires_grad` says what trains."""
    base = getattr(model, "model", model)
    stack = getattr(base, "language_model", base)
    mixer, head = stack.layers[0].mixer, getattr(model, "lm_head", stack.embeddings)
    tower = projector = sides = 0
    if hasattr(base, "vision_tower"):
        adapter = tower_adapter(config.vision_config)
        tower = _count(*adapter.used_modules(base.vision_tower, config), trainable=True)
        projector = _count(base.multi_modal_projector, trainable=True)
        names = adapter.lora_targets
        named = (part for name, part in base.vision_tower.named_modules() if name.rsplit(".", 1)[-1] in names)
        sides = sum(part.in_features + part.out_features for part in named)
    return Counts(
        total=_count(model),
        trainable=_count(model, trainable=True),
        layer=_count(stack.layers, trainable=True) // len(stack.layers),
        tower=tower,
        projector=projector,
        projections_train=any(p.requires_grad for layer in stack.layers for p in layer.mixer.in_proj.parameters()),
        head_trains=any(p.requires_grad for p in head.parameters()),
        projections=tuple((part.in_features, part.out_features) for part in (mixer.in_proj, mixer.out_proj)),
        tower_sides=sides,
        plain_segment=stack.prefill_segment_length,
    )


def _count(*modules: Any, trainable: bool = False) -> int:
    unique = {id(p): p for module in modules for p in module.parameters()}
    return sum(p.numel() for p in unique.values() if p.requires_grad or not trainable)


def describe_step(
    counts: Counts,
    config: Any,
    tokens: int,
    frames: int | None,
    batch: int,
    optimizer: str,
    dtype: str,
    labels: int,
    adapters: Adapters | None = None,
) -> StepJob:
    """The step of a model; sizes are those of one GPU.

    Args:
        config: of the whole model, or of the language model.
        adapters: train in place of the language model (which must be frozen, as the tower) and beside the projector.
    """
    weight_bytes, compute_bytes = DTYPES[dtype]
    text = getattr(config, "text_config", config)
    shape = StackShape.of(text, compute_bytes, kernels=compute_bytes == 2)
    layer_parameters, layers = counts.layer, text.num_hidden_layers
    sizes = [(counts.trainable, weight_bytes)]  # what trains: parameters, and bytes of each
    weights = counts.total * weight_bytes
    in_tower = 0
    if adapters is not None:
        layer_parameters = adapters.beside(counts.projections)
        in_tower = adapters.rank * counts.tower_sides if adapters.vision else 0
        sizes.append((layer_parameters * layers + in_tower, adapters.itemsize))
        # PEFT keeps the frozen projector beside the one that trains.
        saved = adapters.saved_weights(counts.projections, layers, weight_bytes)
        weights += int(sum(count * size for count, size in sizes) - saved)
    vision = None
    if frames is not None:
        vision = VisionLoad.of(
            config,
            max(1, frames * batch),
            tower_trains=bool(in_tower or counts.tower),
            projector_trains=bool(counts.projector),
            tower_parameters=in_tower or counts.tower,
            projector_parameters=counts.projector,
            weight_bytes=weight_bytes,
        )
    work = Workload(
        tokens=tokens,
        batch=batch,
        kept=min(labels, tokens) * batch,
        layer_parameters=layer_parameters,
        weight_bytes=weight_bytes if adapters is None else adapters.itemsize,
        autocast=dtype == "mixed",
        projections_train=adapters is not None or counts.projections_train,
        head_trains=counts.head_trains,
        input_gradient=adapters is not None or counts.trainable > layer_parameters * layers,
    )
    return StepJob(
        shape,
        work,
        vision=vision,
        weights=weights,
        gradients=sum(count * size for count, size in sizes),
        optimizer=int(sum(count * OPTIMIZERS[optimizer](size) for count, size in sizes)),
        plain_segment=counts.plain_segment,
        input_follows_plan=True,
    )
