"""What several GPUs that share one video take: the plan of a training step, and of reading.

Sequence parallelism cuts a video into segments that are dealt round-robin to the GPUs (`docs/sequence_parallel.md`). A
GPU then has the memory of its own segments, and waits for its neighbours while the wave fills and drains.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..modeling_video_ma2mba.cost_memory import forward_temporaries_per_token
from ..modeling_video_ma2mba.cost_search import (
    Limits,
    candidate_plans,
    chunks_by_speed,
    fastest,
    leanest,
    segment_lengths,
    some_plan_fits,
    vision_chunks,
)
from ..modeling_video_ma2mba.cost_step import Prediction, StepJob, predict_job
from ..modeling_video_ma2mba.cost_time import H200, MeasuredCosts, cell_seconds, stack_seconds, vision_seconds
from ..modeling_video_ma2mba.cost_vision import vision_phases
from ..modeling_video_ma2mba.parallel_dims import reading_blocks
from ..modeling_video_ma2mba.recompute_plan import RecomputePlan
from .plan_options import DTYPES, require
from .planned_step import counts_and_config, describe_step
from .sequence_simulation import Links, wave_seconds


@dataclass(frozen=True)
class SharedPlan:
    """How GPUs share a step.

    Attributes:
        gpus, nodes: in all. sequence: GPUs that share one sample; copies: such groups, each with samples of its own.
        segments: of one sample; each GPU has `segments / sequence` of them, rounded up.
        idle_share: the part of a step that a GPU waits for its neighbours. message_bytes: what they hand each other.
        host_per_node: pinned bytes on one machine, all its GPUs together.
        one_gpu_seconds: the fastest step of the same samples on one GPU with the whole machine's host memory, one
            after the other; None where it fits no plan.
    """

    gpus: int
    nodes: int
    sequence: int
    copies: int
    schedule: str
    segments: int
    idle_share: float
    message_bytes: float
    host_per_node: float
    one_gpu_seconds: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `plan --json`."""
        return asdict(self)


def ranks_of(gpus: int, layers: int, tokens: int) -> int:
    """How many of `gpus` share a sample: all, where each can have a block of layers and a segment of its own; else the
    most that divides them."""
    most = min(gpus, layers, max(1, tokens // 256))
    return max(n for n in range(1, most + 1) if gpus % n == 0)


def shared_gradients(job: StepJob) -> int:
    """Bytes of gradients on one of several GPUs: in fp32 until they are added up, whatever the weights are in."""
    return job.gradients * max(4, job.work.weight_bytes) // job.work.weight_bytes


def shared_jobs(job: StepJob, ranks: int) -> Iterator[StepJob]:
    """The step of one of `ranks` for every useful number of segments; each rank has as many as the others."""
    work = job.work
    for length in segment_lengths(-(-work.tokens // ranks), job.shape.longest_segment // work.batch):
        segments = -(-work.tokens // length)
        own = min(-(-segments // ranks) * length, work.tokens)
        frames = job.vision and replace(job.vision, frames=-(-job.vision.frames // ranks))
        yield replace(job, work=replace(work, tokens=own, ranks=ranks, segment=length), vision=frames)


def shared_predictions(
    job: StepJob, ranks: int, place: bool, limits: Limits, costs: MeasuredCosts, links: Links, gpus: int
) -> tuple[Prediction, bool]:
    """The fastest step whose kept activations live on the host (`place`) or the GPU, and whether it fits; where none
    does, the smallest."""
    found: list[Prediction] = []
    for of_chunk in chunks_by_speed(job, costs):
        for own in shared_jobs(of_chunk, ranks):
            plans = candidate_plans(own, (place,), segment_length=own.work.segment)
            best = fastest(own, plans, limits, costs)
            found += [] if best is None else [best]
        if found:
            break
    best = leanest(found)
    if best is None:
        smallest = (
            predict_job(own, plan, costs)
            for own in shared_jobs(vision_chunks(job)[-1], ranks)
            for plan in candidate_plans(own, (place,), segment_length=own.work.segment)
        )
        return min(smallest, key=lambda p: p.gpu_peak), False
    summed = links.sum(job.gradients, gpus)
    return replace(best, seconds={**best.seconds, "sum of gradients": summed}), True


def longest_shared(job: StepJob, ranks: int, limits: Limits, upper: int, costs: MeasuredCosts, resize: Any) -> int:
    """Tokens of the longest sample for which some plan fits, up to `upper`; 0 if none does.

    Args:
        resize: gives the job of another number of tokens.
    """

    def fits(tokens: int) -> bool:
        shorter = resize(job, tokens)
        return any(
            some_plan_fits(own, candidate_plans(own, segment_length=own.work.segment), limits, costs)
            for own in shared_jobs(shorter, ranks)
        )

    low, high = 0, 256 * ranks
    while high <= upper and fits(high):
        low, high = high, high * 2
    while high - low > max(256 * ranks, low // 50):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def shared_plan(
    job: StepJob,
    prediction: Prediction,
    ranks: int,
    gpus: int,
    per_node: int,
    one_gpu: Prediction | None,
    costs: MeasuredCosts,
) -> SharedPlan:
    """Facts about a plan that was chosen."""
    plan = prediction.plan
    assert plan is not None, "a step that ranks share is cut into cells"
    blocks, segments = len(plan.blocks(job.shape.layers)), -(-job.work.tokens // plan.segment_length)
    tokens = min(-(-segments // ranks) * plan.segment_length, job.work.tokens)
    own = replace(job.work, tokens=tokens, ranks=ranks, segment=plan.segment_length)
    total = stack_seconds(job.shape, own, plan, costs)
    busy = stack_seconds(job.shape, replace(own, ranks=1), plan, costs)
    here = min(gpus, per_node)
    copies = gpus // ranks
    return SharedPlan(
        gpus=gpus,
        nodes=-(-gpus // per_node),
        sequence=ranks,
        copies=copies,
        schedule="round_robin",
        segments=segments,
        idle_share=1 - busy / total,
        message_bytes=job.shape.layers / blocks * job.work.batch * job.shape.state_bytes,
        host_per_node=prediction.host_peak * here,
        one_gpu_seconds=one_gpu and one_gpu.step_seconds * copies,
    )


@dataclass(frozen=True)
class ReadingReport:
    """What reading one video into a state takes, decoding its file not included.

    Attributes:
        seconds: by part, of the slowest of `gpus`. one_gpu_seconds: of one. segments, blocks: cells.
        gpu: bytes by what holds them; they do not depend on the video's length. state_bytes: of the result.
    """

    tokens: int
    frames: int | None
    gpus: int
    segments: int
    blocks: int
    idle_share: float
    seconds: dict[str, float]
    one_gpu_seconds: float
    gpu: dict[str, float]
    state_bytes: int
    message_bytes: float
    hardware: str

    @property
    def total_seconds(self) -> float:
        """Seconds in all."""
        return sum(self.seconds.values())

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {**asdict(self), "total_seconds": self.total_seconds, "gpu_peak_bytes": sum(self.gpu.values())}


def plan_reading(
    model_or_config: Any,
    *,
    tokens: int | None = None,
    frames: int | None = None,
    gpus: int = 1,
    dtype: str = "bfloat16",
    costs: MeasuredCosts = H200,
    links: Links | None = None,
) -> ReadingReport:
    """What reading a video takes on `gpus` that share it out, beside one: predictions from measured constants.

    Args:
        model_or_config: as for `plan`. tokens, frames: length of the video, one of them.
        gpus: processes of `torchrun … read`. dtype: as for `plan`.

    Raises:
        ValueError: a wrong argument, or a model without Mamba-2 blocks.
    """
    require(gpus >= 1, f"gpus={gpus} is not valid: it must be at least 1")
    require(dtype in DTYPES, f"dtype={dtype!r} is unknown: use one of {sorted(DTYPES)}")
    require((tokens is None) != (frames is None), "give either tokens or frames")
    counts, config = counts_and_config(model_or_config, () if not hasattr(model_or_config, "parameters") else None)
    per_frame = getattr(config, "tokens_per_frame", None)
    require(frames is None or per_frame is not None, "frames need a vision tower, and this is a language model alone")
    if frames is not None and per_frame is not None:
        tokens = frames * per_frame
    elif per_frame is not None:
        frames = -(-(tokens or 0) // per_frame)
    require(bool(tokens and tokens >= 1), f"tokens={tokens} is not valid: it must be at least 1")
    assert tokens is not None
    job = describe_step(counts, config, tokens, frames, 1, "none", dtype, 1)
    length = config.read_chunk_frames * per_frame if per_frame is not None else job.plain_segment
    segments, blocks = math.ceil(tokens / length), reading_blocks(job.shape.layers, gpus)
    plan = RecomputePlan(len(blocks[0]), length)
    work = replace(job.work, tokens=tokens, ranks=1, segment=0)
    cell = cell_seconds(job.shape, work, plan, min(length, tokens), False, costs)[0]
    message = (links or Links()).message(0, 1, len(blocks[0]) * job.shape.state_bytes)
    busy = len(blocks) * segments * cell
    stack = wave_seconds(len(blocks), segments, gpus, cell, message)
    seconds, one = {"language model": stack}, busy
    if job.vision is not None:
        frozen = replace(job.vision, tower_trains=False, projector_trains=False)
        seconds["vision"] = vision_seconds(replace(frozen, frames=-(-frozen.frames // min(gpus, segments))), costs)
        one += vision_seconds(frozen, costs)
    return ReadingReport(
        tokens=tokens,
        frames=frames,
        gpus=gpus,
        segments=segments,
        blocks=len(blocks),
        idle_share=max(0.0, 1 - busy / min(gpus, segments) / stack),
        seconds=seconds,
        one_gpu_seconds=one,
        gpu=_reading_memory(job, min(length, tokens)),
        state_bytes=job.shape.layers * job.shape.state_bytes,
        message_bytes=len(blocks[0]) * job.shape.state_bytes,
        hardware=f"{costs.hardware}, {costs.date}",
    )


def _reading_memory(job: StepJob, rows: int) -> dict[str, float]:
    shape = job.shape
    stream = (shape.stream + shape.compute) * shape.width * rows
    found = {
        "weights": job.weights,
        "states": 2 * shape.layers * shape.state_bytes,
        "segment": stream + rows * forward_temporaries_per_token(shape),
    }
    if job.vision is not None:
        frozen = replace(job.vision, tower_trains=False, projector_trains=False, frames=min(job.vision.frames, 64))
        work = replace(job.work, tokens=rows, input_on_gpu=True)
        found["vision"] = sum(vision_phases(shape, work, frozen)["vision"].values())
    return found
