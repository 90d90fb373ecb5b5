"""Chooses per batch how a training step runs: without recomputation where that fits, else under the fastest plan.

The same predictions and limits as the engine's own planner (`planner`), asked before the step begins, with the
vision tower counted in. Shapes: B batch, S tokens, F frames.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..modeling_video_ma2mba.cost_step import Prediction, StepJob, predict_job
from ..modeling_video_ma2mba.cost_time import H200
from ..modeling_video_ma2mba.cost_vision import VisionLoad, vision_kept
from ..modeling_video_ma2mba.parallel_shards import is_unit
from ..modeling_video_ma2mba.planner import Limits, candidate_plans, describe_batch, fastest, step_limits
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
        self.last: StepPlan | None = None
        self._ceiling = math.inf  # bytes that no step may be planned to take, since one ran out of memory
        self._known: dict[Any, StepPlan] = {}
        self._vision = self._vision_facts()
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

    def describe(self, inputs: Mapping[str, Any]) -> StepJob:
        """The step over a collated batch: `input_ids` (B, S), `labels`, `pixel_values_videos` (F, 3, h, w)."""
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
        if pixels is not None and len(pixels):
            vision = VisionLoad.of(self.base.config, len(pixels), **self._vision)
        return replace(job, work=work, vision=vision, plain_segment=self._usual_segment, input_follows_plan=True)

    def limits(self) -> Limits:
        """What the step may take now."""
        device = self.stack.norm_f.weight.device
        limits = step_limits(self.settings, self.model, device, self.stack.engine.last_host_bytes)
        return replace(limits, gpu=min(limits.gpu, self._ceiling))

    def choose(self, inputs: Mapping[str, Any]) -> StepPlan | None:
        """The way to run this batch; None leaves it to the engine (which says what would fit where nothing does)."""
        job, limits = self.describe(inputs), self.limits()
        self.last = self._without_recomputation(job, limits) or self._with_recomputation(job, limits)
        return self.last

    def _without_recomputation(self, job: StepJob, limits: Limits) -> StepPlan | None:
        fixed = (self.settings.segment_length, self.settings.layers_per_block, self.settings.offload)
        if self.settings.method != "multi_axis" or any(value is not None for value in fixed):
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
        situation = (job.work, job.vision)
        known = self._known.get(situation)
        if known is not None and limits.allow(known.prediction, H200.slack):
            return known
        settings, on_gpu = self.settings, self.stack.norm_f.weight.device.type == "cuda"
        plan = settings.fixed_plan(job.shape.layers, job.work.tokens)
        if plan is not None:
            return self._remember(situation, predict_job(job, plan))
        places = (settings.offload,) if settings.offload is not None else (False, True) if on_gpu else (False,)
        plans = candidate_plans(job, places, settings.segment_length, settings.layers_per_block)
        best = fastest(job, plans, limits)
        return None if best is None else self._remember(situation, best)

    def _remember(self, situation: Any, prediction: Prediction) -> StepPlan:
        plan = StepPlan(prediction, True, prediction.above_weights)
        self._known[situation] = plan
        return plan

    def smaller(self, inputs: Mapping[str, Any]) -> StepPlan | None:
        """After a step that ran out of memory: the fastest way that takes clearly less; None if there is none.

        Later steps keep below that, too.
        """
        if self.last is None or self.settings.fixed_plan(len(self.stack.layers), inputs["input_ids"].shape[1]):
            return None
        self._ceiling = _SMALLER * self.last.step_bytes
        self._known.clear()
        limits = replace(self.limits(), allocated=0)
        job = self.describe(inputs)
        self.last = self._without_recomputation(job, limits) or self._with_recomputation(job, limits)
        return self.last

    def apply(self, step: StepPlan | None) -> None:
        """Switch the model to a step's plan; None to what the settings say."""
        plan = None if step is None else step.plan
        self.stack.gradient_checkpointing = step is None or plan is not None
        self.stack.prefill_segment_length = (step and step.segment) or self._usual_segment
        self.base.recompute_vision = step is None or step.recompute_vision
        self.base.offload_inputs = bool(self.settings.offload) if plan is None else plan.offload
        self.stack.engine.settings = self.settings
        if plan is not None:
            self.stack.engine.settings = replace(
                self.settings,
                method="multi_axis",
                layers_per_block=plan.layers_per_block,
                segment_length=plan.segment_length,
                offload=plan.offload,
                memory_budget=None,  # was heeded here
            )


def _round_up(labels: int, step: int = 256) -> int:
    """Batches that differ in a few labels are planned alike, and once."""
    return -(-labels // step) * step
