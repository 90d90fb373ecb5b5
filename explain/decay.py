"""How much of what each frame wrote into the state is left when the answer begins: the decay weights of Mamba-2.

A head multiplies its state by exp(dt * A) at every token. The product of these factors over all tokens between a frame
and the answer is the share that is left of whatever the frame wrote. It says what could still be known, not what is
used: it depends neither on the answer nor on what the frame shows. Legend: L layers, H heads, S tokens, F frames.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DecayRecorder:
    """Adds up log decays by frame while the model reads; memory L * H * F numbers, whatever the number of tokens."""

    def __init__(self, language_model: Any, frames: int) -> None:
        self.mixers = [layer.mixer for layer in language_model.layers]
        heads = self.mixers[0].shape.num_heads
        # One place for each frame, one for the question, one for what lies outside of both.
        self.sums = torch.zeros(len(self.mixers), heads, frames + 2, dtype=torch.float64)
        self.places = torch.empty(0, dtype=torch.long)
        self.seen = [0] * len(self.mixers)

    @contextlib.contextmanager
    def recording(self, places: Tensor) -> Iterator[None]:
        """Record everything read inside: token s of it, however it is cut, belongs to place `places[s]` (S,).

        Places: 0 ... F-1 are frames, F is the question, F+1 is ignored.
        """
        self.places, self.seen = places, [0] * len(self.mixers)
        hooks = [
            mixer.in_proj.register_forward_hook(lambda _, __, out, layer=layer: self._add(layer, out))
            for layer, mixer in enumerate(self.mixers)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _add(self, layer: int, projected: Tensor) -> None:
        """projected (1, s, ...) ends in the raw step sizes of the H heads."""
        logs = log_decay(self.mixers[layer], projected[0]).cpu().double().T  # (H, s)
        first = self.seen[layer]
        self.seen[layer] += logs.shape[1]
        self.sums[layer].index_add_(1, self.places[first : self.seen[layer]], logs)

    def weights(self) -> Tensor:
        """fp64 (L, H, F): the factor by which each head's memory of each frame's last token was multiplied until the
        last token of the question."""
        later = self.sums[:, :, 1:-1]  # what comes behind frame f: frames f+1, ..., and the question
        return torch.exp(later.flip(-1).cumsum(-1).flip(-1))


def log_decay(mixer: nn.Module, projected: Tensor) -> Tensor:
    """dt * A of a mixer, (s, H), from the output of its in_proj (s, 2E + 2GN + H); as in `mixer_mamba2.mixer_core`."""
    shape = mixer.shape
    raw = projected[..., -shape.num_heads :].to(torch.promote_types(projected.dtype, torch.float32))
    dt = F.softplus(raw + mixer.dt_bias.to(raw)).clamp(*shape.time_step_limit)
    return -dt * torch.exp(mixer.A_log.to(raw))
