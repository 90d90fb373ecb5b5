"""Every plan worth predicting, and the fastest that fits: a search over values only, without torch.

Every useful number of layers per block, segment lengths that halve the sequence again and again, activations kept on
the GPU or on the host; a few hundred predictions (`cost_step`) of some microseconds.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from .cost_memory import kept_bytes, saved_per_token
from .cost_step import Prediction, StepJob, predict_job
from .cost_time import H200, MeasuredCosts, vision_seconds
from .recompute_plan import RecomputePlan

# Segments are multiples of this: the chunk of the SSD kernels (paper, section 4.1).
SEGMENT_STEP = 256
# Plans this close in time count as equally fast; the smaller one is taken.
_EQUALLY_FAST = 1.01


def block_sizes(layers: int) -> list[int]:
    """Layers per block worth trying: the smallest for every possible number of blocks."""
    return sorted({-(-layers // blocks) for blocks in range(1, layers + 1)})


def segment_lengths(tokens: int, longest: int) -> list[int]:
    """Segment lengths worth trying, longest first: equal parts, four numbers of parts per factor of two."""
    if tokens <= SEGMENT_STEP:
        return [tokens]
    counts: list[int] = []
    step = 1
    while (count := counts[-1] + step if counts else 1) * SEGMENT_STEP < 2 * tokens:
        counts.append(count)
        if count >= 8 * step:
            step *= 2
    lengths = {min(tokens, -(-tokens // (n * SEGMENT_STEP)) * SEGMENT_STEP) for n in counts}
    fitting = [s for s in lengths if s <= longest]
    return sorted(fitting or [max(SEGMENT_STEP, longest // SEGMENT_STEP * SEGMENT_STEP)], reverse=True)


def candidate_plans(
    job: StepJob,
    offload: Iterable[bool] = (False, True),
    segment_length: int | None = None,
    layers_per_block: int | None = None,
    **orders: str,
) -> Iterator[RecomputePlan]:
    """Every plan worth predicting, with fixed fields as given (`orders`: the plan's `forward_order`, …). Ranks that
    share a step need as many blocks as they are many."""
    longest = job.shape.longest_segment // job.work.batch
    segments = [segment_length] if segment_length else segment_lengths(job.work.tokens, longest)
    sizes = [min(layers_per_block, job.shape.layers)] if layers_per_block else block_sizes(job.shape.layers)
    ranks = job.work.ranks
    if ranks > 1 and not segment_length:  # their segments are cut before anything is planned: into one cell or several
        parts = [-(-job.work.segment // n) for n in (1, 2, 4, 8)]
        segments = [part for part in parts if part <= longest and part >= min(SEGMENT_STEP, job.work.segment // 2)]
        segments = segments or [max(1, min(longest, parts[-1]))]
    if ranks > 1 and not layers_per_block:
        sizes = [layers for layers in sizes if -(-job.shape.layers // layers) >= ranks] or sizes[:1]
    for place in offload:
        for layers in sizes:
            for band in bands(-(-job.shape.layers // layers), ranks):
                for segment in segments:
                    yield RecomputePlan(layers, segment, place, band=band, **orders)


def bands(blocks: int, ranks: int) -> list[int]:
    """Numbers of blocks worth summing gradients for at a time, where `ranks` share a step: no fewer than there are
    ranks, or they would wait for each other; twice as many let a rank be late without holding up others."""
    return [0] if ranks == 1 else sorted({min(blocks, 2 * ranks), min(blocks, ranks)}, reverse=True)


def vision_chunks(job: StepJob) -> list[StepJob]:
    """The step with other numbers of frames in the tower at a time (`config.vision_chunk_frames`), the most first and
    the least memory last; just `job` where no frames run."""
    vision = job.vision
    if vision is None:
        return [job]
    sizes = {max(vision.clip, vision.chunk * 2**step // 32) for step in range(9)}  # a 32nd to eight times as many
    sizes = {size for size in sizes if size <= max(vision.frames, vision.chunk, vision.clip)}
    return [replace(job, vision=replace(vision, chunk=size)) for size in sorted(sizes, reverse=True)]


def chunks_by_speed(job: StepJob, costs: MeasuredCosts = H200) -> list[StepJob]:
    """`vision_chunks`, the fastest first; of those that are as fast as any but for 2 %, the fewest frames first."""
    if job.vision is None:
        return [job]
    jobs = vision_chunks(job)[::-1]
    seconds = [0.0 if j.vision is None else vision_seconds(j.vision, costs) for j in jobs]
    order = sorted(range(len(jobs)), key=lambda n: max(seconds[n], 1.02 * min(seconds)))
    return [jobs[n] for n in order]


@dataclass(frozen=True)
class Limits:
    """What a step may take: GPU bytes above weights, gradients and optimizer state; pinned host bytes.

    `allocated`: bytes of the step that are there already, and not part of `gpu`.
    """

    gpu: float
    host: float
    allocated: int = 0

    def allow(self, prediction: Prediction, slack: float) -> bool:
        """Whether the predicted peak, with what the allocator loses, stays within the limits."""
        needed = prediction.above_weights * (1 + slack) - self.allocated
        return needed <= self.gpu and prediction.host_peak <= self.host


def some_plan_fits(job: StepJob, plans: Iterable[RecomputePlan], limits: Limits, costs: MeasuredCosts = H200) -> bool:
    """Whether one of the plans stays within the limits. Most are told by what they keep, or by what one cell keeps
    while it is differentiated; only the others are predicted."""
    shape, work, room = job.shape, job.work, (limits.gpu + limits.allocated) / (1 + costs.slack) + 1  # rounded down
    let_go = shape.compute * shape.inner if shape.kernels and work.projections_train else 0
    per_row = saved_per_token(shape, work.projections_train) - let_go
    for plan in plans:
        kept = sum(kept_bytes(shape, work, plan))
        rows = work.batch * min(plan.segment_length, work.tokens)
        if kept > (limits.host if plan.offload else room):
            continue
        if min(plan.layers_per_block, shape.layers) * rows * per_row > room:
            continue
        if limits.allow(predict_job(job, plan, costs), costs.slack):
            return True
    return False


def footprint(prediction: Prediction) -> float:
    """How much memory a plan takes, for choosing between equally fast ones: host memory counts a quarter."""
    return prediction.gpu_peak + prediction.host_peak / 4


def fastest(
    job: StepJob, plans: Iterable[RecomputePlan], limits: Limits, costs: MeasuredCosts = H200
) -> Prediction | None:
    """The fastest plan within the limits; among equally fast ones the one with the least memory (`footprint`)."""
    return leanest([p for p in (predict_job(job, plan, costs) for plan in plans) if limits.allow(p, costs.slack)])


def leanest(predictions: list[Prediction]) -> Prediction | None:
    """The one with the least memory (`footprint`) among those that are as good as the fastest; None of none."""
    if not predictions:
        return None
    deadline = min(p.step_seconds for p in predictions) * _EQUALLY_FAST
    return min((p for p in predictions if p.step_seconds <= deadline), key=footprint)


def least_host_memory(
    job: StepJob, plans: Iterable[RecomputePlan], limits: Limits, costs: MeasuredCosts = H200
) -> int | None:
    """The least that a plan within the GPU's limit pins; None if the GPU is the obstacle."""
    no_host = replace(limits, host=math.inf)
    fitting = [p.host_peak for p in (predict_job(job, plan, costs) for plan in plans) if no_host.allow(p, costs.slack)]
    return min(fitting, default=None)


def longest_that_fits(job: StepJob, limits: Limits, upper: int, costs: MeasuredCosts = H200, **fixed: Any) -> int:
    """Tokens per row of the longest sequence for which some plan fits, up to `upper`; 0 if none does."""

    def fits(tokens: int) -> bool:
        shorter = with_tokens(job, tokens)
        return some_plan_fits(shorter, candidate_plans(shorter, **fixed), limits, costs)

    low, high = 0, SEGMENT_STEP
    while high <= upper and fits(high):
        low, high = high, high * 2
    high = min(high, upper + 1)
    while high - low > max(SEGMENT_STEP, low // 100):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def with_tokens(job: StepJob, tokens: int) -> StepJob:
    """The step of a sample of `tokens` tokens, with as many of them frames."""
    share = tokens / job.work.tokens
    kept = job.work.kept if job.work.kept is None else min(job.work.kept, tokens * job.work.batch)
    vision = job.vision and replace(job.vision, frames=math.ceil(job.vision.frames * share))
    return replace(job, work=replace(job.work, tokens=tokens, kept=kept), vision=vision)
