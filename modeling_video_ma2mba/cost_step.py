"""Memory and time that one training step takes under one plan: what `planner` compares plans by.

Memory comes from `cost_memory` and `cost_vision`, seconds from `cost_time`.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .cost_memory import StackShape, Workload, host_bytes, plain_phases, stack_phases
from .cost_time import H200, MeasuredCosts, stack_seconds, vision_seconds
from .cost_vision import VisionLoad, vision_phases
from .recompute_plan import RecomputePlan


@dataclass(frozen=True)
class StepJob:
    """A training step to be predicted: sizes, what runs before the stack, and what is there in every phase.

    Attributes:
        weights, gradients, optimizer: bytes on the GPU. plain_segment: tokens per segment without checkpointing.
        input_follows_plan: the input lives where the kept activations live, as when `offload=True` was asked for;
            otherwise `work` says where it is.
    """

    shape: StackShape
    work: Workload
    vision: VisionLoad | None = None
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    plain_segment: int = 4096
    input_follows_plan: bool = False


@dataclass(frozen=True)
class Prediction:
    """What a step will take under a plan (None: no checkpointing).

    Attributes:
        gpu: bytes by what holds them, in the phase with the most. phase: that phase. phases: total bytes of each.
        host: pinned host bytes by what holds them. seconds: by part of the model.
        vision_chunk: frames that run through the tower together (`config.vision_chunk_frames`); None without any.
    """

    plan: RecomputePlan | None
    gpu: dict[str, int]
    phase: str
    phases: dict[str, int]
    host: dict[str, int]
    seconds: dict[str, float]
    vision_chunk: int | None = None

    @property
    def gpu_peak(self) -> int:
        """Bytes on the GPU at the worst moment."""
        return sum(self.gpu.values())

    @property
    def above_weights(self) -> int:
        """The same without weights, gradients and optimizer state."""
        return self.gpu_peak - sum(self.gpu.get(name, 0) for name in ("weights", "gradients", "optimizer"))

    @property
    def host_peak(self) -> int:
        """Pinned bytes in host memory."""
        return sum(self.host.values())

    @property
    def step_seconds(self) -> float:
        """Seconds of one forward and backward."""
        return sum(self.seconds.values())


class StackPart(NamedTuple):
    """The language model's part of a prediction, the same whatever runs before it."""

    work: Workload
    phases: dict[str, dict[str, float]]
    seconds: float


def predict_stack(job: StepJob, plan: RecomputePlan | None, costs: MeasuredCosts = H200) -> StackPart:
    """The language model's part of `job` under `plan`."""
    work = job.work
    if job.input_follows_plan and work.input_on_gpu != (plan is None or not plan.offload):
        work = replace(work, input_on_gpu=not work.input_on_gpu)
    phases = plain_phases(job.shape, work, job.plain_segment) if plan is None else stack_phases(job.shape, work, plan)
    return StackPart(work, phases, stack_seconds(job.shape, work, plan, costs))


def predict_job(
    job: StepJob, plan: RecomputePlan | None, costs: MeasuredCosts = H200, stack: StackPart | None = None
) -> Prediction:
    """Memory and time of `job` under `plan`; `plan=None` is training without checkpointing.

    Args:
        stack: from `predict_stack`, where it is known already.
    """
    work, phases, stack_time = predict_stack(job, plan, costs) if stack is None else stack
    seconds = {"language model": stack_time}
    if job.vision is not None:
        phases = phases | vision_phases(job.shape, work, job.vision)
        seconds["vision"] = vision_seconds(job.vision, costs)
    fixed = {"weights": job.weights, "gradients": job.gradients, "optimizer": job.optimizer}
    base = sum(fixed.values())
    totals = {name: base + int(sum(terms.values())) for name, terms in phases.items()}
    worst = max(totals, key=totals.__getitem__)
    gpu = fixed | {name: int(value) for name, value in phases[worst].items()}
    host = {name: int(value) for name, value in host_bytes(job.shape, work, plan).items()}
    chunk = None if job.vision is None else job.vision.chunk
    return Prediction(plan, gpu, worst, totals, host, seconds, chunk)


def predict(
    config: Any,
    plan: RecomputePlan | None,
    tokens: int,
    batch: int = 1,
    *,
    costs: MeasuredCosts = H200,
    kernels: bool = True,
    compute_bytes: int = 2,
    **workload: Any,
) -> Prediction:
    """Memory and time of one training step of the language model alone.

    Args:
        config: a `Ma2mbaTextConfig`, or a `VideoMa2mbaConfig` whose text part is taken.
        plan: the cut into cells, or None for no checkpointing.
        kernels: fused kernels (CUDA in 16 bits) or plain PyTorch. compute_bytes: bytes of an activation.
        workload: fields of `cost_memory.Workload` (kept, input_on_gpu, …); every parameter trains unless said.
    """
    text = getattr(config, "text_config", config)
    shape = StackShape.of(text, compute_bytes, kernels)
    workload.setdefault("layer_parameters", layer_parameter_count(shape))
    workload.setdefault("weight_bytes", compute_bytes)
    work = Workload(tokens, batch, **workload)
    weights = workload["weight_bytes"] * layer_parameter_count(shape) * shape.layers
    gradients = work.weight_bytes * work.layer_parameters * shape.layers
    return predict_job(StepJob(shape, work, weights=weights, gradients=gradients), plan, costs)


def layer_parameter_count(shape: StackShape) -> int:
    """Parameters of one block (without biases of the projections, which the pre-trained models lack)."""
    projections = shape.width * (shape.projected + shape.inner)
    return projections + shape.conv_dim * (shape.conv_kernel + 1) + 3 * shape.heads + shape.inner + shape.width
