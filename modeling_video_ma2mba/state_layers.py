"""What one layer carries from token to token, by kind of mixer.

A kind is a named tuple of tensors whose first axis is the batch, with a name, a version for files, and what a
`VideoState` has to know of it. To add one: a class here, an entry in `KINDS`, and its name in `layer_kinds`.

Legend: B batch, C conv channels, W conv width, H heads, P head width, N state size.
"""

from collections.abc import Iterable
from itertools import islice
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor


class _Mamba2Tensors(NamedTuple):
    conv: Tensor
    ssm: Tensor


class Mamba2State(_Mamba2Tensors):
    """The state of a Mamba-2 mixer.

    conv: (B, C, W-1) the last raw inputs of the convolution, in the model's dtype.
    ssm: (B, H, P, N) SSM state, fp32 (fp64 in fp64 models).
    """

    __slots__ = ()
    kind: ClassVar[str] = "mamba2"
    version: ClassVar[int] = 1  # of these tensors' meaning, for files
    axes: ClassVar[tuple[str, ...]] = ("(L, B, C, W-1)", "(L, B, H, P, N)")  # of stacked layers
    wide: ClassVar[tuple[str, ...]] = ("ssm",)  # what is computed in at least fp32, whatever the model's dtype

    @classmethod
    def sizes(cls, config: Any) -> tuple[tuple[int, ...], ...]:
        """Sizes of the tensors without the batch, for a `Ma2mbaTextConfig`."""
        conv = (config.conv_dim, config.conv_kernel - 1)
        return conv, (config.num_heads, config.head_dim, config.state_size)

    def without_inputs_of(self, others: Tensor) -> "Mamba2State":
        """Blank the remembered inputs that come from other samples, (B, W-1) true where one does."""
        return self._replace(conv=self.conv.masked_fill(others.to(self.conv.device)[:, None], 0))


LayerState = Mamba2State
"""The state of one layer, of any kind."""
KINDS = {kind.kind: kind for kind in (Mamba2State,)}


def layer_kinds(config: Any) -> list[str]:
    """The kind of every layer of a model with this `Ma2mbaTextConfig`."""
    return [Mamba2State.kind] * config.num_hidden_layers


def tensor_dtype(kind: type[LayerState], field: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a kind's tensor in a model of `dtype`."""
    return torch.promote_types(dtype, torch.float32) if field in kind.wide else dtype


def flatten(layers: Iterable[LayerState]) -> list[Tensor]:
    """All tensors, layer after layer."""
    return [tensor for layer in layers for tensor in layer]


def regroup(kinds: Iterable[str], tensors: Iterable[Tensor]) -> list[LayerState]:
    """The layers of `flatten`, of which the kinds are known."""
    left = iter(tensors)
    return [KINDS[kind]._make(islice(left, len(KINDS[kind]._fields))) for kind in kinds]


def stack(layers: list[LayerState]) -> LayerState:
    """The tensors of layers of one kind with a leading layer axis, (L, B, …)."""
    return type(layers[0])._make(torch.stack(tensors) for tensors in zip(*layers, strict=True))


def unstack(stacked: LayerState) -> list[LayerState]:
    """The layers of `stack`, as views."""
    return [type(stacked)._make(tensors) for tensors in zip(*(t.unbind(0) for t in stacked), strict=True)]
