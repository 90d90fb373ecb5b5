"""How much memory the vision part of a training step takes, term by term; `cost_memory` counts the language model's.

Legend as there: F frames, D width; everything is in bytes.
"""

from dataclasses import dataclass
from typing import Any

from .cost_memory import StackShape, Workload
from .vision_adapter import TowerCost
from .vision_towers import tower_adapter


@dataclass(frozen=True)
class VisionLoad:
    """What runs before the language model: a tower over frames, and the projector.

    `chunk`: frames that run together when the tower does not train (a quarter otherwise). `clip`: frames that cannot
    be taken apart.
    """

    frames: int
    tower: TowerCost
    tokens_per_frame: int
    chunk: int
    tower_trains: bool
    projector_trains: bool
    tower_parameters: int
    projector_parameters: int
    weight_bytes: int = 2
    clip: int = 1

    @property
    def together(self) -> int:
        """Frames that run together, and are differentiated together where the tower trains."""
        return max(self.clip, self.chunk // 4) if self.tower_trains else self.chunk

    @classmethod
    def of(cls, config: Any, frames: int, **fields: Any) -> "VisionLoad":
        """From a `VideoMa2mbaConfig`; `fields` are those that the configuration does not tell."""
        return cls(
            frames=frames,
            tower=tower_adapter(config.vision_config).cost(config),
            tokens_per_frame=config.tokens_per_frame,
            chunk=max(config.vision_chunk_frames, config.clip_frames),
            clip=config.clip_frames,
            **fields,
        )


def vision_kept(shape: StackShape, vision: VisionLoad) -> float:
    """What autograd keeps of all frames until vision's backward where they are not recomputed."""
    kept: float = vision.tokens_per_frame * shape.compute * (vision.tower.width + 4 * shape.width)
    if vision.tower_trains:
        kept += vision.tower.kept_bytes(shape.compute, vision.weight_bytes)
    return vision.frames * kept


def vision_phases(shape: StackShape, work: Workload, vision: VisionLoad) -> dict[str, dict[str, float]]:
    """GPU bytes of the phases in which frames run: before the language model, and after its backward."""
    frames = min(vision.frames, vision.chunk)
    inputs = shape.compute * shape.width * work.batch * work.tokens if work.input_on_gpu else 0
    features = 0.0  # a frozen tower's output is kept for the projector's backward, beside the rows
    if vision.projector_trains and not vision.tower_trains and work.input_on_gpu:
        features = vision.frames * vision.tokens_per_frame * vision.tower.width * shape.compute
    pixels = 8 * vision.tower.pixels
    layer = vision.tower.layer_bytes(shape.compute)
    projector = vision.tokens_per_frame * shape.compute * (vision.tower.width + 4 * shape.width)
    phases: dict[str, dict[str, float]] = {
        "vision": {
            "input": inputs,
            "vision": features + frames * (pixels + layer + projector),
            "workspace": shape.workspace,
        }
    }
    if not (vision.tower_trains or vision.projector_trains):
        return phases
    differentiated = frames
    parameters = vision.projector_parameters
    kept: float = projector
    if vision.tower_trains:
        differentiated = min(vision.frames, vision.together)
        parameters += vision.tower_parameters
        kept += vision.tower.kept_bytes(shape.compute, vision.weight_bytes) + layer + pixels
    sums = parameters * (max(4, vision.weight_bytes) + vision.weight_bytes)
    phases["vision's backward"] = {
        "input": inputs,  # only the gradient of the rows is left by now
        "vision": features + differentiated * kept + sums,
        "workspace": shape.workspace,
    }
    return phases
