"""The selective scan of Mamba-1 (S6) and its convolution, for several directions at once, in plain PyTorch.

`s_t = exp(dt_t A) s_(t-1) + dt_t B_t u_t`, `y_t = C_t s_t + D u_t`, gated by `silu(z_t)`; a reversed direction runs
from the last token to the first. Memory is linear in length: only the state between groups of tokens is kept, all else
is computed again in backward. `ops_selective_scan_triton` holds the same functions as kernels for CUDA.

Legend: K directions, B batch, S tokens, E channels, N state per channel, W conv width.
Equations: Gu and Dao, arXiv 2312.00752, section 3.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

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
    out = []
    for taps, offset, backwards in zip(weight.to(x.dtype), bias.to(x.dtype), reverse, strict=True):
        padded = F.pad(x, (0, 0, 0, width - 1) if backwards else (0, 0, width - 1, 0))
        steps = range(width)
        terms = (padded[:, k : k + tokens] * taps[:, width - 1 - k if backwards else k] for k in steps)
        out.append(F.silu(sum(terms) + offset))
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
        if torch.is_grad_enabled():
            y, state = checkpoint(_scan_group, *piece, A, state, use_reentrant=False, preserve_rng_state=False)
        else:
            y, state = _scan_group(*piece, A, state)
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
    """One group of tokens from `state`; returns y (K, B, S, E) without D, and the state after it."""
    tokens = u.shape[2]
    chunk = min(CHUNK, tokens)
    missing = -tokens % chunk
    if missing:  # steps of size zero change nothing
        u, step, B, C = (F.pad(t, (0, 0, 0, missing)) for t in (u, step, B, C))
    u, step, B, C = (t.unflatten(2, (-1, chunk)) for t in (u, step, B, C))  # (K, B, chunks, Q, E or N)
    rates = A[:, None, None]  # (K, 1, 1, E, N)
    added, inner, local = u * step, None, []
    for i in range(chunk):  # all chunks at once, each from a state of zero
        new = added[:, :, :, i, :, None] * B[:, :, :, i, None, :]
        inner = new if inner is None else torch.exp(step[:, :, :, i, :, None] * rates) * inner + new
        local.append(inner)
    passed = torch.exp(step.cumsum(3)[..., None] * rates.unsqueeze(3))  # decay since the chunk's start
    entering = []
    for i in range(u.shape[2]):
        entering.append(state)
        state = passed[:, :, i, -1] * state + inner[:, :, i]
    states = torch.stack(local, dim=3) + passed * torch.stack(entering, dim=2).unsqueeze(3)
    y = (states @ C.unsqueeze(-1)).squeeze(-1)
    return y.flatten(2, 3)[:, :, :tokens], state
