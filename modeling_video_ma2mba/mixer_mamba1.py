"""The bidirectional Mamba-1 mixer of VideoMamba: two gated scans in opposite directions between shared projections.

Legend: B batch, S tokens, C model width, E inner channels, N state per channel, R step rank, K scans.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .ops_selective_scan import core_backend, mamba1_core


@dataclass(frozen=True)
class ScanPass:
    """One scan of a mixer: whose weights (suffix of their names), which way, in which order of tokens.

    `order` is "spatial" (tokens as they come) or "temporal" (the mixer's caller knows the permutation).
    """

    weights: str
    reverse: bool
    order: str


def scan_passes(scan_order: str, layer: int, layers: int, share_weights: bool) -> tuple[ScanPass, ...]:
    """The scans of block `layer` of `layers` under `VideoMambaConfig.scan_order`."""
    forward, backward = ("", False), ("_b", True)
    if scan_order == "spatiotemporal_v1":
        return ScanPass(*forward, "spatial"), ScanPass(*backward, "temporal")
    if scan_order == "spatiotemporal_v2":
        others = (forward, backward) if share_weights else (("_t", False), ("_t_b", True))
        spatial = [ScanPass(*which, "spatial") for which in (forward, backward)]
        return (*spatial, *(ScanPass(*which, "temporal") for which in others))
    temporal = {
        "spatial_first": False,
        "temporal_first": True,
        "spatial_then_temporal": layer >= layers // 2,
        "temporal_then_spatial": layer < layers // 2,
        "alternating": layer % 2 == 1,
    }[scan_order]
    return tuple(ScanPass(*which, "temporal" if temporal else "spatial") for which in (forward, backward))


ScanWeights = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Norm(Protocol):
    """An RMS norm."""

    weight: nn.Parameter
    eps: float


class VideoMambaMixer(nn.Module):
    """`out_proj` of the sum of all scans of `in_proj(hidden)`; parameters are named as in released checkpoints."""

    A_log: nn.Parameter

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.passes = scan_passes(
            config.scan_order, layer, config.num_hidden_layers, getattr(config, "share_scan_weights", True)
        )
        inner, state, rank = config.inner_size, config.state_size, config.time_step_rank
        self.in_proj = nn.Linear(config.hidden_size, 2 * inner, bias=False)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)
        for suffix in self.weight_sets:
            conv = nn.Conv1d(inner, inner, config.conv_kernel, groups=inner, padding=config.conv_kernel - 1)
            self.add_module(f"conv1d{suffix}", conv)
            self.add_module(f"x_proj{suffix}", nn.Linear(inner, rank + 2 * state, bias=False))
            self.add_module(f"dt_proj{suffix}", nn.Linear(rank, inner))
            self.register_parameter(self.rates_name(suffix), nn.Parameter(torch.zeros(inner, state)))
            self.register_parameter(f"D{suffix}", nn.Parameter(torch.zeros(inner)))

    @property
    def weight_sets(self) -> list[str]:
        """Suffixes of the sets of scan weights, each once."""
        return list(dict.fromkeys(each.weights for each in self.passes))

    @staticmethod
    def rates_name(suffix: str) -> str:
        """Name of the decay rates: the released checkpoints say `A_log` and `A_b_log`."""
        return f"A{suffix}_log"

    def forward(self, hidden: Tensor, temporal: Tensor | None = None, spatial: Tensor | None = None) -> Tensor:
        """(B, S, C) -> (B, S, C).

        Args:
            temporal: (S,) int64, `hidden[:, temporal]` is in temporal order; spatial: its inverse. Only needed where a
                scan of this layer is temporal.
        """
        projected = self.in_proj(hidden)
        total = None
        for order in dict.fromkeys(each.order for each in self.passes):
            passes = [each for each in self.passes if each.order == order]
            ordered = projected if order == "spatial" else projected[:, temporal]
            y = self._scan(ordered, passes)
            y = y if order == "spatial" else y[:, spatial]
            total = y if total is None else total + y
        return self.out_proj(total)

    def _scan(self, projected: Tensor, passes: list[ScanPass]) -> Tensor:
        """Sum (B, S, E) of the gated scans of `projected` (B, S, 2E), all in its order of tokens."""
        return mamba1_core(projected, *self.scan_weights(passes), reverse=[each.reverse for each in passes])

    def scan_weights(self, passes: Sequence[ScanPass]) -> ScanWeights:
        """Parameters of these scans, stacked, in the order in which `mamba1_core` takes them."""
        sets = [each.weights for each in passes]
        convs = [getattr(self, f"conv1d{name}") for name in sets]
        steps = [getattr(self, f"dt_proj{name}") for name in sets]
        return (
            torch.stack([conv.weight.squeeze(1) for conv in convs]),
            torch.stack([conv.bias for conv in convs]),
            torch.stack([getattr(self, f"x_proj{name}").weight for name in sets]),
            torch.stack([step.weight for step in steps]),
            torch.stack([step.bias for step in steps]),
            torch.stack([getattr(self, self.rates_name(name)) for name in sets]),
            torch.stack([getattr(self, f"D{name}") for name in sets]),
        )


def add_norm_mix(
    mixer: VideoMambaMixer, norm: Norm, delta: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """A whole block, `mixer(norm(residual + delta))` and the sum, as one node of autograd that keeps little more than
    the sum; None where that is not possible: without our kernels, in temporal order, with adapters or hooks on the
    projections, or under a residual stream that is not fp32. Under autocast it computes in the type that the linear
    layers would; norm and stream stay in fp32."""
    projections = (mixer.in_proj, mixer.out_proj)
    if any(type(part) is not nn.Linear or part._forward_hooks or part._forward_pre_hooks for part in projections):
        return None
    if any(each.order != "spatial" for each in mixer.passes):
        return None
    if residual is not None and residual.dtype != torch.float32:
        return None
    device = delta.device
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else norm.weight.dtype
    if core_backend(device, dtype, delta.shape[1], mixer.A_log).name != "triton":
        return None
    from .ops_mamba1_triton import MixerBlock

    return MixerBlock.apply(
        delta,
        residual,
        norm.weight,
        mixer.in_proj.weight,
        mixer.out_proj.weight,
        norm.eps,
        [each.reverse for each in mixer.passes],
        dtype,
        torch.is_grad_enabled(),
        *mixer.scan_weights(mixer.passes),
    )


@torch.no_grad()
def init_mixer_(mixer: VideoMambaMixer, config: Any, init: Any) -> None:
    """The released models' initialisation of everything but the linear layers, which came before: like every linear
    layer of a ViT they have normal weights and biases of zero, the step's included (its Mamba values are lost so), but
    where `config.time_step_range` asks for others.

    `init` is `transformers.initialization`, whose functions leave already loaded tensors alone.
    """
    for suffix in mixer.weight_sets:
        rates = getattr(mixer, mixer.rates_name(suffix))
        numbers = torch.arange(1, config.state_size + 1, dtype=torch.float32, device=rates.device)
        init.copy_(rates, torch.log(numbers).expand_as(rates).to(rates.dtype))
        init.ones_(getattr(mixer, f"D{suffix}"))
        bound = 1 / math.sqrt(config.conv_kernel)
        conv = getattr(mixer, f"conv1d{suffix}")
        init.uniform_(conv.weight, -bound, bound)
        init.uniform_(conv.bias, -bound, bound)
        if config.time_step_range is not None:
            bias = getattr(mixer, f"dt_proj{suffix}").bias
            low, high = (math.log(step) for step in config.time_step_range)
            steps = torch.exp(low + (high - low) * torch.rand_like(bias, dtype=torch.float32))
            init.copy_(bias, (steps + torch.log(-torch.expm1(-steps))).to(bias.dtype))  # softplus of it is the step
    # kaiming_uniform(a=sqrt 5) over sqrt(depth): one mixer per layer adds to the residual stream.
    bound = 1 / math.sqrt(config.inner_size * config.num_hidden_layers)
    init.uniform_(mixer.out_proj.weight, -bound, bound)
