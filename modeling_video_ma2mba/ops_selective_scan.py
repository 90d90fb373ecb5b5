"""The inside of a Mamba-1 mixer: convolution and selective scan (S6) for several directions at once, in PyTorch.

`s_t = exp(dt_t A) s_(t-1) + dt_t B_t u_t`, `y_t = C_t s_t + D u_t`, gated by `silu(z_t)`; a reversed direction runs
from the last token to the first. Memory is linear in length: only the state between groups of tokens is kept, all else
is computed again in backward. `ops_selective_scan_triton` holds the same functions as kernels for CUDA.

Legend: K directions, B batch, S tokens, E channels, N state per channel, R rank of the step, W conv width.
Equations: Gu and Dao, arXiv 2312.00752, section 3.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .ops_registry import Backend, Call, Operation, run

# Tokens of a chunk are walked one after the other, all chunks of a group together; a group's states are held at once.
CHUNK, GROUP = 16, 1024


def directional_conv(x: Tensor, weight: Tensor, bias: Tensor, reverse: Sequence[bool]) -> Tensor:
    """`silu` of a causal depthwise convolution in each direction.

    Args:
        x: (B, S, E). weight: (K, E, W), the last tap on the current token. bias: (K, E).
        reverse: for each direction whether it runs from the last token to the first.

    Returns:
        (K, B, S, E).
    """
    tokens, width = x.shape[1], weight.shape[-1]
    work = torch.promote_types(x.dtype, torch.float32)
    wide, out = x.to(work), []
    for taps, offset, backwards in zip(weight.to(work), bias.to(work), reverse, strict=True):
        padded = F.pad(wide, (0, 0, 0, width - 1) if backwards else (0, 0, width - 1, 0))
        steps = range(width)
        terms = (padded[:, k : k + tokens] * taps[:, width - 1 - k if backwards else k] for k in steps)
        out.append(F.silu(sum(terms) + offset).to(x.dtype))
    return torch.stack(out)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    z: Tensor | None = None,
    initial_state: Tensor | None = None,
    reverse: Sequence[bool] = (False,),
) -> tuple[Tensor, Tensor]:
    """Scan every direction; differentiable in every tensor.

    Args:
        u: (K, B, S, E) what enters. dt: (K, B, S, E) the step before its bias and softplus.
        A: (K, E, N), negative. B, C: (K, B, S, N). D, dt_bias: (K, E).
        z: (B, S, E), the gate that all directions share; None gates nothing.
        initial_state: (K, B, E, N) before a direction's first token (of a reversed one: after the last); None: zeros.

    Returns:
        y (K, B, S, E) in u's type, and the state after a direction's last token (K, B, E, N), fp32 (fp64 for fp64).
    """
    work = torch.promote_types(u.dtype, torch.float32)
    A, D = A.to(work), D.to(work)
    step = F.softplus(dt.to(work) + dt_bias.to(work)[:, None, None])
    inputs = [_turn(t.to(work), reverse) for t in (u, step, B, C)]
    if initial_state is None:
        state = inputs[0].new_zeros(*u.shape[:2], u.shape[3], A.shape[-1])
    else:
        state = initial_state.to(work)
    outputs = []
    for piece in zip(*(t.split(GROUP, dim=2) for t in inputs), strict=True):
        group = (*piece, A, state)
        if torch.is_grad_enabled():
            y, state = checkpoint(_scan_group, *group, use_reentrant=False, preserve_rng_state=False)
        else:
            y, state = _scan_group(*group)
        outputs.append(y)
    y = _turn(torch.cat(outputs, dim=2), reverse) + u.to(work) * D[:, None, None]
    if z is not None:
        y = y * F.silu(z.to(work))
    return y.to(u.dtype), state


def _turn(tensor: Tensor, reverse: Sequence[bool]) -> Tensor:
    """Flip the tokens (axis 2) of reversed directions (axis 0)."""
    if not any(reverse):
        return tensor
    return torch.stack([part.flip(1) if back else part for part, back in zip(tensor, reverse, strict=True)])


def _scan_group(u: Tensor, step: Tensor, B: Tensor, C: Tensor, A: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One group of tokens from `state`; returns y (K, B, S, E) without D, and the state after it.

    All chunks are walked at the same time, twice: from zero for what a chunk adds to the state, then from the state
    that enters it. So only one token's states of every chunk are held, which stay in a CPU's cache.
    """
    tokens = u.shape[2]
    chunk = min(CHUNK, tokens)
    missing = -tokens % chunk
    if missing:  # steps of size zero change nothing
        u, step, B, C = (F.pad(t, (0, 0, 0, missing)) for t in (u, step, B, C))
    u, step, B, C = (t.unflatten(2, (-1, chunk)) for t in (u, step, B, C))  # (K, B, chunks, Q, E or N)
    rates = A[:, None, None]  # (K, 1, 1, E, N)
    added = u * step

    def after(states: Tensor | None, i: int) -> Tensor:
        """States (K, B, chunks, E, N) after token i of every chunk."""
        new = added[:, :, :, i, :, None] * B[:, :, :, i, None, :]
        return new if states is None else torch.addcmul(new, torch.exp(step[:, :, :, i, :, None] * rates), states)

    states = None
    for i in range(chunk):
        states = after(states, i)
    assert states is not None, "a group has tokens"
    passed = torch.exp(step.sum(3)[..., None] * rates)  # decay over a chunk
    entering = []
    for i in range(u.shape[2]):
        entering.append(state)
        state = torch.addcmul(states[:, :, i], passed[:, :, i], state)
    states, y = torch.stack(entering, dim=2), []
    for i in range(chunk):
        states = after(states, i)
        y.append((states @ C[:, :, :, i, :, None]).squeeze(-1))
    return torch.stack(y, dim=3).flatten(2, 3)[:, :, :tokens], state


def mamba1_core(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    reverse: Sequence[bool],
) -> Tensor:
    """What stands between the two projections of a Mamba-1 mixer, summed over its directions.

    Args:
        xz: (B, S, 2E) what enters and its gate, of the input projection.
        conv_weight: (K, E, W). conv_bias, dt_bias, D: (K, E). x_weight: (K, R + 2N, E). dt_weight: (K, E, R).
        A_log: (K, E, N). reverse: for each direction whether it runs from the last token to the first.

    Returns:
        (B, S, E) in xz's type.
    """
    backend = core_backend(xz.device, xz.dtype, xz.shape[1], A_log)
    tensors = (xz, conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A_log, D)
    return run(backend, *tensors, reverse=tuple(reverse), keep=torch.is_grad_enabled())


def core_backend(device: torch.device, dtype: torch.dtype, tokens: int, A_log: Tensor) -> Backend:
    """Which backend `mamba1_core` takes for rows of `tokens` tokens; A_log: (..., E, N)."""
    return MAMBA1_CORE.pick(device, dtype, tokens, channels=A_log.shape[-2], state=A_log.shape[-1])


def mamba1_core_torch(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    reverse: Sequence[bool],
    keep: bool = True,
) -> Tensor:
    """`mamba1_core` in plain PyTorch: in fp32, fp64 for fp64 inputs, but for the products."""
    x, z = xz.chunk(2, dim=-1)
    rank, state = dt_weight.shape[-1], A_log.shape[-1]
    u = directional_conv(x, conv_weight, conv_bias, reverse)
    parts = (u.flatten(1, 2) @ x_weight.to(u.dtype).transpose(1, 2)).unflatten(1, u.shape[1:3])
    low, B, C = parts.split([rank, state, state], dim=-1)
    dt = (low.flatten(1, 2) @ dt_weight.to(u.dtype).transpose(1, 2)).view_as(u)
    A = -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))
    return selective_scan(u, dt, A, B, C, D, dt_bias, z, reverse=reverse)[0].sum(dim=0)


def _triton_forward(*tensors: Tensor, **options: Any) -> Any:
    from .ops_mamba1_triton import core_forward

    return core_forward(*tensors, **options)


def _triton_backward(*arguments: Any, **options: Any) -> Any:
    from .ops_mamba1_triton import core_backward

    return core_backward(*arguments, **options)


def _triton_fits(call: Call) -> bool:
    state = int(call.sizes["state"])
    return call.tokens > 0 and call.sizes["channels"] % 32 == 0 and state in (4, 8, 16, 32)


_TRITON = Backend(
    "triton",
    _triton_forward,
    _triton_backward,
    kept_bytes=lambda itemsize, channels, state: 2 * 4 * channels * state / 128,  # two directions' states a chunk
    device="cuda",
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    available=lambda: importlib.util.find_spec("triton") is not None,
    fits=_triton_fits,
)
_TORCH = Backend("torch", mamba1_core_torch, kept_bytes=lambda itemsize, channels, state: 12 * itemsize * channels)
MAMBA1_CORE = Operation("mamba1_core", (_TRITON, _TORCH))
"""Sizes: channels E, state N. Kernels take what `mamba1_core` takes, and `keep`: whether there will be a backward."""
