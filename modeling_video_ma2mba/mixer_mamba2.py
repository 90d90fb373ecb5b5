"""Mamba-2 blocks with explicit state. Parameter names are those of the Hugging Face and state-spaces checkpoints.

The residual stream is one tensor, kept in fp32 when the configuration says so. Inside a run of blocks it travels as
(residual, delta): delta is what the last mixer added, and the next norm does the addition, so that one fused kernel
adds, normalises and casts. Legend: B batch, S tokens, D model width, E inner width, L layers, W conv width.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from .ops_ssd import MixerShape, backend_for, mixer_core


class Ma2mbaRMSNorm(nn.Module):
    """Adds the pending `delta` to the residual stream and normalises the sum."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, residual: Tensor, delta: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """residual (B, S, D), delta (B, S, D) or None -> normed (B, S, D) in `dtype`, residual + delta."""
        if backend_for(residual, dtype) == "kernels":
            from .ops_norm_mamba_ssm import add_rms_norm

            return add_rms_norm(residual, delta, self.weight, self.eps, dtype)
        if delta is not None:
            residual = residual + delta.to(residual.dtype)
        work = torch.promote_types(residual.dtype, torch.float32)
        x = residual.to(work)
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight.to(work)).to(dtype), residual


def _compute_dtype(weight: Tensor, kind: str) -> torch.dtype:
    """The type that a projection beside `weight` computes in on a device of `kind`: autocast's where that is on."""
    if torch.is_autocast_enabled(kind) and weight.dtype != torch.float64:  # autocast leaves fp64 alone
        return torch.get_autocast_dtype(kind)
    return weight.dtype


class Ma2mbaGatedNorm(nn.Module):
    """Holder of the mixer's norm weight, which a call returns; the arithmetic is part of `mixer_core`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self) -> Tensor:
        return self.weight


class Ma2mbaConvolution(nn.Conv1d):
    """Holder of the convolution's weight and bias, which a call returns; the arithmetic is part of `mixer_core`.

    Weights are fetched by calls because hooks on modules (offloading by accelerate) bring them only for a call.
    """

    def forward(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.bias


class Ma2mbaMixer(nn.Module):
    """Projections around `mixer_core`. Both are called as modules, so adapters on them always take part."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.shape = MixerShape(
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            state_size=config.state_size,
            n_groups=config.n_groups,
            conv_kernel=config.conv_kernel,
            chunk_size=config.chunk_size,
            eps=config.layer_norm_epsilon,
            time_step_limit=tuple(config.time_step_limit),
        )
        inner, conv_dim = self.shape.inner, self.shape.conv_dim
        self.in_proj = nn.Linear(config.hidden_size, inner + conv_dim + config.num_heads, bias=config.use_bias)
        kernel, bias = config.conv_kernel, config.use_conv_bias
        self.conv1d = Ma2mbaConvolution(conv_dim, conv_dim, kernel, groups=conv_dim, bias=bias)  # (C, 1, W) and (C,)
        self.dt_bias = nn.Parameter(torch.ones(config.num_heads))
        self.A_log = nn.Parameter(torch.log(torch.arange(1, config.num_heads + 1, dtype=torch.float32)))
        self.D = nn.Parameter(torch.ones(config.num_heads))
        self.norm = Ma2mbaGatedNorm(inner)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=config.use_bias)

    def forward(
        self,
        u: Tensor,
        conv_state: Tensor | None = None,
        ssm_state: Tensor | None = None,
        lengths: Tensor | None = None,
        seq_idx: Tensor | None = None,
        unread: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """u (B, S, D) -> y (B, S, D), conv_state (B, C, W-1), ssm_state (B, H, P, N). Arguments as in `mixer_core`.

        With `unread`, the caller promises never to look at y, only to send a gradient into it (recomputation).
        """
        conv_weight, conv_bias = self.conv1d()
        y, conv_state, ssm_state = mixer_core(
            self.in_proj(u),
            conv_weight,
            conv_bias,
            self.dt_bias,
            self.A_log,
            self.D,
            self.norm(),
            conv_state,
            ssm_state,
            self.shape,
            lengths,
            seq_idx,
        )
        if unread and _is_plain_linear(self.out_proj):
            return _UnreadLinear.apply(y, self.out_proj.weight.to(y.dtype)), conv_state, ssm_state
        return self.out_proj(y), conv_state, ssm_state


def _is_plain_linear(module: nn.Module) -> bool:
    """No adapter, no quantised or sharded weight, no hook: a call is a matrix product and nothing else."""
    plain = type(module) is nn.Linear and type(module.weight) is nn.Parameter and module.bias is None
    return plain and not module._forward_hooks and not module._forward_pre_hooks


class _UnreadLinear(torch.autograd.Function):
    """A linear layer whose output nobody reads, so it is never computed: only its backward is real.

    Recomputing a run of blocks needs the last projection's gradients, not its result.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(y, weight)
        return y.new_zeros(()).expand(*y.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, Tensor | None]:
        y, weight = ctx.saved_tensors
        dy = dout @ weight if ctx.needs_input_grad[0] else None
        return dy, dout.flatten(0, -2).T @ y.flatten(0, -2) if ctx.needs_input_grad[1] else None


class Ma2mbaBlock(nn.Module):
    """Norm, mixer and residual addition of one layer."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.norm = Ma2mbaRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = Ma2mbaMixer(config)

    def forward(
        self,
        residual: Tensor,
        delta: Tensor | None,
        conv_state: Tensor | None = None,
        ssm_state: Tensor | None = None,
        lengths: Tensor | None = None,
        seq_idx: Tensor | None = None,
        unread: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(residual, delta, state) -> (residual, delta, conv_state, ssm_state); the stream is residual + delta."""
        # Under autocast at once what in_proj would cast to: in 16 bits the fused kernel serves, and keeps less.
        normed, residual = self.norm(residual, delta, _compute_dtype(self.norm.weight, residual.device.type))
        delta, conv_state, ssm_state = self.mixer(normed, conv_state, ssm_state, lengths, seq_idx, unread)
        return residual, delta, conv_state, ssm_state


def run_blocks(
    blocks: Sequence[nn.Module],
    x: Tensor,
    conv_states: Sequence[Tensor | None],
    ssm_states: Sequence[Tensor | None],
    lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
    unread: bool = False,
    around: Callable[[nn.Module], AbstractContextManager] | None = None,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Run consecutive blocks over one segment.

    Args:
        x: (B, S, D) residual stream. conv_states, ssm_states: one entry per block, None for the start of a sequence.
        unread: the values of the last delta will not be looked at, only its gradient is wanted.
        around: runs each block's `forward` within this context, past hooks on the block; see `parallel_shards`.

    Returns:
        residual and delta (B, S, D), whose sum is the stream, the blocks' new conv states and SSM states.
    """
    delta, new_conv, new_ssm = None, [], []
    for index, (block, conv_state, ssm_state) in enumerate(zip(blocks, conv_states, ssm_states, strict=True)):
        last = unread and index == len(blocks) - 1
        arguments = (x, delta, conv_state, ssm_state, lengths, seq_idx, last)
        if around is None:
            x, delta, conv_state, ssm_state = block(*arguments)
        else:
            with around(block):
                x, delta, conv_state, ssm_state = block.forward(*arguments)
        new_conv.append(conv_state)
        new_ssm.append(ssm_state)
    return x, delta, new_conv, new_ssm


@torch.no_grad()
def init_mixer_(mixer: Ma2mbaMixer, config: Any, init: Any) -> None:
    """Mamba-2's initialisation (state-spaces/mamba `Mamba2.__init__`) of everything but the projections' scale.

    `init` is `transformers.initialization`, whose functions leave already loaded tensors alone.
    """
    heads = config.num_heads
    device = mixer.A_log.device
    init.copy_(mixer.A_log, torch.log(torch.empty(heads, device=device).uniform_(1, 16)))
    init.ones_(mixer.D)
    low, high = math.log(config.time_step_min), math.log(config.time_step_max)
    dt = torch.exp(torch.rand(heads, device=device) * (high - low) + low).clamp(min=config.time_step_floor)
    init.copy_(mixer.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
    init.ones_(mixer.norm.weight)
    bound = 1 / math.sqrt(config.conv_kernel)
    init.uniform_(mixer.conv1d.weight, -bound, bound)
    if mixer.conv1d.bias is not None:
        init.uniform_(mixer.conv1d.bias, -bound, bound)
    init.kaiming_uniform_(mixer.in_proj.weight, a=math.sqrt(5))
    init.kaiming_uniform_(mixer.out_proj.weight, a=math.sqrt(5))
    if config.rescale_prenorm_residual:
        # One mixer per layer adds to the residual stream: keep its variance constant with depth (GPT-2's rule).
        init.copy_(mixer.out_proj.weight, mixer.out_proj.weight / math.sqrt(config.num_hidden_layers))
    for linear in (mixer.in_proj, mixer.out_proj):
        if linear.bias is not None:
            init.zeros_(linear.bias)
