"""Hours of calm at the price of minutes: frames that show nothing count in training as if they stayed longer.

What drowns a memory in a long video is the sum of what its uneventful frames add. A Mamba-2 head adds `dt B x` and
keeps `exp(dt A)` of what it holds, so reading the same frame k times is much like reading it once with k times the
step size, as long as the steps are small. Small steps are `softplus(u) = exp(u)`, so `log k` on u does it: a video of
an hour trains what one of a day would, with its gradient. Large steps, those of heads that look at the moment only,
stay as they are. Legend: B batch, S tokens, F frames, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..trainer.video_trainer import VideoMa2mbaTrainer
from .world import World

_SMALL = 4.0  # a step whose decay is below exp(-this) is lengthened in full, one of decay 1 or more not at all
STRETCH = "stretch"
"""Key of a batch: (B, S), the logarithm of how often each token counts."""


def calm_frames(world: World, fps: float = 1.0) -> Tensor:
    """Which frames of a world show nothing but the backdrop, (F,) bool; none of a stream, where more always comes."""
    if world.earlier:
        return torch.zeros(world.earlier + world.seconds, dtype=torch.bool)
    calm = torch.ones(max(int(world.seconds * fps + 1e-6), 1), dtype=torch.bool)
    cards = () if world.card is None else (world.card, *world.decoys)
    spans = [(thing.start, thing.end) for thing in world.things] + [(card.start, card.start + 1) for card in cards]
    for start, end in spans:
        calm[int(start * fps) : int(end * fps + 1)] = False
    return calm


def token_stretch(input_ids: Tensor, calm: Tensor, amount: float, video_token: int, stamps: Tensor) -> Tensor:
    """(B, S): `amount`, the logarithm of a factor, at the tokens of calm frames and of their stamps, else 0.

    Args:
        input_ids: (B, S). calm: (B, F) bool.
        video_token: id that stands for each of a frame's tokens. stamps: ids of the tokens that tell times.
    """
    shown = input_ids == video_token
    per_frame = int(shown[0].sum()) // calm.shape[1]
    frame = torch.div(
        shown.cumsum(1) - shown.int(), per_frame, rounding_mode="floor"
    )  # a stamp's is the one behind it
    within = frame < calm.shape[1]
    told = shown | torch.isin(input_ids, stamps)
    return amount * (told & within & calm.gather(1, frame.clamp(max=calm.shape[1] - 1)))


class Stretch:
    """Lengthens the steps of a model's mixers at the tokens for which `now` (B, S) says so, while it is not None."""

    def __init__(self, model: nn.Module):
        self.now: Tensor | None = None
        mixers = [module for module in model.modules() if hasattr(module, "dt_bias") and hasattr(module, "in_proj")]
        self.hooks = [
            mixer.in_proj.register_forward_hook(lambda _, inputs, out, mixer=mixer: self._lengthened(mixer, out))
            for mixer in mixers
        ]

    def remove(self) -> None:
        """Leave the model as it was."""
        for hook in self.hooks:
            hook.remove()

    def _lengthened(self, mixer: Any, projected: Tensor) -> Tensor | None:
        if self.now is None:
            return None
        if projected.shape[:2] != self.now.shape:
            have, want = tuple(projected.shape[:2]), tuple(self.now.shape)
            raise ValueError(f"{have} tokens come at once where {want} are lengthened: train with method=per_layer.")
        heads = mixer.dt_bias.shape[0]
        steps = projected[..., -heads:]
        with torch.no_grad():  # dt A, in logarithms
            decay = steps.float() + mixer.dt_bias.float() + mixer.A_log.float()
            longer = (-decay / _SMALL).clamp(0, 1) * self.now[..., None]
        return torch.cat([projected[..., :-heads], (steps + longer).to(projected.dtype)], -1)


class StretchedTrainer(VideoMa2mbaTrainer):
    """Trains with the stretches that its batches bring."""

    stretch: Stretch | None = None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As transformers'; `inputs` may hold `STRETCH`."""
        amounts = inputs.pop(STRETCH, None)
        if amounts is None:
            return super().training_step(model, inputs, *args, **kwargs)
        if self.stretch is None:
            self.stretch = Stretch(model)
        self.stretch.now = amounts.to(self.args.device)
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        finally:
            self.stretch.now = None
