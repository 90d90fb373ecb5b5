"""From this package's layout back to the released one (`model_type: llava_mamba`)."""

from dataclasses import dataclass, field
from typing import Any

from video_ma2mba.modeling_video_ma2mba.configuration_video_ma2mba import VideoMa2mbaConfig

from .layouts import OFFICIAL, OURS, Layout
from .report import ConversionReport, TensorRow
from .tensor_plan import CheckpointSource, TensorPlan
from .tensor_store import TensorSpec

_EMBEDDING = f"{OURS.language}{OURS.embedding}.weight"


@dataclass
class OfficialTarget:
    """What will be written.

    Attributes:
        specs: name -> spec, in the order of the source.
        stored: name -> name in the source (not for `positions`).
        positions: names of position numbers, which our layout does not store.
    """

    specs: dict[str, TensorSpec]
    stored: dict[str, str]
    positions: set[str]
    report: ConversionReport = field(repr=False)


def official_target(plan: TensorPlan, source: CheckpointSource, record: dict[str, Any] | None) -> OfficialTarget:
    """Names in the released layout.

    Args:
        plan: of the source, whose layout is ours.
        record: of the conversion that the source came from, if it did: restores its very names. Without it, names as
            far as they are known, and a tied embedding written twice, as the released sizes show.
    """
    layout = Layout.from_dict(record["layout"]) if record else OFFICIAL
    has_head = record["has_head"] if record else True
    positions = {k: TensorSpec("I64", tuple(shape)) for k, shape in record["positions"].items()} if record else {}

    stored = {layout.stored(canonical): name for canonical, (_, name) in plan.tensors.items()}
    report = ConversionReport([source.name], [str(source.layout)])
    placed = {name: official for official, name in stored.items()}
    for name, spec in source.specs.items():
        became = placed.get(name)
        action = "left over" if became is None else ("kept" if became == name else "renamed")
        report.rows.append(TensorRow(name, action, became, spec.dtype, spec.shape))
    if plan.config.tie_word_embeddings and has_head:
        embedding = plan.tensors[_EMBEDDING][1]
        stored[layout.head] = embedding
        spec = source.specs[embedding]
        report.rows.append(TensorRow(embedding, "copied", layout.head, spec.dtype, spec.shape))
    specs = {official: source.specs[name] for official, name in stored.items()} | positions
    for name, spec in positions.items():
        report.rows.append(TensorRow(name, "recomputed", name, spec.dtype, spec.shape))
    report.parameters = sum(spec.numel for spec in specs.values())
    report.nbytes = sum(spec.nbytes for spec in specs.values())
    return OfficialTarget(specs, stored, set(positions), report)


def official_config(config: VideoMa2mbaConfig) -> dict[str, Any]:
    """config.json for a model that did not come from the released layout, in the words of mamba-ssm and LLaVA.

    The released config.json could not be read; what neither of the two has a word for is kept in ours.
    """
    text = config.text_config
    return {
        "model_type": "llava_mamba",
        "d_model": text.hidden_size,
        "n_layer": text.num_hidden_layers,
        "vocab_size": text.vocab_size,
        "ssm_cfg": {
            "layer": "Mamba2",
            "d_state": text.state_size,
            "headdim": text.head_dim,
            "expand": text.expand,
            "ngroups": text.n_groups,
            "d_conv": text.conv_kernel,
            "chunk_size": text.chunk_size,
        },
        "rms_norm": True,
        "residual_in_fp32": text.residual_in_fp32,
        "layer_norm_epsilon": text.layer_norm_epsilon,
        "time_step_limit": [str(limit) for limit in text.time_step_limit],  # JSON has no infinity
        "tie_embeddings": config.tie_word_embeddings,
        "bos_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_id,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "mm_spatial_pool_stride": config.spatial_pool_stride,
        "mm_spatial_pool_mode": config.spatial_pool_mode,
        "vision_config": config.vision_config.to_dict(),
    }
