"""How much memory the vision part of a training step takes, term by term; `cost_memory` counts the language model's.

Legend as there: F frames, D width; everything is in bytes.
"""

from dataclasses import dataclass
from typing import Any

from .cost_memory import StackShape, Workload


@dataclass(frozen=True)
class VisionLoad:
    """What runs before the language model: a tower of `layers` used layers over frames of `patches` tokens.

    `hidden_copies`: copies of the MLP's hidden width that its activation leaves for backward (3 for CLIP's quick GELU,
    2 for a fused GELU). `chunk`: frames that run together when nothing below is differentiated (a quarter otherwise).
    """

    frames: int
    layers: int
    width: int
    hidden: int
    hidden_copies: int
    heads: int
    patches: int
    pixels: int
    tokens_per_frame: int
    chunk: int
    tower_trains: bool
    projector_trains: bool
    tower_parameters: int
    projector_parameters: int
    weight_bytes: int = 2

    @classmethod
    def of(cls, config: Any, frames: int, **fields: Any) -> "VisionLoad":
        """From a `VideoMa2mbaConfig`; `fields` are those that the configuration does not tell."""
        vision = config.vision_config
        side = vision.image_size // vision.patch_size
        layer = config.vision_feature_layer
        clip = vision.model_type == "clip_vision_model"
        return cls(
            frames=frames,
            layers=layer if layer >= 0 else vision.num_hidden_layers + 1 + layer,
            width=vision.hidden_size,
            hidden=vision.intermediate_size,
            hidden_copies=3 if vision.hidden_act == "quick_gelu" else 2,
            heads=vision.num_attention_heads,
            patches=side * side + (1 if clip else 0),
            pixels=3 * vision.image_size**2,
            tokens_per_frame=config.tokens_per_frame,
            chunk=config.vision_chunk_frames,
            **fields,
        )


def tower_saved_per_token(vision: VisionLoad, compute: int) -> float:
    """What autograd keeps per patch token and layer of a CLIP or SigLIP encoder with fused attention.

    Under autocast (weights wider than the compute type) both norms read a stream in fp32, and query, key and value
    each keep a cast copy of the first one's result.
    """
    cast = 2 * (4 - compute) + 2 * compute if vision.weight_bytes > compute else 0
    widths = (8 * compute + cast) * vision.width + compute * vision.hidden_copies * vision.hidden
    return widths + 4 * (vision.heads + 4)


def vision_kept(shape: StackShape, vision: VisionLoad) -> float:
    """What autograd keeps of all frames until vision's backward where they are not recomputed."""
    kept = vision.tokens_per_frame * shape.compute * (vision.width + 4 * shape.width)
    if vision.tower_trains:
        kept += vision.layers * vision.patches * tower_saved_per_token(vision, shape.compute)
    return vision.frames * kept


def vision_phases(shape: StackShape, work: Workload, vision: VisionLoad) -> dict[str, dict[str, float]]:
    """GPU bytes of the phases in which frames run: before the language model, and after its backward."""
    frames = min(vision.frames, vision.chunk)
    inputs = shape.compute * shape.width * work.batch * work.tokens if work.input_on_gpu else 0
    features = 0  # a frozen tower's output is kept for the projector's backward, beside the rows
    if vision.projector_trains and not vision.tower_trains and work.input_on_gpu:
        features = vision.frames * vision.tokens_per_frame * vision.width * shape.compute
    pixels = 8 * vision.pixels
    mlp = shape.compute * vision.patches * (3 * vision.width + (vision.hidden_copies + 1) * vision.hidden)
    projector = vision.tokens_per_frame * shape.compute * (vision.width + 4 * shape.width)
    phases = {
        "vision": {
            "input": inputs,
            "vision": features + frames * (pixels + mlp + projector),
            "workspace": shape.workspace,
        }
    }
    if not (vision.tower_trains or vision.projector_trains):
        return phases
    differentiated = frames
    parameters = vision.projector_parameters
    kept = projector
    if vision.tower_trains:
        differentiated = min(vision.frames, max(1, vision.chunk // 4))
        parameters += vision.tower_parameters
        kept += vision.layers * vision.patches * tower_saved_per_token(vision, shape.compute) + mlp + pixels
    sums = parameters * (max(4, vision.weight_bytes) + vision.weight_bytes)
    phases["vision's backward"] = {
        "input": inputs,  # only the gradient of the rows is left by now
        "vision": features + differentiated * kept + sums,
        "workspace": shape.workspace,
    }
    return phases
