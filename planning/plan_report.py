"""`plan(...)`: what training on a video of a given length will take, from a configuration alone.

No weights are loaded and no GPU is asked: parameters are counted by formula, memory comes from
`cost_memory`, seconds from constants measured on the GPU named in the report (`cost_time`).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..modeling_video_ma2mba.cost_search import (
    Limits,
    candidate_plans,
    leanest,
    least_host_memory,
    longest_that_fits,
    vision_chunks,
    with_tokens,
)
from ..modeling_video_ma2mba.cost_step import Prediction, StepJob, predict_job, predict_stack
from ..modeling_video_ma2mba.cost_time import H200, MeasuredCosts, vision_seconds
from ..modeling_video_ma2mba.recompute_plan import RecomputePlan
from .adapters import Adapters
from .plan_options import check_options, chosen_adapters, chosen_memory, gigabytes, require
from .planned_step import counts_and_config, describe_step
from .sequence_plan import (
    SharedPlan,
    longest_shared,
    ranks_of,
    shared_gradients,
    shared_plan,
    shared_predictions,
)
from .sequence_simulation import Links
from .this_machine import known_launch, pace_here

_LONGEST = 1 << 26
_ALONE = 0.95  # of a core: the system itself takes the rest
# Of the host's memory, for kept activations and inputs; the rest is for frames, data loading and everybody else.
_PINNED_SHARE = 0.85


@dataclass(frozen=True)
class ConsideredPlan:
    """A row of the table of plans: a method, its best plan, what it would take, and whether that fits."""

    method: str
    prediction: Prediction
    fits: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `plan --json`: bytes, seconds, and None where the method has no such setting."""
        p = self.prediction
        return {
            "method": self.method,
            "layers_per_block": p.plan and p.plan.layers_per_block,
            "segment_length": p.plan and p.plan.segment_length,
            "offload": bool(p.plan and p.plan.offload),
            "gpu_peak_bytes": p.gpu_peak,
            "above_weights_bytes": p.above_weights,
            "host_bytes": p.host_peak,
            "step_seconds": round(p.step_seconds, 3),
            "fits": self.fits,
        }


@dataclass(frozen=True)
class PlanReport:
    """What `plan` found.

    Attributes:
        method: "multi_axis", or "off" where nothing needs recomputing. plan: the cells, None for "off".
        prediction: memory and time of one step. tokens, frames, batch: the step that was planned (per row).
        longest_tokens, longest_frames, longest_seconds: the longest video for which some plan fits, one row at a time
            as planned, at `fps` frames a second; `longest_frames` is None for a language model alone.
        considered: all methods, fitting or not. gpu_memory, host_memory: the budgets in bytes.
        gpu, host: where these come from: "as asked", this machine, or "assumed".
        hardware: the GPU on which the constants behind the seconds were measured. launch_us: microseconds that the
            host is taken to need for launching one operation; launch_from: "as asked", "measured here", or "assumed".
        core_share: part of its core that the process got when it measured; with less than all, steps take longer.
        page_lock_seconds: that the first step takes longer, for host memory that is used for the first time.
        adapters: what trains beside a frozen model.
        shared: how several GPUs share the step; None for one. `prediction` is then that of the GPU with the most.
    """

    method: str
    prediction: Prediction
    tokens: int
    frames: int | None
    batch: int
    longest_tokens: int
    longest_frames: int | None
    longest_seconds: float | None
    considered: tuple[ConsideredPlan, ...]
    gpu_memory: int
    host_memory: int
    gpu: str
    host: str
    hardware: str
    launch_us: float
    launch_from: str
    core_share: float
    page_lock_seconds: float
    adapters: Adapters | None = None
    shared: SharedPlan | None = None

    @property
    def plan(self) -> RecomputePlan | None:
        """The plan that was chosen; None where nothing is recomputed."""
        return self.prediction.plan

    @property
    def copies(self) -> int:
        """Groups of GPUs that take a step on samples of their own."""
        return self.shared.copies if self.shared is not None else 1

    @property
    def longest_video(self) -> str | None:
        """The longest video as h:mm:ss."""
        return None if self.longest_seconds is None else clock(self.longest_seconds)

    @property
    def checkpointing_arguments(self) -> dict[str, Any] | None:
        """What to give to `model.gradient_checkpointing_enable`; None when checkpointing is better left off."""
        if self.plan is None:
            return None
        chosen = {name: value for name, value in asdict(self.plan).items() if name != "band"}  # the planner's own
        return {"method": "multi_axis", **chosen}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        p = self.prediction
        return {
            "method": self.method,
            "gradient_checkpointing": self.checkpointing_arguments,
            "tokens": self.tokens,
            "frames": self.frames,
            "batch": self.batch,
            "gpu_peak_bytes": p.gpu_peak,
            "gpu_bytes": p.gpu,
            "worst_phase": p.phase,
            "phase_bytes": p.phases,
            "host_bytes": p.host,
            "step_seconds": round(p.step_seconds, 3),
            "seconds": {name: round(value, 3) for name, value in p.seconds.items()},
            "tokens_per_second": round(self.tokens * self.batch * self.copies / p.step_seconds),
            "longest": {
                "tokens": self.longest_tokens,
                "frames": self.longest_frames,
                "duration": self.longest_video,
            },
            "considered": [row.to_dict() for row in self.considered],
            "vision_chunk_frames": p.vision_chunk,
            "adapters": self.adapters and asdict(self.adapters),
            "gpu_memory_bytes": self.gpu_memory,
            "gpu_memory_from": self.gpu,
            "host_memory_bytes": self.host_memory,
            "host_memory_from": self.host,
            "launch_us": round(self.launch_us, 2),
            "launch_from": self.launch_from,
            "core_share": round(self.core_share, 2),
            "page_lock_seconds": round(self.page_lock_seconds, 1),
            "seconds_measured_on": self.hardware,
            "shared": self.shared and self.shared.to_dict(),
        }


def plan(
    model_or_config: Any,
    *,
    tokens: int | None = None,
    frames: int | None = None,
    batch: int = 1,
    gpu_memory: int | float | str | None = None,
    host_memory: int | float | str | None = None,
    train: Sequence[str] | None = None,
    lora_rank: int | None = None,
    lora_vision: bool = False,
    four_bit: bool = False,
    optimizer: str = "adamw",
    dtype: str = "bfloat16",
    text_tokens: int = 512,
    labels: int = 512,
    fps: float = 1.0,
    gpus: int = 1,
    gpus_per_node: int = 8,
    launch_us: float | str | None = None,
    costs: MeasuredCosts = H200,
) -> PlanReport:
    """The fastest way to train on one video (or `batch` of them) within the memory of a GPU and its host.

    Args:
        model_or_config: a Video-Ma2mba model or configuration, or one of its language model alone (a transformers
            `Mamba2Config` too).
        tokens, frames: length of one sample, one of them; frames take `config.tokens_per_frame` tokens each, and
            `text_tokens` come on top.
        gpu_memory, host_memory: what there is, in bytes or as a text such as "80GB"; 85 % of the host's may be pinned
            for kept activations and inputs. None: what this machine has; without a GPU here, 80GB and 128GB.
        lora_rank: adapters of this rank train, and the projector, beside a frozen model; leave `train` away then.
            lora_vision: in the tower, too. four_bit: QLoRA, the language model's projections in NF4.
        launch_us: microseconds that the host needs to launch an operation (`cost_time.measure_launch`), which sets
            the pace of small cells; "here": measured now, on this machine's GPU; None: those of the machine that
            `costs` were measured on.
        train: parts that train, of "lm", "projector" and "vision". None: all for a configuration, what requires
            gradients for a model.
        optimizer: one of `OPTIMIZERS`. dtype: "bfloat16", "float16", "mixed" (fp32 weights, bf16 autocast), "float32".
        labels: labelled positions per sample. fps: frames per second, for the length in time.
        gpus: that share every sample (sequence parallelism), `gpus_per_node` in one machine.

    Raises:
        ValueError: a wrong argument; a model without Mamba-2 blocks; a GPU that cannot hold the weights, or no plan
            that fits: the message says what would.
    """
    check_options(frames, tokens, batch, fps, optimizer, dtype)
    require(gpus >= 1, f"gpus={gpus} is not valid: it must be at least 1")
    require(gpus_per_node >= 1, f"gpus_per_node={gpus_per_node} is not valid: it must be at least 1")
    gpu_bytes, gpu, host_memory_bytes, host = chosen_memory(gpu_memory, host_memory)
    launch_from, core_share = "as asked", 1.0
    if launch_us is None and (known := known_launch()) is not None:
        launch_us, launch_from = 1e6 * known[0], f"measured here on {known[1]}"
    elif launch_us is None:
        launch_us, launch_from = 1e6 * costs.launch, "assumed"
    elif isinstance(launch_us, str):
        require(launch_us == "here", f"launch_us={launch_us!r} is not valid: give microseconds, or 'here'")
        pace = pace_here()
        launch_us, launch_from, core_share = 1e6 * pace.launch, "measured here", pace.share
    costs = costs.on_host(launch_us / 1e6, core_share if core_share < _ALONE else 1.0)
    adapters = chosen_adapters(lora_rank, lora_vision, four_bit, train)
    counts, config = counts_and_config(model_or_config, train if adapters is None else ("projector",))
    per_frame = getattr(config, "tokens_per_frame", None)
    require((tokens is None) != (frames is None), "give either tokens or frames (of one sample)")
    if frames is not None:
        require(per_frame is not None, "frames need a vision tower, and this is a language model alone: give tokens")
        tokens = frames * per_frame + text_tokens
    elif per_frame is not None:
        frames = max(0, tokens - text_tokens) // per_frame
    require(tokens >= 1, f"tokens={tokens} is not valid: it must be at least 1")

    job = describe_step(counts, config, tokens, frames, batch, optimizer, dtype, labels, adapters)
    fixed = job.weights + job.gradients + job.optimizer
    require(
        fixed + costs.context < gpu_bytes,
        f"gpu_memory={gigabytes(gpu_bytes)} ({gpu}) cannot hold the model: weights take {job.weights / 1e9:.1f} GB, "
        f"gradients {job.gradients / 1e9:.1f} GB, the optimizer's state {job.optimizer / 1e9:.1f} GB and the CUDA "
        f"context {costs.context / 1e9:.1f} GB; use a larger GPU, a lighter optimizer, fewer parts (train), or "
        "adapters (lora_rank, with four_bit for QLoRA)",
    )
    limits = Limits(gpu_bytes - costs.context - fixed, _PINNED_SHARE * host_memory_bytes)
    considered = _consider(job, limits, costs)
    ranks = ranks_of(gpus, job.shape.layers, tokens)
    one_gpu = min((row.prediction for row in considered if row.fits), key=lambda p: p.step_seconds, default=None)
    if ranks > 1:
        wider = shared_gradients(job) - job.gradients
        job = replace(job, gradients=job.gradients + wider)
        limits = Limits(limits.gpu - wider, limits.host / min(gpus, gpus_per_node))
        links = Links(gpus_per_node=gpus_per_node)
        places = {False: f"{ranks} GPUs, kept on the GPU", True: f"{ranks} GPUs, kept on the host"}
        considered = [
            ConsideredPlan(method, *shared_predictions(job, ranks, place, limits, costs, links, gpus))
            for place, method in places.items()
        ]
    fitting = [row for row in considered if row.fits]
    # Per row of the batch; a longer video takes more of everything, so the search may start anywhere.
    if ranks > 1:
        longest = longest_shared(vision_chunks(job)[-1], ranks, limits, _LONGEST, costs, with_tokens)
    else:
        longest = longest_that_fits(vision_chunks(job)[-1], limits, _LONGEST, costs)
    longest_frames = None if per_frame is None else max(0, longest - text_tokens) // per_frame
    if not fitting:
        in_frames = "" if longest_frames is None else f" ({longest_frames} frames)"
        fewer = f"at most {longest} tokens per sample{in_frames}" if longest else ""
        raise ValueError(_nothing_fits(job, considered, limits, costs, fewer))
    best = min(fitting, key=lambda row: row.prediction.step_seconds)
    shared = None
    if ranks > 1:
        shared = shared_plan(job, best.prediction, ranks, gpus, gpus_per_node, one_gpu, costs)
    return PlanReport(
        method="off" if best.prediction.plan is None else "multi_axis",
        prediction=best.prediction,
        tokens=tokens,
        frames=frames,
        batch=batch,
        longest_tokens=longest,
        longest_frames=longest_frames,
        longest_seconds=None if longest_frames is None else longest_frames / fps,
        considered=tuple(considered),
        gpu_memory=gpu_bytes,
        host_memory=host_memory_bytes,
        gpu=gpu,
        host=host,
        hardware=f"{costs.hardware}, {costs.date}",
        shared=shared,
        launch_us=launch_us,
        launch_from=launch_from,
        core_share=core_share,
        page_lock_seconds=best.prediction.host_peak / costs.page_lock,
        adapters=adapters,
    )


def memory_by_method(config: Any, tokens: int, dtype: str = "bfloat16") -> dict[str, Prediction]:
    """What every method takes to train the language model of `config` on one sample of `tokens`, for plots.

    Multi-axis plans ("multi_axis": activations kept on the GPU; "host") are the smallest among those that are at most
    5 % slower than the fastest one, whatever it takes.
    """
    counts, text = counts_and_config(getattr(config, "text_config", config), ("lm",))
    job = describe_step(counts, text, tokens, None, 1, "none", dtype, 512)
    found = {
        "off": predict_job(job, None),
        "per_layer": predict_job(job, RecomputePlan(1, tokens)),
        "sqrt": predict_job(job, RecomputePlan(max(1, round(math.sqrt(job.shape.layers))), tokens)),
    }
    for name, place in (("multi_axis", False), ("host", True)):
        predictions = [predict_job(job, p) for p in candidate_plans(job, (place,))]
        deadline = 1.05 * min(p.step_seconds for p in predictions)
        found[name] = min((p for p in predictions if p.step_seconds <= deadline), key=lambda p: p.gpu_peak)
    return found


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _consider(job: StepJob, limits: Limits, costs: MeasuredCosts) -> list[ConsideredPlan]:
    """Every method with its plan: the classical ones, then the fastest (or, where none fits, the smallest) of ours."""
    layers, tokens = job.shape.layers, job.work.tokens
    classical = {
        "off": None,
        "per_layer": RecomputePlan(1, tokens),
        "sqrt": RecomputePlan(max(1, round(math.sqrt(layers))), tokens),
    }
    longest = job.shape.longest_segment // job.work.batch
    rows = []
    jobs = vision_chunks(job)
    least = jobs[-1]
    jobs.sort(key=lambda of_chunk: 0.0 if of_chunk.vision is None else vision_seconds(of_chunk.vision, costs))
    for method, plan_of in classical.items():
        predictions = [predict_job(of_chunk, plan_of, costs) for of_chunk in jobs]
        fitting = [p for p in predictions if limits.allow(p, costs.slack)]
        within = bool(fitting) and (plan_of is None or tokens <= longest)
        rows.append(ConsideredPlan(method, fitting[0] if fitting else predict_job(least, plan_of, costs), within))
    for method, place in (
        ("multi_axis, kept on the GPU", False),
        ("multi_axis, kept on the host", True),
    ):
        plans = list(candidate_plans(job, (place,)))
        best = _fastest_of(jobs, plans, limits, costs)
        smallest = best or min((predict_job(least, p, costs) for p in plans), key=lambda p: p.gpu_peak)
        rows.append(ConsideredPlan(method, smallest, best is not None))
    return rows


def _fastest_of(
    jobs: list[StepJob], plans: list[RecomputePlan], limits: Limits, costs: MeasuredCosts
) -> Prediction | None:
    """The fastest plan of all these jobs, which differ in the frames that run together and come the fastest first."""
    found: list[Prediction] = []
    stacks = [predict_stack(jobs[0], plan, costs) for plan in plans]
    for job in jobs:
        predictions = [predict_job(job, plan, costs, stack) for plan, stack in zip(plans, stacks, strict=True)]
        least = min(p.step_seconds for p in predictions)
        if found and least > 1.01 * min(p.step_seconds for p in found):
            break  # whatever fits with still slower towers is slower
        found += [p for p in predictions if limits.allow(p, costs.slack)]
    return leanest(found)


def _nothing_fits(
    job: StepJob, considered: list[ConsideredPlan], limits: Limits, costs: MeasuredCosts, longest: str
) -> str:
    smallest = min((row.prediction for row in considered), key=lambda p: p.gpu_peak)
    needed = smallest.above_weights * (1 + costs.slack)
    remedies = [longest] if longest else []
    if job.work.batch > 1:
        remedies.append("fewer samples per batch")
    host = least_host_memory(job, candidate_plans(job), limits, costs)
    if host is not None:
        remedies.append(f"host_memory of {math.ceil(host / _PINNED_SHARE / 1e9)}GB")
    if needed > limits.gpu:
        remedies.append(f"{math.ceil((needed - limits.gpu) / 1e9)} GB more GPU memory")
    return (
        f"no plan fits {job.work.batch} x {job.work.tokens} tokens: {limits.gpu / 1e9:.1f} GB of GPU memory are left "
        f"beside weights, gradients and optimizer state, and {limits.host / 1e9:.0f} GB of host memory may be pinned; "
        f"the smallest plan takes {needed / 1e9:.1f} GB and {smallest.host_peak / 1e9:.0f} GB. "
        f"What would fit: {'; '.join(remedies)}."
    )
