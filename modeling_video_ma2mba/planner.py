"""Chooses the plan of a training step: the fastest predicted one that fits the GPU's and the host's memory.

The search (`cost_search`) is over values only; it is made once for each shape of batch.
"""

import math
import os
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .cost_memory import StackShape, Workload
from .cost_search import Limits, candidate_plans, fastest, least_host_memory, longest_that_fits
from .cost_step import Prediction, StepJob, predict_job
from .cost_time import H200
from .mixer_mamba2 import CoreBackends
from .parallel_cut import SequenceCut
from .parallel_gradients import gradient_bytes
from .parallel_sequence import SequenceGroup
from .parallel_shards import is_unit
from .recompute_plan import RecomputePlan, RecomputeSettings, parse_bytes
from .recompute_schedule import SCHEDULES
from .stack_protocols import TextStack

# Left free on the GPU when no budget was given: what PyTorch, NCCL and the kernels may still ask for.
_MARGIN_BYTES = 512 << 20
_MARGIN_SHARE = 0.03


# What was planned for each model, by situation.
_known: WeakKeyDictionary[TextStack, dict[Any, Prediction]] = WeakKeyDictionary()
_MOST_KNOWN = 1024


def choose_plan(
    settings: RecomputeSettings,
    model: TextStack,
    x: Tensor,
    keep: Tensor | None,
    cut: SequenceCut | None = None,
    group: SequenceGroup | None = None,
) -> RecomputePlan:
    """The plan for this batch: what the settings fix, the rest the fastest that fits.

    Args:
        model: the `Ma2mbaTextModel`. x: its input (B, S, D), on any device. keep: (B, S) bool kept positions, or None.
        cut, group: where ranks share the batch, of which x holds this one's columns: all find the same plan, within
            the least memory that any of them has.

    Raises:
        ValueError: nothing fits the budgets; says what would. Raised before anything is allocated.
    """
    if not len(model.layers):
        raise ValueError("multi-axis checkpointing needs Mamba-2 blocks, and this model has none")
    job, device = describe_batch(model, x, keep), model.norm_f.weight.device
    # Host memory that the engine has pinned already counts as available to it.
    pinned = getattr(getattr(model, "engine", None), "last_host_bytes", 0)
    limits = step_limits(settings, model, device, pinned, x.nbytes if x.device == device else 0)
    if cut is not None and group is not None:
        job, limits = shared_job(job, cut), shared_limits(limits, group)
    best = best_plan(settings, model, job, limits)
    if best is None or best.plan is None:
        raise ValueError(_nothing_fits(job, limits, choices(settings, model, job)))
    return best.plan


def shared_job(job: StepJob, cut: SequenceCut) -> StepJob:
    """The step of one of the ranks that share a batch, the same for all of them: that of the rank with the most."""
    segments = -(-len(cut.segments) // cut.active)
    kept = None if job.work.kept is None else job.work.kept
    tokens = min(segments * cut.longest, cut.tokens)
    work = replace(
        job.work,
        tokens=tokens,
        kept=kept,
        ranks=cut.active,
        segment=cut.longest,
        stretches=cut.schedule != SCHEDULES[0],
    )
    return replace(job, work=work)


def shared_limits(limits: Limits, group: SequenceGroup) -> Limits:
    """What every rank of a group can take."""
    gpu, host, allocated = group.smallest(limits.gpu, limits.host, -limits.allocated)
    return Limits(gpu, host, int(-allocated))


def best_plan(settings: RecomputeSettings, model: TextStack, job: StepJob, limits: Limits) -> Prediction | None:
    """The fastest plan within the limits that the settings leave for a step of a `Ma2mbaTextModel`; None if none is.

    A plan that the settings fix in all its parts is held against the limits only if they name a memory budget, too.

    Raises:
        ValueError: the settings fix what cannot be run.
    """
    fixed = choices(settings, model, job)
    _refuse_too_long(job, fixed["segment_length"])
    if settings.memory_budget is None and settings.fixed_plan(job.shape.layers, job.work.tokens) is not None:
        *larger, last = candidate_plans(job, **fixed)  # several only where ranks share the step
        return (fastest(job, larger, limits) if larger else None) or predict_job(job, last)
    known = _known.setdefault(model, {})
    situation = (settings, job, model.norm_f.weight.device.type)
    # Free memory changes a little from step to step; a plan that still fits is kept, so that its pinned memory is too.
    if situation in known and limits.allow(known[situation], H200.slack):
        return known[situation]
    best = fastest(job, candidate_plans(job, **fixed), limits)
    if best is not None:
        if len(known) >= _MOST_KNOWN:
            known.clear()
        known[situation] = best
    return best


def choices(settings: RecomputeSettings, model: TextStack, job: StepJob) -> dict[str, Any]:
    """What the settings leave to choose, as arguments of `candidate_plans`.

    Raises:
        ValueError: orders of cells that layers spread over processes cannot follow.
    """
    on_gpu, sharded = model.norm_f.weight.device.type == "cuda", is_unit(model.layers[0])
    orders = {
        # Layers that are FSDP units are gathered once for each block, not once for each cell.
        "forward_order": settings.forward_order or ("block_major" if sharded else "segment_major"),
        "backward_order": settings.backward_order or "block_major",
    }
    for name, order in orders.items():
        if sharded and order != "block_major":
            raise ValueError(f"{name}={order!r} does not go with layers that are FSDP units: leave {name} unset")
    plan = settings.fixed_plan(job.shape.layers, job.work.segment or job.work.tokens)
    if plan is not None:
        if job.work.ranks > 1:  # their segments are cut before anything is planned
            plan = replace(plan, segment_length=job.work.segment)
        cells = {"segment_length": plan.segment_length, "layers_per_block": plan.layers_per_block}
        return {**cells, "offload": (plan.offload,), **orders}
    return {
        "segment_length": settings.segment_length and (job.work.segment or settings.segment_length),
        "layers_per_block": settings.layers_per_block,
        "offload": (settings.offload,) if settings.offload is not None else (False, True) if on_gpu else (False,),
        **orders,
    }


def _refuse_too_long(job: StepJob, segment_length: int | None) -> None:
    """The kernels' offsets are 32-bit numbers: beyond them results are wrong without any error."""
    rows = min(segment_length or 0, job.work.tokens) * job.work.batch
    if rows > job.shape.longest_segment:
        raise ValueError(
            f"a segment of {rows} tokens (rows of the batch together) is more than the kernels can address at this "
            f"model's width, {job.shape.longest_segment}: set segment_length to at most "
            f"{job.shape.longest_segment // job.work.batch} with method='multi_axis'"
        )


def describe_batch(model: TextStack, x: Tensor, keep: Tensor | None) -> StepJob:
    """The step of a `Ma2mbaTextModel` over x (B, S, D), as the predictions want it."""
    mixer = model.layers[0].mixer
    weight = next(p for p in mixer.in_proj.parameters() if p.is_floating_point())
    device = model.norm_f.weight.device
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
    backends = CoreBackends.pick(mixer.shape, device, dtype, x.shape[1])
    trainable = sum(p.numel() for p in model.layers.parameters() if p.requires_grad)
    work = Workload(
        tokens=x.shape[1],
        batch=x.shape[0],
        kept=None if keep is None else int(keep.sum()),
        layer_parameters=trainable // len(model.layers),
        weight_bytes=weight.element_size(),
        autocast=autocast and weight.dtype != dtype,
        projections_train=any(p.requires_grad for p in mixer.in_proj.parameters()),
        head_trains=model.embeddings.weight.requires_grad,
        input_on_gpu=x.device == device,
        input_gradient=x.requires_grad,
    )
    return StepJob(StackShape.of(model.config, dtype.itemsize, backends.costs), work)


def step_limits(
    settings: RecomputeSettings,
    model: nn.Module | TextStack,
    device: torch.device,
    pinned: int = 0,
    allocated: int = 0,
) -> Limits:
    """What a step of `model` on `device` may take now: the settings' budgets, or what is free.

    Args:
        pinned: host bytes pinned for kept activations already. allocated: GPU bytes of the step already there.
    """
    asked = parse_bytes(settings.host_memory_budget, "host_memory_budget")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of one machine, which share its memory
    host = asked if asked is not None else (available_host_bytes() / processes + pinned) / 2
    gpu = parse_bytes(settings.memory_budget, "memory_budget")
    if gpu is not None:
        return Limits(gpu, host)
    if device.type != "cuda":
        return Limits(available_host_bytes() / processes / 2, host, allocated)
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    margin = max(_MARGIN_BYTES, int(_MARGIN_SHARE * total))
    new_gradients = sum(gradient_bytes(p) for p in model.parameters() if p.requires_grad and p.grad is None)
    return Limits(free - margin - new_gradients, host, allocated)


def available_host_bytes() -> int:
    """Host memory that new allocations can have now; 8 GiB where neither the system nor psutil tells."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # Linux
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:
            import psutil  # comes with accelerate
        except ImportError:
            return 8 << 30
        return int(psutil.virtual_memory().available)


def _nothing_fits(job: StepJob, limits: Limits, fixed: dict[str, Any]) -> str:
    """One sentence on what is missing, one on what would do."""
    smallest = min((predict_job(job, p) for p in candidate_plans(job, **fixed)), key=lambda p: p.above_weights)
    needed = smallest.above_weights * (1 + H200.slack) - limits.allocated
    remedies = []
    anything = {"offload": (False, True), "segment_length": None, "layers_per_block": None}
    if any(fixed[name] != anything[name] for name in anything):
        other = fastest(job, candidate_plans(job, **(fixed | anything)), limits)
        if other is not None:
            remedies.append(f"the plan '{other.plan}' instead of what the settings fix")
    longest = longest_that_fits(job, limits, job.work.tokens, **fixed)
    if longest:
        remedies.append(f"at most {longest} tokens per row (fewer frames)")
    if job.work.batch > 1:
        remedies.append("fewer rows per batch")
    host = least_host_memory(job, candidate_plans(job, **fixed), limits)
    if host is not None:
        remedies.append(f"host_memory_budget of {_round_up(host)}")
    if needed > limits.gpu:
        remedies.append(f"memory_budget of {_round_up(needed + limits.allocated)}")
    return (
        f"no checkpointing plan fits {job.work.batch} x {job.work.tokens} tokens into {max(limits.gpu, 0) / 1e9:.2f} "
        f"GB of GPU memory and {limits.host / 1e9:.1f} GB of host memory: the smallest, '{smallest.plan}', takes "
        f"{needed / 1e9:.2f} GB and {smallest.host_peak / 1e9:.1f} GB. What would fit: "
        f"{'; '.join(remedies) or 'more GPU and host memory'}."
    )


def _round_up(nbytes: float) -> str:
    return f"{math.ceil(nbytes / 1e8) / 10:.1f}GB"


def out_of_memory_message(
    plan: RecomputePlan, job: StepJob, device: torch.device, phase: str, error: BaseException
) -> str:
    """What to tell a user whose step ran out of GPU memory: the plan, both peaks, and the next smaller plan."""
    reached = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    predicted = predict_job(job, plan)
    text = (
        f"out of GPU memory in the {phase} pass of {job.work.tokens} tokens under the plan '{plan}': "
        f"{predicted.above_weights / 1e9:.1f} GB above weights and gradients were predicted, and {reached:.1f} GB "
        "were allocated in all, weights and everything else included. "
    )
    smaller = fastest(job, candidate_plans(job), Limits(0.8 * predicted.above_weights, float("inf")))
    if smaller is None or smaller.plan is None:
        return f"{text}No smaller plan exists: give it fewer tokens (frames) or fewer rows at a time. {error}"
    return (
        f"{text}The next smaller plan, '{smaller.plan}', takes {smaller.above_weights / 1e9:.1f} GB: "
        f"set layers_per_block={smaller.plan.layers_per_block}, segment_length={smaller.plan.segment_length}, "
        f"offload={smaller.plan.offload}. {error}"
    )
