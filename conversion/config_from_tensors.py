"""Configuration of a model from the shapes of its tensors, and from config.json where shapes cannot tell.

Shapes say all widths and numbers of layers. They do not say: the tower's attention heads, which hidden state feeds the
projector, the pooling, the SSM's groups and chunk size; those come from config.json, else from the paper's choices.
Where config.json contradicts the tensors, the checkpoint is refused: it is damaged, or of another model.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from video_ma2mba.modeling_video_ma2mba.configuration_video_ma2mba import Ma2mbaTextConfig, VideoMa2mbaConfig

from .layouts import OURS, PARTS
from .report import ConversionError
from .tensor_store import TensorSpec

# Attention heads of the public CLIP and SigLIP towers by width: no tensor shows them.
_HEADS = {"clip_vision_model": {768: 12, 1024: 16, 1280: 16, 1664: 16}, "siglip_vision_model": {768: 12, 1152: 16}}
# Layers of the towers that training configurations name, to notice a checkpoint that lost its last ones.
_TOWER_LAYERS = {"clip-vit-large-patch14-336": 24, "clip-vit-large-patch14": 24}
# Side in pixels where it is no multiple of the patch (27 patches of 14 are 378): the tower ignores the rest.
_IMAGE_SIZES = {"siglip-so400m-patch14-384": 384}
# LLaVA drops the last of SigLIP-so400m's 27 layers and takes what is then the last: hidden state -1, not -2.
_CUT_SIGLIP = (1152, 26)
_POOL_MODES = ("bilinear", "average")

Specs = Mapping[str, TensorSpec]


def text_config_from_tensors(specs: Specs, declared: Mapping[str, Any], source: str) -> Ma2mbaTextConfig:
    """Language model configuration.

    Args:
        specs: canonical name -> spec; names of other parts are ignored.
        declared: fields of transformers' or state-spaces' config.json (may be empty).
        source: for messages.

    Raises:
        ConversionError: tensors that the sizes are read from are missing, or contradict config.json.
    """
    shape = _Shapes(specs, OURS.language, source, "language model")
    rows, width = shape.of("embeddings.weight", 2)
    layers = shape.count_layers()
    heads = shape.of("layers.*.mixer.A_log", 1)[0]
    inner = shape.of("layers.*.mixer.norm.weight", 1)[0]
    conv_dim, _, kernel = shape.of("layers.*.mixer.conv1d.weight", 3)
    ssm = declared.get("ssm_cfg") or {}
    groups = declared.get("n_groups") or ssm.get("ngroups") or 1
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_heads": heads,
        "head_dim": inner // heads,
        "expand": inner // width,
        "state_size": (conv_dim - inner) // (2 * groups),
        "conv_kernel": kernel,
    }
    said = {
        "hidden_size": declared.get("hidden_size", declared.get("d_model")),
        "num_hidden_layers": declared.get("num_hidden_layers", declared.get("n_layer")),
        "num_heads": declared.get("num_heads"),
        "head_dim": declared.get("head_dim", ssm.get("headdim")),
        "expand": declared.get("expand", ssm.get("expand")),
        "state_size": declared.get("state_size", ssm.get("d_state")),
        "conv_kernel": declared.get("conv_kernel", ssm.get("d_conv")),
    }
    _agree(said, sizes, source)
    if ssm.get("norm_before_gate"):
        raise ValueError(f"{source} normalises before the gate (norm_before_gate), which this model does not")
    optional = {
        "chunk_size": declared.get("chunk_size", ssm.get("chunk_size")),
        "layer_norm_epsilon": declared.get("layer_norm_epsilon", declared.get("norm_epsilon")),
        "time_step_limit": declared.get("time_step_limit", ssm.get("dt_limit")),
        "residual_in_fp32": declared.get("residual_in_fp32"),
        "bos_token_id": declared.get("bos_token_id"),
        "eos_token_id": declared.get("eos_token_id"),
    }
    return Ma2mbaTextConfig(
        vocab_size=rows,
        n_groups=groups,
        use_bias=shape.has("layers.*.mixer.in_proj.bias"),
        use_conv_bias=shape.has("layers.*.mixer.conv1d.bias"),
        **sizes,
        **{key: value for key, value in optional.items() if value is not None},
    )


def vision_fields_from_tensors(
    specs: Specs, declared: Mapping[str, Any], tower_name: str | None, source: str
) -> dict[str, Any]:
    """Vision configuration as a dictionary.

    Args:
        specs: canonical name -> spec; names of other parts are ignored.
        declared: fields of a CLIP or SigLIP vision configuration (may be empty).
        tower_name: `mm_vision_tower` of config.json, if it says.
        source: for messages.

    Raises:
        ConversionError: as `text_config_from_tensors`. ValueError: the number of attention heads cannot be told.
    """
    shape = _Shapes(specs, OURS.tower, source, "vision tower")
    width, channels, patch, _ = shape.of("embeddings.patch_embedding.weight", 4)
    positions = shape.of("embeddings.position_embedding.weight", 2)[0]
    clip = shape.has("embeddings.class_embedding")
    model_type = "clip_vision_model" if clip else "siglip_vision_model"
    name = (tower_name or "").rstrip("/").rpartition("/")[2]  # may be a directory of the authors' machine
    side = round((positions - clip) ** 0.5)
    image_size = declared.get("image_size", _IMAGE_SIZES.get(name, side * patch))
    sizes = {
        "hidden_size": width,
        "intermediate_size": shape.of("encoder.layers.*.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": shape.count_layers("encoder."),
        "image_size": image_size if image_size // patch == side else side * patch,
        "patch_size": patch,
        "num_channels": channels,
    }
    _agree({"num_hidden_layers": _TOWER_LAYERS.get(name), **declared}, sizes, source)
    fields = {**declared, **sizes, "model_type": model_type}
    if "num_attention_heads" not in declared:
        heads = _HEADS[model_type].get(width)
        if heads is None:
            raise ValueError(
                f"the attention heads of {source}'s vision tower (width {width}) cannot be told from its tensors: "
                "name a checkpoint or directory whose config.json says, with vision_config="
            )
        fields["num_attention_heads"] = heads
    if not clip:
        fields["vision_use_head"] = shape.has("head.probe")
    return fields


def model_config(
    text_config: Ma2mbaTextConfig,
    vision_fields: dict[str, Any],
    declared: Mapping[str, Any],
    statistics: Mapping[str, list[float]],
    tie: bool,
) -> VideoMa2mbaConfig:
    """Whole configuration. `declared` holds LLaVA's `mm_*` fields, if any; `<video>` gets its id from the tokenizer.

    Raises:
        ValueError: a projector, pooling or choice of features that this model does not have.
    """
    supported = {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_spatial_pool_mode": _POOL_MODES,
        "mm_vision_select_feature": ("patch",),
        "mm_patch_merge_type": ("flat",),
    }
    for field, values in supported.items():
        if declared.get(field, values[0]) not in values:
            raise ValueError(f"{field}={declared[field]!r} is not supported: this model has {' or '.join(values)}")
    cut = (vision_fields["hidden_size"], vision_fields["num_hidden_layers"]) == _CUT_SIGLIP
    return VideoMa2mbaConfig(
        text_config,
        vision_fields,
        video_token_id=min(50277, text_config.vocab_size - 1),
        vision_feature_layer=-1 if cut else declared.get("mm_vision_select_layer", -2),
        spatial_pool_stride=declared.get("mm_spatial_pool_stride", 2),
        spatial_pool_mode=declared.get("mm_spatial_pool_mode", "bilinear"),
        tie_word_embeddings=tie,
        **statistics,
    )


def _agree(said: Mapping[str, Any], found: Mapping[str, Any], source: str) -> None:
    wrong = [
        f"{key} is {value} by the tensors, {said[key]} by the configuration"
        for key, value in found.items()
        if said.get(key) is not None and said[key] != value
    ]
    if wrong:
        raise ConversionError(source, {"contradicting": wrong})


class _Shapes:
    """Shapes of one part. `*` in a name stands for any layer: the most frequent shape counts, so that one wrong layer
    is reported as wrong instead of redefining the model."""

    def __init__(self, specs: Specs, prefix: str, source: str, part: str) -> None:
        self._shapes = {k.removeprefix(prefix): spec.shape for k, spec in specs.items() if k.startswith(prefix)}
        self._source, self._part = source, part

    def has(self, name: str) -> bool:
        return bool(self._matching(name))

    def of(self, name: str, ndim: int) -> tuple[int, ...]:
        found = self._matching(name)
        if not found:
            raise ConversionError(self._source, {"missing": [f"{name} of the {self._part}"]})
        shape = Counter(found).most_common(1)[0][0]
        if len(shape) != ndim or 0 in shape:
            raise ConversionError(
                self._source, {"mis-shaped": [f"{name} of the {self._part} is {list(shape)}, not {ndim}-dimensional"]}
            )
        return shape

    def count_layers(self, prefix: str = "") -> int:
        numbers = [
            int(key.removeprefix(f"{prefix}layers.").partition(".")[0])
            for key in self._shapes
            if key.startswith(f"{prefix}layers.")
        ]
        if not numbers:
            raise ConversionError(self._source, {"missing": [f"{prefix}layers.* of the {self._part}"]})
        return max(numbers) + 1

    def _matching(self, name: str) -> list[tuple[int, ...]]:
        before, star, after = name.partition("*")
        if not star:
            return [self._shapes[name]] if name in self._shapes else []
        return [shape for key, shape in self._shapes.items() if key.startswith(before) and key.endswith(after)]


def missing_parts(specs: Specs) -> list[str]:
    """Names of the parts that no tensor belongs to."""
    return [title for part, title in PARTS.items() if not any(key.startswith(getattr(OURS, part)) for key in specs)]
