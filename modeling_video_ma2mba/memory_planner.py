"""Chooses the plan of a training step."""

from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint_plan import CheckpointPlan, CheckpointSettings


def choose_plan(settings: CheckpointSettings, model: nn.Module, x: Tensor, keep: Tensor | None) -> CheckpointPlan:
    """The plan for this batch: what the settings fix, the rest by default sizes."""
    layers, tokens = len(model.layers), x.shape[1]
    fixed = settings.fixed_plan(layers, tokens)
    if fixed is not None:
        return fixed
    on_gpu = model.norm_f.weight.is_cuda
    segment = settings.segment_length or (16384 if on_gpu else 1024)
    offload = settings.offload if settings.offload is not None else False
    return CheckpointPlan(min(settings.layers_per_block or 4, layers), segment, offload)


def out_of_memory_message(plan: CheckpointPlan, model: nn.Module, tokens: int, phase: str, error: Any) -> str:
    """What to tell a user whose step ran out of GPU memory."""
    smaller = CheckpointPlan(plan.layers_per_block, max(256, plan.segment_length // 2), True)
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    return (
        f"out of GPU memory in the {phase} pass of {tokens} tokens under the plan '{plan}' "
        f"(peak so far {peak:.1f} GB); the next smaller plan is '{smaller}'. {error}"
    )
