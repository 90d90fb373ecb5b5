"""Decides per batch how a training step runs: without recomputation where that fits, else under the fastest plan.

The planner (`planner`) is asked once, before the step begins and with the vision tower counted in; the engine gets the
plan and does not ask again. Shapes: B batch, S tokens, F frames.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..modeling_video_ma2mba.cost_search import Limits, chunks_by_speed, vision_chunks
from ..modeling_video_ma2mba.cost_step import Prediction, StepJob, predict_job
from ..modeling_video_ma2mba.cost_time import H200, MeasuredCosts, measure_launch
from ..modeling_video_ma2mba.cost_vision import VisionLoad, vision_kept
from ..modeling_video_ma2mba.parallel_sequence import SequenceGroup
from ..modeling_video_ma2mba.parallel_shards import is_unit
from ..modeling_video_ma2mba.planner import best_plan, describe_batch, shared_job, shared_limits, step_limits
from ..modeling_video_ma2mba.recompute_plan import RecomputePlan, RecomputeSettings
from ..modeling_video_ma2mba.vision_features import used_tower_modules

_MOST_TOGETHER = 1 << 16  # tokens of all rows that a kernel may get: offsets of the public ones overflow near 200k
_SMALLER = 0.8  # of what ran out of memory: the next smaller plan takes at most this share


@dataclass(frozen=True)
class StepPlan:
    """How one step runs.

    Attributes:
        prediction: memory and time of the language model's part; its `plan` is None for "no recomputation".
        recompute_vision: whether frames run again in backward.
        step_bytes: predicted GPU peak above weights, gradients and optimizer state, vision's included.
        segment: tokens that run together without recomputation; None for what the model says.
    """

    prediction: Prediction
    recompute_vision: bool
    step_bytes: int
    segment: int | None = None

    @property
    def plan(self) -> RecomputePlan | None:
        """The recomputation plan of the step; None where nothing is recomputed."""
        return self.prediction.plan

    def __str__(self) -> str:
        return "no recomputation" if self.plan is None else str(self.plan)


class StepPlanner:
    """Plans steps of one model; remembers what did not fit.

    Args:
        model: a `VideoMa2mbaForConditionalGeneration`, with or without adapters in it.
        settings: what the user asked of checkpointing; parts of the plan that it fixes stay fixed.
    """

    def __init__(self, model: nn.Module, settings: RecomputeSettings) -> None:
        self.model, self.base, self.settings = model, model.model, settings
        self.stack = self.base.language_model
        self._usual_segment = self.stack.prefill_segment_length
        self._usual_chunk = self.base.config.vision_chunk_frames
        self.last: StepPlan | None = None
        self._ceiling = math.inf  # bytes that no step may be planned to take, since one ran out of memory
        self._vision = self._vision_facts()
        self._costs = self._costs_here()
        before_stack = (self.base.get_input_embeddings(), *self._vision_parts())
        self._input_trains = any(p.requires_grad for part in before_stack for p in part.parameters())

    def _vision_parts(self) -> list[nn.Module]:
        return [*used_tower_modules(self.base.vision_tower, self.base.config), self.base.multi_modal_projector]

    def _vision_facts(self) -> dict[str, Any]:
        *tower, projector = ([p for p in part.parameters() if p.requires_grad] for part in self._vision_parts())
        tower = [p for part in tower for p in part]
        return {
            "tower_trains": bool(tower),
            "projector_trains": bool(projector),
            "tower_parameters": sum(p.numel() for p in tower),
            "projector_parameters": sum(p.numel() for p in projector),
            "weight_bytes": next(self.base.multi_modal_projector.parameters()).element_size(),
        }

    def _costs_here(self) -> MeasuredCosts | None:
        """Of the tower, on this host; None where more frames at a time would not make it faster: it is not trained, or
        runs on a CPU. Processes that share steps count with the slowest of their hosts."""
        device = self.stack.norm_f.weight.device
        if device.type != "cuda" or not self._vision["tower_trains"]:
            return None
        launch = min(max(measure_launch(device, 0.1), 1e-7), 1e-4)
        return H200.on_host(launch if self.group is None else -self.group.smallest(-launch)[0])

    @property
    def group(self) -> SequenceGroup | None:
        """The processes that share every step, which plan together: all of them call the same methods."""
        return self.stack.engine.group

    def describe(self, inputs: Mapping[str, Any]) -> StepJob:
        """The step over a collated batch: `input_ids` (B, S), `labels`, `pixel_values_videos` (F, 3, h, w); where
        processes share it as `sequence_cut` says, what is one's part of it, the same for all."""
        rows, tokens = inputs["input_ids"].shape
        labels = inputs.get("shift_labels", inputs.get("labels"))
        job = describe_batch(self.stack, torch.empty(rows, tokens, 0, device="meta"), None)
        work = replace(
            job.work,
            kept=None if labels is None else _round_up(int((labels != -100).sum())),
            input_on_gpu=True,
            input_gradient=self._input_trains,
        )
        pixels: Tensor | None = inputs.get("pixel_values_videos")
        vision = None
        frames, cut = 0 if pixels is None else len(pixels), inputs.get("sequence_cut")
        if cut is not None:
            config = self.base.config
            total = int((inputs["input_ids"] == config.video_token_id).sum()) // config.tokens_per_frame
            frames = min(total, math.ceil(total / cut.active) + 1)
        if frames:
            vision = VisionLoad.of(self.base.config, frames, **self._vision)
        job = replace(job, work=work, vision=vision, plain_segment=self._usual_segment, input_follows_plan=True)
        return job if cut is None else shared_job(job, cut)

    def limits(self) -> Limits:
        """What the step may take now."""
        device = self.stack.norm_f.weight.device
        limits = step_limits(self.settings, self.model, device, self.stack.engine.last_host_bytes)
        limits = replace(limits, gpu=min(limits.gpu, self._ceiling))
        return limits if self.group is None else shared_limits(limits, self.group)

    def choose(self, inputs: Mapping[str, Any]) -> StepPlan | None:
        """The way to run this batch; None leaves it to the engine (which says what would fit where nothing does)."""
        self.last = self._best(self.describe(inputs), self.limits())
        return self.last

    def _best(self, job: StepJob, limits: Limits) -> StepPlan | None:
        """Without recomputation where that fits, with as many frames in the tower together as is fastest and fits."""
        for plan in (self._without_recomputation, self._with_recomputation):
            for of_chunk in self._by_speed(job):
                found = plan(of_chunk, limits)
                if found is not None:
                    return found
        return None

    def _by_speed(self, job: StepJob) -> list[StepJob]:
        """The step with other numbers of frames in the tower together, the best first: as many as the model says, then
        fewer. A trained tower sees a quarter of these at a time, too few to keep a GPU busy on most hosts: there those
        that are fast enough come first."""
        usual = 0 if job.vision is None else job.vision.chunk
        fewer = [j for j in vision_chunks(job) if j.vision is None or j.vision.chunk <= usual]
        if self._costs is None:
            return fewer
        return [*(j for j in chunks_by_speed(job, self._costs) if j not in fewer[1:]), *fewer[1:]]

    def _without_recomputation(self, job: StepJob, limits: Limits) -> StepPlan | None:
        parts = ("segment_length", "layers_per_block", "offload", "forward_order", "backward_order")
        if self.settings.method != "multi_axis" or any(getattr(self.settings, part) is not None for part in parts):
            return None
        if self.group is not None:  # what processes share is cut into cells
            return None
        if is_unit(self.stack.layers[0]):  # FSDP: the engine gathers layers for segments, all processes alike
            return None
        kept = 0 if job.vision is None else int(vision_kept(job.shape, job.vision))
        for vision, recompute in ((kept, False), (0, True)) if kept else ((0, False),):
            for segment in self._plain_segments(job):
                plain = predict_job(replace(job, plain_segment=segment), None)
                gpu = {**plain.gpu, "vision": plain.gpu.get("vision", 0) + vision}
                if limits.allow(replace(plain, gpu=gpu), H200.slack):
                    peak = replace(plain, gpu=gpu).above_weights
                    return StepPlan(plain, recompute, peak, segment)
        return None

    def _plain_segments(self, job: StepJob) -> list[int]:
        """Tokens to run together where nothing is recomputed, longest first: on a GPU small models spend the time of
        short segments on launching kernels."""
        lengths = [self._usual_segment]
        if self.stack.norm_f.weight.device.type == "cuda":
            while lengths[0] < job.work.tokens and 2 * lengths[0] * job.work.batch <= _MOST_TOGETHER:
                lengths.insert(0, 2 * lengths[0])
        return lengths

    def _with_recomputation(self, job: StepJob, limits: Limits) -> StepPlan | None:
        best = best_plan(self.settings, self.stack, job, limits)
        return None if best is None else StepPlan(best, True, best.above_weights)

    def smaller(self, inputs: Mapping[str, Any]) -> StepPlan | None:
        """After a step that ran out of memory: the fastest way that takes clearly less; None if there is none.

        Later steps keep below that, too.
        """
        if self.last is None or self.settings.fixed_plan(len(self.stack.layers), inputs["input_ids"].shape[1]):
            return None
        self._ceiling = _SMALLER * self.last.step_bytes
        limits = replace(self.limits(), allocated=0)
        self.last = self._best(self.describe(inputs), limits)
        return self.last

    @contextlib.contextmanager
    def applied(self, step: StepPlan | None) -> Iterator[None]:
        """Inside, the model runs under a step's plan; before, afterwards and for None as the settings say."""
        if step is None:
            yield
            return
        plan = step.plan
        switches = [
            (self.stack, "gradient_checkpointing", plan is not None),
            (self.stack, "prefill_segment_length", step.segment or self._usual_segment),
            (self.base, "recompute_vision", step.recompute_vision),
            (self.base, "offload_inputs", bool(self.settings.offload) if plan is None else plan.offload),
            (self.base.config, "vision_chunk_frames", step.prediction.vision_chunk or self._usual_chunk),
        ]
        before = [getattr(part, name) for part, name, _ in switches]
        try:
            for part, name, value in switches:
                setattr(part, name, value)
            with self.stack.engine.planned(plan):
                yield
        finally:
            for (part, name, _), value in zip(switches, before, strict=True):
                setattr(part, name, value)


def _round_up(labels: int, step: int = 256) -> int:
    """Batches that differ in a few labels are planned alike, and once."""
    return -(-labels // step) * step
