"""Mamba-2 blocks with explicit state. Parameter names are those of the Hugging Face and state-spaces checkpoints.

The residual stream is one tensor, kept in fp32 when the configuration says so. Inside a run of blocks it travels as
(residual, delta): delta is what the last mixer added, and the next norm does the addition, so that one fused kernel
adds, normalises and casts. Legend: B batch, S tokens, D model width, E inner width, L layers, W conv width.
"""

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .ops_conv import CAUSAL_CONV, add_last_inputs_gradient, causal_conv_torch, last_inputs
from .ops_costs import CoreCosts, MixerShape
from .ops_norm import GATED_RMS_NORM, PendingDelta, add_rms_norm, gated_rms_norm_torch
from .ops_registry import Backend
from .ops_ssd import SSD, gated_ssd, mask_steps, ssd_torch
from .state_layers import LayerState, Mamba2State


class CoreWeights(NamedTuple):
    """What a mixer computes with between its projections.

    conv: (C, 1, W); conv_bias: (C,) or None; dt_bias, A_log, D: (H,); norm: (E,).
    """

    conv: Tensor
    conv_bias: Tensor | None
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    norm: Tensor


class CoreBackends(NamedTuple):
    """The backends of the three operations between the projections: kernels all of them, or PyTorch all of them."""

    conv: Backend
    ssd: Backend
    norm: Backend

    @classmethod
    def pick(
        cls,
        shape: MixerShape,
        device: torch.device,
        dtype: torch.dtype,
        tokens: int,
        padded: bool = False,
        packed: bool = False,
    ) -> "CoreBackends":
        """For `tokens` tokens a row on `device`, computed in `dtype`."""
        call = (device, dtype, tokens, padded, packed)
        picked = cls(
            CAUSAL_CONV.pick(*call, channels=shape.conv_dim, offset=shape.inner, width=shape.conv_kernel),
            SSD.pick(*call, **shape.scan),
            GATED_RMS_NORM.pick(*call, width=shape.inner, groups=shape.n_groups),
        )
        return picked if all(backend.backward for backend in picked) else cls.named("torch")

    @classmethod
    def named(cls, name: str) -> "CoreBackends":
        """Those of one name; ValueError if there are none."""
        return cls(CAUSAL_CONV.named(name), SSD.named(name), GATED_RMS_NORM.named(name))

    @classmethod
    def preferred(cls) -> "CoreBackends":
        """Those that run where everything is served and installed."""
        return cls(CAUSAL_CONV.backends[0], SSD.backends[0], GATED_RMS_NORM.backends[0])

    @property
    def fused(self) -> bool:
        """Whether kernels run, and one autograd function spans them."""
        return self.norm.backward is not None

    @property
    def costs(self) -> CoreCosts:
        """What calls of them take."""
        return CoreCosts(*self, self.fused)


def mixer_core(
    zxbcdt: Tensor,
    weights: CoreWeights,
    state: Mamba2State | None,
    shape: MixerShape,
    lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
    soon: bool = False,
) -> tuple[Tensor, Mamba2State]:
    """The inside of a mixer between its projections: causal convolution, SSD scan and gated norm.

    Args:
        zxbcdt: (B, S, 2E + 2GN + H) output of in_proj: gate z, then x, B and C, then the step size before its bias.
        state: what the layer carries so far, None for the start of a sequence.
        lengths: (B,) int64, how many of the S tokens of each row are real; the rest is padding on the right, which
            leaves the state alone. None means all.
        seq_idx: (B, W-1+S) int32 sample number of each remembered row of the convolution and of each token of a packed
            sequence, not decreasing, 0 for the sample that the given state belongs to. State and convolution restart
            at every change; padding has the number of the last real token.
        soon: backward comes next, and would hold the convolution's output anyway: it is kept, not computed again.

    Returns:
        y (B, S, E) ready for out_proj, the new state, an independent copy.
    """
    return _run_core(*_core_inputs(zxbcdt, weights, state, shape, lengths, seq_idx), shape, lengths, seq_idx, soon)


def gated_core(
    zxbcdt: Tensor,
    weights: CoreWeights,
    state: Mamba2State | None,
    shape: MixerShape,
    lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Mamba2State]:
    """`mixer_core` where nothing is differentiated; on our kernels without the gated norm's factor, a pass over memory
    less.

    Returns:
        y (B, S, E); sums of squares (B, S, H) fp32 that its factor is made of, None where y is normed; the state.
    """
    backends, zxbcdt, weights, state = _core_inputs(zxbcdt, weights, state, shape, lengths, seq_idx)
    # What is not normed yet may be larger than fp16 can tell.
    ours = backends.fused and backends.ssd.name == "triton" and shape.n_groups == 1
    if not ours or zxbcdt.dtype == torch.float16:
        y, state = _run_core(backends, zxbcdt, weights, state, shape, lengths, seq_idx)
        return y, None, state
    z, xbc_raw, dt = zxbcdt.split(shape.parts, dim=-1)
    halo_ids = _contiguous(seq_idx)
    ids = None if seq_idx is None else _contiguous(seq_idx[:, shape.conv_kernel - 1 :])
    (xbc,), _ = backends.conv.forward(xbc_raw, weights.conv, weights.conv_bias, state.conv, halo_ids)
    x, b, c = _heads(xbc, shape)
    scan = (x, dt, -torch.exp(weights.A_log), b, c, weights.D, weights.dt_bias, state.ssm, ids)
    y, ssm, squares = gated_ssd(*scan, z, weights.norm.to(zxbcdt.dtype), **_scan_options(shape))
    return y.flatten(2), squares, Mamba2State(last_inputs(xbc_raw, state.conv, lengths), ssm)


def _core_inputs(
    zxbcdt: Tensor,
    weights: CoreWeights,
    state: Mamba2State | None,
    shape: MixerShape,
    lengths: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[CoreBackends, Tensor, CoreWeights, Mamba2State]:
    """Who computes, and everything in the types to compute in; the convolution's weights as (C, W)."""
    (batch, tokens, _), dtype = zxbcdt.shape, zxbcdt.dtype
    backends = CoreBackends.pick(
        shape, zxbcdt.device, dtype, tokens, padded=lengths is not None, packed=seq_idx is not None
    )
    work = torch.promote_types(dtype, torch.float32)
    if state is None:
        conv = zxbcdt.new_zeros(batch, shape.conv_dim, shape.conv_kernel - 1)
        ssm = zxbcdt.new_zeros(batch, shape.num_heads, shape.head_dim, shape.state_size, dtype=work)
        state = Mamba2State(conv, ssm)
    state = Mamba2State(state.conv.to(dtype), state.ssm.to(work))
    bias = None if weights.conv_bias is None else weights.conv_bias.to(dtype)
    heads = (weights.dt_bias.to(work), weights.A_log.to(work), weights.D.to(work))
    weights = CoreWeights(weights.conv.squeeze(1).to(dtype), bias, *heads, weights.norm)
    if not backends.fused:
        return backends, zxbcdt, weights, state
    if lengths is not None:
        z_xbc, dt = zxbcdt.split([shape.inner + shape.conv_dim, shape.num_heads], dim=-1)
        zxbcdt = torch.cat([z_xbc, mask_steps(dt, lengths)], dim=-1)
    if zxbcdt.is_cuda and backends.ssd.name == "triton":
        _compile_ahead(shape, backends, zxbcdt.device, dtype, bias is not None, seq_idx is not None,
                       torch.is_grad_enabled())  # fmt: skip
    return backends, zxbcdt.contiguous(), weights, state


def _run_core(
    backends: CoreBackends,
    zxbcdt: Tensor,
    weights: CoreWeights,
    state: Mamba2State,
    shape: MixerShape,
    lengths: Tensor | None,
    seq_idx: Tensor | None,
    soon: bool = False,
) -> tuple[Tensor, Mamba2State]:
    """`mixer_core` of what `_core_inputs` gives."""
    if not backends.fused:
        return _core_torch(zxbcdt, weights, state, shape, lengths, seq_idx)
    y, *new = _FusedCore.apply(
        zxbcdt, *weights[:-1], weights.norm.to(zxbcdt.dtype), *state, shape, backends, lengths, seq_idx, soon
    )
    return y, Mamba2State(*new)


def _core_torch(
    zxbcdt: Tensor,
    weights: CoreWeights,
    state: Mamba2State,
    shape: MixerShape,
    lengths: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Mamba2State]:
    """`mixer_core` in plain PyTorch: any device, any floating dtype, scan in fp32 (fp64 for fp64 inputs)."""
    z, xbc, dt = zxbcdt.split(shape.parts, dim=-1)
    xbc, conv = causal_conv_torch(xbc, weights.conv, weights.conv_bias, state.conv, lengths, seq_idx)
    ids = None if seq_idx is None else seq_idx[:, shape.conv_kernel - 1 :]
    x, b, c = _heads(xbc, shape)
    a = -torch.exp(weights.A_log.to(state.ssm.dtype))
    options = (shape.chunk_size, shape.time_step_limit, lengths, ids)
    y, ssm = ssd_torch(x, dt, a, b, c, weights.D, weights.dt_bias, state.ssm, *options)
    y = gated_rms_norm_torch(y.flatten(2).to(zxbcdt.dtype), z, weights.norm, shape.eps, shape.n_groups)
    return y, Mamba2State(conv, ssm)


def _heads(xbc: Tensor, shape: MixerShape) -> tuple[Tensor, Tensor, Tensor]:
    """Views x (B, S, H, P), B and C (B, S, G, N) of the convolution's output (B, S, C)."""
    group = shape.n_groups * shape.state_size
    x, b, c = xbc.split([shape.inner, group, group], dim=-1)
    return (
        x.unflatten(-1, (shape.num_heads, shape.head_dim)),
        b.unflatten(-1, (shape.n_groups, shape.state_size)),
        c.unflatten(-1, (shape.n_groups, shape.state_size)),
    )


class _FusedCore(torch.autograd.Function):
    """`mixer_core` on kernels, as one node of autograd: it keeps the projection's output and what the operations say
    they keep, recomputes the convolution unless backward comes `soon`, and writes every gradient in place into one
    buffer."""

    @staticmethod
    def forward(
        ctx: Any,
        zxbcdt: Tensor,
        taps: Tensor,
        conv_bias: Tensor | None,
        dt_bias: Tensor,
        A_log: Tensor,
        D: Tensor,
        norm_weight: Tensor,
        conv_state: Tensor,
        ssm_state: Tensor,
        shape: MixerShape,
        backends: CoreBackends,
        lengths: Tensor | None,
        seq_idx: Tensor | None,
        soon: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        z, xbc_raw, dt = zxbcdt.split(shape.parts, dim=-1)
        halo_ids = _contiguous(seq_idx)
        ids = None if seq_idx is None else _contiguous(seq_idx[:, shape.conv_kernel - 1 :])
        (xbc,), _ = backends.conv.forward(xbc_raw, taps, conv_bias, conv_state, halo_ids)
        x, b, c = _heads(xbc, shape)
        a = -torch.exp(A_log)
        (y, new_ssm_state), ssd_kept = backends.ssd.forward(
            x, dt, a, b, c, D, dt_bias, ssm_state, ids, **_scan_options(shape)
        )
        y = y.flatten(2)
        (out,), norm_kept = backends.norm.forward(y, z, norm_weight, **_norm_options(shape))
        new_conv_state = last_inputs(xbc_raw, conv_state, lengths)
        ctx.save_for_backward(
            zxbcdt, taps, conv_bias, dt_bias, a, D, norm_weight, conv_state, lengths, halo_ids, ids, y,
            xbc if soon else None, *ssd_kept, *norm_kept,
        )  # fmt: skip
        ctx.shape, ctx.backends, ctx.ssd_kept = shape, backends, len(ssd_kept)
        ctx.set_materialize_grads(False)
        return out, new_conv_state, new_ssm_state

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dout: Tensor | None, dconv_out: Tensor | None, dssm_out: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        shape, backends = ctx.shape, ctx.backends
        (zxbcdt, taps, conv_bias, dt_bias, a, D, norm_weight, conv_state, lengths, halo_ids, ids, y,
         xbc, *kept) = ctx.saved_tensors  # fmt: skip
        ssd_kept, norm_kept = kept[: ctx.ssd_kept], kept[ctx.ssd_kept :]
        if dout is None:  # only a state was used
            dout = torch.zeros_like(y)
        z, xbc_raw, dt = zxbcdt.split(shape.parts, dim=-1)
        grad = torch.empty_like(zxbcdt)
        dz, dxbc_raw, ddt = grad.split(shape.parts, dim=-1)
        conv_inputs = (xbc_raw, taps, conv_bias, conv_state, halo_ids)
        if xbc is None:  # cheaper than keeping it
            (xbc,), _ = backends.conv.forward(*conv_inputs)
        x, b, c = _heads(xbc, shape)
        dy, _, dnorm = backends.norm.backward((y, z, norm_weight), norm_kept, (dout,), dz, **_norm_options(shape))
        dxbc = torch.empty_like(xbc)
        dx, db, dc = _heads(dxbc, shape)
        # The state's values are not looked at: the states entering the chunks were kept.
        _, _, da, _, _, dD, ddt_bias, dssm_in, _ = backends.ssd.backward(
            (x, dt, a, b, c, D, dt_bias, None, ids), ssd_kept, (dy.view(x.shape), dssm_out), (dx, ddt, db, dc),
            **_scan_options(shape),
        )  # fmt: skip
        _, dtaps, dconv_bias, dconv_in, _ = backends.conv.backward(conv_inputs, (), (dxbc,), dxbc_raw)
        if dconv_out is not None:
            add_last_inputs_gradient(dconv_out, dxbc_raw, dconv_in, lengths)
        # d(-exp(A_log)) = a, because a is its own derivative.
        return grad, dtaps, dconv_bias, ddt_bias, da * a, dD, dnorm, dconv_in, dssm_in, None, None, None, None, None


class _Context:
    """Stands for autograd's context in `_compile_ahead`."""

    saved_tensors: tuple[Tensor | None, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep the tensors."""
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        """Nothing to do."""


@functools.cache
def _compile_ahead(
    shape: MixerShape,
    backends: CoreBackends,
    device: torch.device,
    dtype: torch.dtype,
    bias: bool,
    packed: bool,
    gradients: bool,
) -> None:
    """Have our kernels of a mixer compiled all at the same time, which takes a third of what it takes when each is as
    its turn comes. Once for every kind of call; what is needed, a call of two tokens tells."""
    from .ops_triton_parts import compiling_ahead, triton

    if not hasattr(triton, "AsyncCompileMode"):
        return
    wide: dict[str, Any] = {"device": device, "dtype": torch.float32}
    own: dict[str, Any] = {"device": device, "dtype": dtype}
    heads = torch.zeros(shape.num_heads, **wide)
    ids = torch.zeros(1, shape.conv_kernel + 1, dtype=torch.int32, device=device) if packed else None
    with torch.no_grad(), compiling_ahead():
        context: Any = _Context()
        results = _FusedCore.forward(
            context, torch.zeros(1, 2, shape.projected, **own), torch.zeros(shape.conv_dim, shape.conv_kernel, **own),
            torch.zeros(shape.conv_dim, **own) if bias else None, heads, heads, heads,
            torch.zeros(shape.inner, **own), torch.zeros(1, shape.conv_dim, shape.conv_kernel - 1, **own),
            torch.zeros(1, shape.num_heads, shape.head_dim, shape.state_size, **wide), shape, backends, None, ids,
            False,
        )  # fmt: skip
        if gradients:
            _FusedCore.backward(context, *results)


def _scan_options(shape: MixerShape) -> dict[str, Any]:
    return {"chunk_size": shape.chunk_size, "dt_limit": shape.time_step_limit}


def _norm_options(shape: MixerShape) -> dict[str, Any]:
    return {"eps": shape.eps, "groups": shape.n_groups}


def _contiguous(seq_idx: Tensor | None) -> Tensor | None:
    return None if seq_idx is None else seq_idx.to(torch.int32).contiguous()


class Ma2mbaRMSNorm(nn.Module):
    """Adds the pending `delta` to the residual stream and normalises the sum."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(
        self, residual: Tensor, delta: Tensor | PendingDelta | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """residual (B, S, D), delta (B, S, D), pending or None -> normed (B, S, D) in `dtype`, residual + delta."""
        return add_rms_norm(residual, delta, self.weight, self.eps, dtype)


def compute_dtype(weight: Tensor, kind: str) -> torch.dtype:
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

    def forward(self) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]  # see above: it takes no input
        return self.weight, self.bias


class Ma2mbaMixer(nn.Module):
    """Projections around `mixer_core`. Both are called as modules, so adapters on them always take part."""

    core: Callable[..., tuple[Tensor, Mamba2State]] = staticmethod(mixer_core)  # another one while ranks share heads

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
        state: Mamba2State | None = None,
        lengths: Tensor | None = None,
        seq_idx: Tensor | None = None,
        unread: bool = False,
        pending: bool = False,
    ) -> tuple[Tensor | PendingDelta, Mamba2State]:
        """u (B, S, D) -> y (B, S, D) and the new state. Arguments as in `mixer_core`.

        With `unread`, the caller promises never to look at y, only to send a gradient into it (recomputation); with
        `pending`, to differentiate nothing, and to take y without the gated norm's factor as well.
        """
        conv_weight, conv_bias = self.conv1d()
        weights = CoreWeights(conv_weight, conv_bias, self.dt_bias, self.A_log, self.D, self.norm())
        if pending and self.core is mixer_core and _is_plain_linear(self.out_proj):
            y, squares, state = gated_core(self.in_proj(u), weights, state, self.shape, lengths, seq_idx)
            y = self.out_proj(y)
            return y if squares is None else PendingDelta(y, squares, self.shape.inner, self.shape.eps), state
        y, state = self.core(self.in_proj(u), weights, state, self.shape, lengths, seq_idx, soon=unread)
        if unread and _is_plain_linear(self.out_proj):
            return _UnreadLinear.apply(y, self.out_proj.weight.to(y.dtype)), state
        return self.out_proj(y), state


def _is_plain_linear(module: nn.Module) -> bool:
    """No adapter, no quantised or sharded weight, no hook: a call is a matrix product and nothing else."""
    plain = type(module) is nn.Linear and type(module.weight) is nn.Parameter and module.bias is None
    return plain and not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


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
        delta: Tensor | PendingDelta | None,
        state: Mamba2State | None = None,
        lengths: Tensor | None = None,
        seq_idx: Tensor | None = None,
        unread: bool = False,
        pending: bool = False,
    ) -> tuple[Tensor, Tensor | PendingDelta, Mamba2State]:
        """(residual, delta, state) -> the same after the layer; the stream is residual + delta."""
        # Under autocast at once what in_proj would cast to: in 16 bits the fused kernel serves, and keeps less.
        normed, residual = self.norm(residual, delta, compute_dtype(self.norm.weight, residual.device.type))
        delta, state = self.mixer(normed, state, lengths, seq_idx, unread, pending)
        return residual, delta, state


def run_blocks(
    blocks: Sequence[nn.Module],
    x: Tensor,
    states: Sequence[LayerState | None],
    lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
    unread: bool = False,
    around: Callable[[nn.Module], AbstractContextManager[object]] | None = None,
    streams: Sequence[list[Tensor]] = (),
    delta: Tensor | None = None,
    reading: bool = False,
) -> tuple[Tensor, Tensor, list[LayerState]]:
    """Run consecutive blocks over one segment.

    Args:
        x: (B, S, D) residual stream. states: one per block, None for the start of a sequence.
        unread: the values of the last delta will not be looked at, only its gradient is wanted.
        around: runs each block's `forward` within this context, past hooks on the block; see `parallel_shards`.
        streams: a list for each block, to which the stream in front of it is appended; nothing is by default.
        delta: (B, S, D) what x still lacks, where blocks before these returned it so.
        reading: nothing is differentiated, and blocks may leave the end of their work to the next.

    Returns:
        residual and delta (B, S, D), whose sum is the stream, the blocks' new states.
    """
    new: list[LayerState] = []
    pending = reading and not streams and not torch.is_grad_enabled()
    left: Tensor | PendingDelta | None = delta
    for index, (block, state) in enumerate(zip(blocks, states, strict=True)):
        if streams:
            streams[index].append(x.clone() if left is None else x + cast(Tensor, left))
        arguments = (x, left, state, lengths, seq_idx, unread and index == len(blocks) - 1, pending)
        if around is None:
            x, left, state = block(*arguments)
        else:
            with around(block):
                x, left, state = block.forward(*arguments)
        new.append(state)
    assert left is not None, "a stack has at least one block"
    return x, left.settled() if isinstance(left, tuple) else left, new


def is_mixer(module: nn.Module) -> TypeGuard[Ma2mbaMixer]:
    """Whether this is a mixer; by what it has, as the same file loaded as remote code makes another class of it."""
    return hasattr(module, "dt_bias")


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
