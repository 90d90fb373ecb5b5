"""Which parameters learn at which rate, and which of them decay."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ..modeling_video_ma2mba.vision_towers import TOWERS
from ..planning.plan_options import check_parts

# Mamba-2's own recurrence parameters, norms, biases, and what towers name; by name as well as by shape, because
# some sharded parameters do not show their shape.
_OF_TOWERS = sorted({name for tower in TOWERS.values() for name in tower.no_decay})
_NO_DECAY = re.compile(rf"(^|\.)(A_log|D|dt_bias|bias|{'|'.join(_OF_TOWERS)})$|norm|layrnorm")
_PARTS = {"vision_tower.": "vision", "multi_modal_projector.": "projector"}  # all the rest is the language model
ORDER = ("lm", "projector", "vision")  # the Trainer logs the first group's rate


def part_of(name: str) -> str:
    """The part ("lm", "projector" or "vision") that a parameter of the given name belongs to."""
    return next((part for mark, part in _PARTS.items() if mark in name), "lm")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices and convolutions, not to recurrence parameters, norms and biases."""
    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty tensor in its place
    return len(shape) >= 2 and not _NO_DECAY.search(name)


def split_by_part(
    groups: list[dict[str, Any]], named: Iterable[tuple[str, nn.Parameter]], rates: dict[str, float]
) -> list[dict[str, Any]]:
    """Cut an optimizer's parameter groups by part and give each its rate; the language model's come first.

    Args:
        groups: `optimizer.param_groups` before its first step.
        rates: learning rate of each part.
    """
    parts = {id(parameter): part_of(name) for name, parameter in named}
    result = []
    for part in ORDER:
        for group in groups:
            members = [p for p in group["params"] if parts.get(id(p), "lm") == part]
            if members:
                result.append({**group, "params": members, "lr": rates[part]})
    return result


def set_trainable(model: nn.Module, parts: Sequence[str]) -> None:
    """Let exactly these of `plan_options.PARTS` train; the head belongs to the language model, unused layers stay
    frozen."""
    check_parts(parts)
    base = getattr(model, "model", model)
    model.requires_grad_("lm" in parts)
    if hasattr(base, "vision_tower"):
        base.multi_modal_projector.requires_grad_("projector" in parts)
        base.vision_tower.requires_grad_("vision" in parts)
        base.freeze_unused_parameters()
