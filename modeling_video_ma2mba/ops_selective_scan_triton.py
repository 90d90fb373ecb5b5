"""The selective scan of `ops_selective_scan` as Triton kernels, forward and backward, all directions in one launch.

One program walks the tokens of a segment for a block of channels, all N states of a channel at once; a segment is as
long as the whole sequence where batch and channels alone fill the GPU, else segments run at the same time and a short
pass hands states from one to the next. Of forward only the state at every chunk's start is kept. Backward goes through
the chunks from the end: it walks a chunk once to leave the state of every fourth token in a scratch that stays in the
cache, then takes four tokens at a time, forward and back. All state is fp32, no matrix unit is used, and sums over
channels go through one partial sum for each block, added in a fixed order: results do not change from run to run.

Settings come from a fixed table (`settings_for`): nothing is tuned when a model runs.
Layout: K directions, B batch, S tokens, E channels, N states, W conv width; states are (..., N, E) here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

try:  # the guard keeps transformers from demanding it; the other file of Mamba-1 kernels takes both from here
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    raise ImportError("the selective scan's kernels need triton, which comes with PyTorch's CUDA builds") from error

TOKENS_AT_ONCE = 4
"""Tokens whose states backward holds in registers; written out in the kernels."""


@dataclass(frozen=True)
class ScanSettings:
    """How to launch.

    Args:
        channels, warps: of a program, forward; backward_channels, backward_warps: backward.
        chunk: tokens between kept states.
        programs: as many fill the GPU; sequences are cut in segments until there are so many.
        stages: of loading ahead.
    """

    channels: int = 32
    warps: int = 1
    backward_channels: int = 32
    backward_warps: int = 1
    chunk: int = 128
    programs: int = 4224
    stages: int = 1


_TABLE = {(9, 0): ScanSettings()}  # measured on an H200, see benchmarks/selective_scan_kernels.py
_forced: ScanSettings | None = None


def settings_for(device: torch.device) -> ScanSettings:
    """Settings of the table for this GPU; cards that were not measured take those of the nearest that was."""
    if _forced is not None:
        return _forced
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return _TABLE.get(capability, ScanSettings())


def force_settings(settings: ScanSettings | None) -> None:
    """Launch with these settings from now on; None goes back to the table. For tests and the tuning sweep."""
    global _forced
    _forced = settings


@triton.jit
def _softplus(x):
    e = tl.exp(tl.minimum(x, 20.0))
    small = e * (1.0 - e * (0.5 - e * 0.33333334))  # log(1 + e) loses the digits of a small e
    return tl.where(x > 20.0, x, tl.where(x < -4.0, small, tl.log(1.0 + e)))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _first_row(chunk, backwards, S, CHUNK: tl.constexpr):
    """Row of a chunk's first token in its direction. 64 bits: pointers are moved there, offsets within are small."""
    return tl.where(backwards, S - 1 - chunk * CHUNK, chunk * CHUNK).to(tl.int64)


@triton.jit
def _row(at, left, sign):
    """Row, from the chunk's first, of its token `at`; beyond the `left` tokens that there are, of the last."""
    return tl.minimum(at, left - 1) * sign


@triton.jit
def _channels(ptr, row, stride, d, inside, other: tl.constexpr):
    return tl.load(ptr + row * stride + d, mask=inside, other=other).to(tl.float32)


@triton.jit
def _states(ptr, row, stride, n):
    return tl.load(ptr + row * stride + n).to(tl.float32)


@triton.jit
def _advance(s, raw, u, b, a2, bias, inside):
    """The state after a token; one beyond the end leaves it alone."""
    step = tl.where(inside, _softplus(raw + bias), 0.0)
    return tl.exp2(step[None, :] * a2) * s + (step * u)[None, :] * b[:, None]


@triton.jit
def _emit(y_ptr, row, s, u, c, z, skip, E, d, inside, GATED: tl.constexpr):
    y = tl.sum(s * c[:, None], axis=0) + skip * u
    if GATED:
        y = y * z * _sigmoid(z)
    tl.store(y_ptr + row * E + d, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["S", "segment_chunks", "segments"])
def scan_forward_kernel(
    u_ptr, dt_ptr, bc_ptr, z_ptr, a2_ptr, skip_ptr, bias_ptr, start_ptr, y_ptr, kept_ptr, end_ptr, sum_ptr,
    S, E, batch, bc_width, rank, z_row, z_batch, segment_chunks, segments,
    N: tl.constexpr, CHANNELS: tl.constexpr, CHUNK: tl.constexpr, REVERSE: tl.constexpr, STAGES: tl.constexpr,
    OUTPUT: tl.constexpr, GATED: tl.constexpr, KEEP: tl.constexpr, STARTS: tl.constexpr,
):  # fmt: skip
    """One segment of one direction of one row. With OUTPUT: y and kept states; without: the segment's state from zero
    and its summed steps. Either way the last segment (without OUTPUT: every one) writes its final state."""
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    segment = tl.program_id(1)
    kb = tl.program_id(2).to(tl.int64)
    k, b_row = kb // batch, kb % batch
    n = tl.arange(0, N)
    backwards = ((REVERSE >> k) & 1) == 1
    sign = tl.where(backwards, -1, 1)
    chunks = tl.cdiv(S, CHUNK)
    tile = n[:, None] * E + d[None, :]
    a2 = tl.load(a2_ptr + k * N * E + tile)
    skip = tl.load(skip_ptr + k * E + d)
    bias = tl.load(bias_ptr + k * E + d)
    u_ptr += kb * S * E
    dt_ptr += kb * S * E
    y_ptr += kb * S * E
    bc_ptr += kb * S * bc_width + rank
    z_ptr += b_row * z_batch
    if STARTS:
        s = tl.load(start_ptr + (kb * segments + segment) * N * E + tile)
    else:
        s = tl.zeros([N, CHANNELS], tl.float32)
    total = tl.zeros([CHANNELS], tl.float32)
    first = segment * segment_chunks
    for chunk in range(first, tl.minimum(first + segment_chunks, chunks)):
        if KEEP:
            tl.store(kept_ptr + (kb * chunks + chunk) * N * E + tile, s)
        base = _first_row(chunk, backwards, S, CHUNK)
        left = S - chunk * CHUNK
        u_at, dt_at, y_at = u_ptr + base * E, dt_ptr + base * E, y_ptr + base * E
        bc_at, z_at = bc_ptr + base * bc_width, z_ptr + base * z_row
        for at in tl.range(0, CHUNK, 4, num_stages=STAGES):
            in0, in1, in2, in3 = at < left, at + 1 < left, at + 2 < left, at + 3 < left
            t0, t1 = _row(at, left, sign), _row(at + 1, left, sign)
            t2, t3 = _row(at + 2, left, sign), _row(at + 3, left, sign)
            r0 = _channels(dt_at, t0, E, d, in0, 0.0)
            r1 = _channels(dt_at, t1, E, d, in1, 0.0)
            r2 = _channels(dt_at, t2, E, d, in2, 0.0)
            r3 = _channels(dt_at, t3, E, d, in3, 0.0)
            u0 = _channels(u_at, t0, E, d, in0, 0.0)
            u1 = _channels(u_at, t1, E, d, in1, 0.0)
            u2 = _channels(u_at, t2, E, d, in2, 0.0)
            u3 = _channels(u_at, t3, E, d, in3, 0.0)
            b0, b1 = _states(bc_at, t0, bc_width, n), _states(bc_at, t1, bc_width, n)
            b2, b3 = _states(bc_at, t2, bc_width, n), _states(bc_at, t3, bc_width, n)
            if OUTPUT:
                c0, c1 = _states(bc_at + N, t0, bc_width, n), _states(bc_at + N, t1, bc_width, n)
                c2, c3 = _states(bc_at + N, t2, bc_width, n), _states(bc_at + N, t3, bc_width, n)
                if GATED:
                    z0 = _channels(z_at, t0, z_row, d, in0, 0.0)
                    z1 = _channels(z_at, t1, z_row, d, in1, 0.0)
                    z2 = _channels(z_at, t2, z_row, d, in2, 0.0)
                    z3 = _channels(z_at, t3, z_row, d, in3, 0.0)
                else:
                    z0, z1, z2, z3 = u0, u1, u2, u3
                s = _advance(s, r0, u0, b0, a2, bias, in0)
                _emit(y_at, t0, s, u0, c0, z0, skip, E, d, in0, GATED)
                s = _advance(s, r1, u1, b1, a2, bias, in1)
                _emit(y_at, t1, s, u1, c1, z1, skip, E, d, in1, GATED)
                s = _advance(s, r2, u2, b2, a2, bias, in2)
                _emit(y_at, t2, s, u2, c2, z2, skip, E, d, in2, GATED)
                s = _advance(s, r3, u3, b3, a2, bias, in3)
                _emit(y_at, t3, s, u3, c3, z3, skip, E, d, in3, GATED)
            else:
                s = _advance(s, r0, u0, b0, a2, bias, in0)
                s = _advance(s, r1, u1, b1, a2, bias, in1)
                s = _advance(s, r2, u2, b2, a2, bias, in2)
                s = _advance(s, r3, u3, b3, a2, bias, in3)
                total += tl.where(in0, _softplus(r0 + bias), 0.0) + tl.where(in1, _softplus(r1 + bias), 0.0)
                total += tl.where(in2, _softplus(r2 + bias), 0.0) + tl.where(in3, _softplus(r3 + bias), 0.0)
    if OUTPUT:
        if segment == segments - 1:
            tl.store(end_ptr + kb * N * E + tile, s)
    else:
        tl.store(end_ptr + (kb * segments + segment) * N * E + tile, s)
        tl.store(sum_ptr + (kb * segments + segment) * E + d, total)


@triton.jit(do_not_specialize=["segments"])
def pass_states_kernel(
    local_ptr, sum_ptr, a2_ptr, given_ptr, out_ptr, E, batch, segments,
    N: tl.constexpr, CHANNELS: tl.constexpr, GIVEN: tl.constexpr, FROM_END: tl.constexpr,
):  # fmt: skip
    """From each segment's state from zero: the state that enters each, of the first `given` (FROM_END: of the last,
    and they are handed the other way, as gradients are)."""
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    kb = tl.program_id(1).to(tl.int64)
    tile = tl.arange(0, N)[:, None] * E + d[None, :]
    a2 = tl.load(a2_ptr + (kb // batch) * N * E + tile)
    s = tl.load(given_ptr + kb * N * E + tile) if GIVEN else tl.zeros([N, CHANNELS], tl.float32)
    for number in range(0, segments):
        segment = segments - 1 - number if FROM_END else number
        place = kb * segments + segment
        tl.store(out_ptr + place * N * E + tile, s)
        total = tl.load(sum_ptr + place * E + d)
        s = tl.exp2(total[None, :] * a2) * s + tl.load(local_ptr + place * N * E + tile)


@triton.jit(do_not_specialize=["S", "segment_chunks", "segments"])
def scan_gradient_ends_kernel(
    dt_ptr, bc_ptr, z_ptr, dy_ptr, a2_ptr, bias_ptr, end_ptr, sum_ptr,
    S, E, batch, bc_width, rank, z_row, z_batch, dy_direction, segment_chunks, segments,
    N: tl.constexpr, CHANNELS: tl.constexpr, CHUNK: tl.constexpr, REVERSE: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """A segment's gradient of the state before it, if nothing came from after it, and its summed steps."""
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    segment = tl.program_id(1)
    kb = tl.program_id(2).to(tl.int64)
    k, b_row = kb // batch, kb % batch
    n = tl.arange(0, N)
    backwards = ((REVERSE >> k) & 1) == 1
    sign = tl.where(backwards, -1, 1)
    tile = n[:, None] * E + d[None, :]
    a2 = tl.load(a2_ptr + k * N * E + tile)
    bias = tl.load(bias_ptr + k * E + d)
    dt_ptr += kb * S * E
    bc_ptr += kb * S * bc_width + rank + N
    z_ptr += b_row * z_batch
    dy_ptr += k * dy_direction + b_row * S * E
    ds = tl.zeros([N, CHANNELS], tl.float32)
    total = tl.zeros([CHANNELS], tl.float32)
    first = segment * segment_chunks
    last = tl.minimum(first + segment_chunks, tl.cdiv(S, CHUNK))
    for number in range(0, last - first):
        chunk = last - 1 - number
        base = _first_row(chunk, backwards, S, CHUNK)
        left = S - chunk * CHUNK
        dt_at, dy_at = dt_ptr + base * E, dy_ptr + base * E
        bc_at, z_at = bc_ptr + base * bc_width, z_ptr + base * z_row
        for reversed_at in tl.range(0, CHUNK):
            at = CHUNK - 1 - reversed_at
            inside = at < left
            t = _row(at, left, sign)
            step = tl.where(inside, _softplus(_channels(dt_at, t, E, d, inside, 0.0) + bias), 0.0)
            dy = _channels(dy_at, t, E, d, inside, 0.0)
            if GATED:
                z = _channels(z_at, t, z_row, d, inside, 0.0)
                dy = dy * z * _sigmoid(z)
            c = _states(bc_at, t, bc_width, n)
            ds = tl.exp2(step[None, :] * a2) * (ds + c[:, None] * dy[None, :])
            total += step
    tl.store(end_ptr + (kb * segments + segment) * N * E + tile, ds)
    tl.store(sum_ptr + (kb * segments + segment) * E + d, total)


@triton.jit
def _back(
    ds, before, after, a, step, raw, u, b, z, dy, a2, bias, skip, dA, dskip, dbias,
    c_ptr, y_ptr, du_ptr, ddt_ptr, dz_ptr, dbc_ptr, row, E, bc_width, d, n, inside,
    N: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """One token of backward: `before` and `after` are the states around it, `a` its decay, `ds` the gradient of
    `after` without this token's output. Returns the gradient of `before` and the sums over tokens."""
    c = _states(c_ptr, row, bc_width, n)
    y = tl.sum(after * c[:, None], axis=0) + skip * u
    if GATED:
        sig = _sigmoid(z)
        gate = z * sig
        tl.store(
            dz_ptr + row * E + d, (dy * y * sig * (1.0 + z * (1.0 - sig))).to(dz_ptr.dtype.element_ty), mask=inside
        )
        y = y * gate
        dy = dy * gate
    tl.store(y_ptr + row * E + d, y.to(y_ptr.dtype.element_ty), mask=inside)
    dc = tl.sum(after * dy[None, :], axis=1)
    ds = ds + c[:, None] * dy[None, :]
    db = tl.sum(ds * (step * u)[None, :], axis=1)
    through = tl.sum(ds * b[:, None], axis=0)
    ds = ds * a
    by_decay = ds * before
    dA = dA + by_decay * step[None, :]
    dstep = tl.sum(by_decay * a2, axis=0) * 0.6931471805599453 + through * u
    draw = tl.where(inside, dstep * _sigmoid(raw + bias), 0.0)
    tl.store(ddt_ptr + row * E + d, draw.to(ddt_ptr.dtype.element_ty), mask=inside)
    tl.store(du_ptr + row * E + d, (through * step + skip * dy).to(du_ptr.dtype.element_ty), mask=inside)
    tl.store(dbc_ptr + row * 2 * N + n, db, mask=inside)
    tl.store(dbc_ptr + row * 2 * N + N + n, dc, mask=inside)
    return ds, dA, dskip + dy * u, dbias + draw


@triton.jit(do_not_specialize=["S", "segment_chunks", "segments"])
def scan_backward_kernel(
    u_ptr, dt_ptr, bc_ptr, z_ptr, dy_ptr, a2_ptr, skip_ptr, bias_ptr, kept_ptr, ends_ptr, scratch_ptr,
    y_ptr, du_ptr, ddt_ptr, dz_ptr, dbc_ptr, dA_ptr, dskip_ptr, dbias_ptr, dstart_ptr,
    S, E, batch, bc_width, rank, z_row, z_batch, dy_direction, segment_chunks, segments,
    N: tl.constexpr, CHANNELS: tl.constexpr, CHUNK: tl.constexpr, REVERSE: tl.constexpr, STAGES: tl.constexpr,
    GATED: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """Gradients of one segment of one direction of one row, from its last chunk to its first."""
    block = tl.program_id(0)
    d = block * CHANNELS + tl.arange(0, CHANNELS)
    segment = tl.program_id(1)
    kb = tl.program_id(2).to(tl.int64)
    k, b_row = kb // batch, kb % batch
    n = tl.arange(0, N)
    backwards = ((REVERSE >> k) & 1) == 1
    sign = tl.where(backwards, -1, 1)
    chunks = tl.cdiv(S, CHUNK)
    tile = n[:, None] * E + d[None, :]
    own = n[:, None] * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    a2 = tl.load(a2_ptr + k * N * E + tile)
    skip = tl.load(skip_ptr + k * E + d)
    bias = tl.load(bias_ptr + k * E + d)
    plane = kb * S * E
    u_ptr += plane
    dt_ptr += plane
    y_ptr += plane
    du_ptr += plane
    ddt_ptr += plane
    dz_ptr += plane
    dy_ptr += k * dy_direction + b_row * S * E
    bc_ptr += kb * S * bc_width + rank
    z_ptr += b_row * z_batch
    dbc_ptr += (block.to(tl.int64) * tl.num_programs(2) + kb) * S * 2 * N
    program = (kb * segments + segment) * tl.num_programs(0) + block
    scratch_ptr += program * (CHUNK // 4) * N * CHANNELS
    dA = tl.zeros([N, CHANNELS], tl.float32)
    dskip = tl.zeros([CHANNELS], tl.float32)
    dbias = tl.zeros([CHANNELS], tl.float32)
    after = (kb * segments + segment) * N * E
    ds = tl.load(ends_ptr + after + tile) if ENDS else tl.zeros([N, CHANNELS], tl.float32)
    first = segment * segment_chunks
    last = tl.minimum(first + segment_chunks, chunks)
    for number in range(0, last - first):
        chunk = last - 1 - number
        s = tl.load(kept_ptr + (kb * chunks + chunk) * N * E + tile)
        base = _first_row(chunk, backwards, S, CHUNK)
        left = S - chunk * CHUNK
        u_at, dt_at, y_at = u_ptr + base * E, dt_ptr + base * E, y_ptr + base * E
        du_at, ddt_at, dz_at, dy_at = du_ptr + base * E, ddt_ptr + base * E, dz_ptr + base * E, dy_ptr + base * E
        bc_at, z_at, dbc_at = bc_ptr + base * bc_width, z_ptr + base * z_row, dbc_ptr + base * 2 * N
        tl.debug_barrier()  # the scratch of the chunk before has been read
        for part in tl.range(0, CHUNK // 4, num_stages=STAGES):
            tl.store(scratch_ptr + part * N * CHANNELS + own, s)
            at = part * 4
            in0, in1, in2, in3 = at < left, at + 1 < left, at + 2 < left, at + 3 < left
            t0, t1 = _row(at, left, sign), _row(at + 1, left, sign)
            t2, t3 = _row(at + 2, left, sign), _row(at + 3, left, sign)
            r0 = _channels(dt_at, t0, E, d, in0, 0.0)
            r1 = _channels(dt_at, t1, E, d, in1, 0.0)
            r2 = _channels(dt_at, t2, E, d, in2, 0.0)
            r3 = _channels(dt_at, t3, E, d, in3, 0.0)
            u0 = _channels(u_at, t0, E, d, in0, 0.0)
            u1 = _channels(u_at, t1, E, d, in1, 0.0)
            u2 = _channels(u_at, t2, E, d, in2, 0.0)
            u3 = _channels(u_at, t3, E, d, in3, 0.0)
            b0, b1 = _states(bc_at, t0, bc_width, n), _states(bc_at, t1, bc_width, n)
            b2, b3 = _states(bc_at, t2, bc_width, n), _states(bc_at, t3, bc_width, n)
            s = _advance(s, r0, u0, b0, a2, bias, in0)
            s = _advance(s, r1, u1, b1, a2, bias, in1)
            s = _advance(s, r2, u2, b2, a2, bias, in2)
            s = _advance(s, r3, u3, b3, a2, bias, in3)
        tl.debug_barrier()
        for reversed_part in tl.range(0, CHUNK // 4, num_stages=STAGES):
            part = CHUNK // 4 - 1 - reversed_part
            at = part * 4
            in0, in1, in2, in3 = at < left, at + 1 < left, at + 2 < left, at + 3 < left
            t0, t1 = _row(at, left, sign), _row(at + 1, left, sign)
            t2, t3 = _row(at + 2, left, sign), _row(at + 3, left, sign)
            s0 = tl.load(scratch_ptr + part * N * CHANNELS + own)
            r0 = _channels(dt_at, t0, E, d, in0, 0.0)
            r1 = _channels(dt_at, t1, E, d, in1, 0.0)
            r2 = _channels(dt_at, t2, E, d, in2, 0.0)
            r3 = _channels(dt_at, t3, E, d, in3, 0.0)
            u0 = _channels(u_at, t0, E, d, in0, 0.0)
            u1 = _channels(u_at, t1, E, d, in1, 0.0)
            u2 = _channels(u_at, t2, E, d, in2, 0.0)
            u3 = _channels(u_at, t3, E, d, in3, 0.0)
            b0, b1 = _states(bc_at, t0, bc_width, n), _states(bc_at, t1, bc_width, n)
            b2, b3 = _states(bc_at, t2, bc_width, n), _states(bc_at, t3, bc_width, n)
            g0 = _channels(dy_at, t0, E, d, in0, 0.0)
            g1 = _channels(dy_at, t1, E, d, in1, 0.0)
            g2 = _channels(dy_at, t2, E, d, in2, 0.0)
            g3 = _channels(dy_at, t3, E, d, in3, 0.0)
            if GATED:
                z0 = _channels(z_at, t0, z_row, d, in0, 0.0)
                z1 = _channels(z_at, t1, z_row, d, in1, 0.0)
                z2 = _channels(z_at, t2, z_row, d, in2, 0.0)
                z3 = _channels(z_at, t3, z_row, d, in3, 0.0)
            else:
                z0, z1, z2, z3 = u0, u1, u2, u3
            d0 = tl.where(in0, _softplus(r0 + bias), 0.0)
            d1 = tl.where(in1, _softplus(r1 + bias), 0.0)
            d2 = tl.where(in2, _softplus(r2 + bias), 0.0)
            d3 = tl.where(in3, _softplus(r3 + bias), 0.0)
            p0, p1 = tl.exp2(d0[None, :] * a2), tl.exp2(d1[None, :] * a2)
            p2, p3 = tl.exp2(d2[None, :] * a2), tl.exp2(d3[None, :] * a2)
            s1 = p0 * s0 + (d0 * u0)[None, :] * b0[:, None]
            s2 = p1 * s1 + (d1 * u1)[None, :] * b1[:, None]
            s3 = p2 * s2 + (d2 * u2)[None, :] * b2[:, None]
            s4 = p3 * s3 + (d3 * u3)[None, :] * b3[:, None]
            ds, dA, dskip, dbias = _back(
                ds, s3, s4, p3, d3, r3, u3, b3, z3, g3, a2, bias, skip, dA, dskip, dbias,
                bc_at + N, y_at, du_at, ddt_at, dz_at, dbc_at, t3, E, bc_width, d, n, in3, N, GATED,
            )  # fmt: skip
            ds, dA, dskip, dbias = _back(
                ds, s2, s3, p2, d2, r2, u2, b2, z2, g2, a2, bias, skip, dA, dskip, dbias,
                bc_at + N, y_at, du_at, ddt_at, dz_at, dbc_at, t2, E, bc_width, d, n, in2, N, GATED,
            )  # fmt: skip
            ds, dA, dskip, dbias = _back(
                ds, s1, s2, p1, d1, r1, u1, b1, z1, g1, a2, bias, skip, dA, dskip, dbias,
                bc_at + N, y_at, du_at, ddt_at, dz_at, dbc_at, t1, E, bc_width, d, n, in1, N, GATED,
            )  # fmt: skip
            ds, dA, dskip, dbias = _back(
                ds, s0, s1, p0, d0, r0, u0, b0, z0, g0, a2, bias, skip, dA, dskip, dbias,
                bc_at + N, y_at, du_at, ddt_at, dz_at, dbc_at, t0, E, bc_width, d, n, in0, N, GATED,
            )  # fmt: skip
    place = kb * segments + segment
    tl.store(dA_ptr + place * N * E + tile, dA)
    tl.store(dskip_ptr + place * E + d, dskip)
    tl.store(dbias_ptr + place * E + d, dbias)
    if segment == 0:
        tl.store(dstart_ptr + kb * N * E + tile, ds)


@triton.jit(do_not_specialize=["S"])
def conv_forward_kernel(
    x_ptr, w_ptr, bias_ptr, u_ptr, S, E, batch, x_row, x_batch,
    W: tl.constexpr, K: tl.constexpr, REVERSE: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """silu(causal convolution) of a tile of tokens in every direction."""
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    row = tl.program_id(2).to(tl.int64)
    x_ptr += row * x_batch
    t64 = t.to(tl.int64)
    inside = (t < S)[:, None] & (d < E)[None, :]
    for k in tl.static_range(K):
        out = tl.zeros([TOKENS, CHANNELS], tl.float32) + tl.load(bias_ptr + k * E + d, mask=d < E, other=0.0)[None, :]
        for tap in tl.static_range(W):
            at = t64 + (W - 1 - tap) if (REVERSE >> k) & 1 else t64 - (W - 1 - tap)
            there = ((at >= 0) & (at < S))[:, None] & (d < E)[None, :]
            x = tl.load(x_ptr + at[:, None] * x_row + d[None, :], mask=there, other=0.0).to(tl.float32)
            out += x * tl.load(w_ptr + (k * E + d) * W + tap, mask=d < E, other=0.0)[None, :]
        out = out * _sigmoid(out)
        at_u = (k * batch + row) * S * E + t64[:, None] * E + d[None, :]
        tl.store(u_ptr + at_u, out.to(u_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["S"])
def conv_backward_kernel(
    x_ptr, w_ptr, bias_ptr, du_ptr, dx_ptr, dw_ptr, S, E, batch, x_row, x_batch, dx_row, dx_batch,
    W: tl.constexpr, K: tl.constexpr, REVERSE: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of x, all directions summed, and this tile's part of those of taps and bias (K, W + 1, E).

    dpre, the gradient before silu, is needed at the tile's tokens and at up to W - 1 beyond: shifted tiles are
    computed again rather than exchanged."""
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    row = tl.program_id(2).to(tl.int64)
    x_ptr += row * x_batch
    t64 = t.to(tl.int64)
    cols = d < E
    dx = tl.zeros([TOKENS, CHANNELS], tl.float32)
    part = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    dw_ptr += part * K * (W + 1) * E
    for k in tl.static_range(K):
        bias = tl.load(bias_ptr + k * E + d, mask=cols, other=0.0)
        for shift in tl.static_range(
            W
        ):  # the output `shift` tokens later in the direction reads x[t] by tap W-1-shift
            at = t64 - shift if (REVERSE >> k) & 1 else t64 + shift
            there = ((at >= 0) & (at < S) & (t < S))[:, None] & cols[None, :]
            pre = tl.zeros([TOKENS, CHANNELS], tl.float32) + bias[None, :]
            for tap in tl.static_range(W):
                source = at + (W - 1 - tap) if (REVERSE >> k) & 1 else at - (W - 1 - tap)
                ok = ((source >= 0) & (source < S))[:, None] & cols[None, :]
                x = tl.load(x_ptr + source[:, None] * x_row + d[None, :], mask=ok, other=0.0).to(tl.float32)
                pre += x * tl.load(w_ptr + (k * E + d) * W + tap, mask=cols, other=0.0)[None, :]
            sig = _sigmoid(pre)
            at_du = (k * batch + row) * S * E + at[:, None] * E + d[None, :]
            du = tl.load(du_ptr + at_du, mask=there, other=0.0).to(tl.float32)
            dpre = du * sig * (1.0 + pre * (1.0 - sig))
            dx += dpre * tl.load(w_ptr + (k * E + d) * W + (W - 1 - shift), mask=cols, other=0.0)[None, :]
            if shift == 0:
                tl.store(dw_ptr + (k * (W + 1) + W) * E + d, tl.sum(dpre, axis=0), mask=cols)
            here = (t < S)[:, None] & cols[None, :]
            mine = tl.load(x_ptr + t64[:, None] * x_row + d[None, :], mask=here, other=0.0).to(tl.float32)
            tl.store(dw_ptr + (k * (W + 1) + W - 1 - shift) * E + d, tl.sum(dpre * mine, axis=0), mask=cols)
    to = row * dx_batch + t64[:, None] * dx_row + d[None, :]
    tl.store(dx_ptr + to, dx.to(dx_ptr.dtype.element_ty), mask=(t < S)[:, None] & cols[None, :])


def _mask(reverse: Sequence[bool]) -> int:
    return sum(1 << k for k, backwards in enumerate(reverse) if backwards)


_CONV_TILE = {"TOKENS": 32, "CHANNELS": 64, "num_warps": 4}


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor, reverse: Sequence[bool]) -> Tensor:
    """`directional_conv`: x (B, S, E), channels contiguous; weight (K, E, W), bias (K, E) -> (K, B, S, E)."""
    batch, tokens, channels = x.shape
    directions, _, width = weight.shape
    u = x.new_empty(directions, batch, tokens, channels)
    grid = (triton.cdiv(tokens, _CONV_TILE["TOKENS"]), triton.cdiv(channels, _CONV_TILE["CHANNELS"]), batch)
    conv_forward_kernel[grid](
        x, weight, bias, u, tokens, channels, batch, x.stride(1), x.stride(0),
        W=width, K=directions, REVERSE=_mask(reverse), **_CONV_TILE,
    )  # fmt: skip
    return u


def conv_backward(
    x: Tensor, weight: Tensor, bias: Tensor, du: Tensor, reverse: Sequence[bool], dx: Tensor
) -> tuple[Tensor, Tensor]:
    """Writes the gradient of x to `dx`; returns those of weight and bias (fp32)."""
    batch, tokens, channels = x.shape
    directions, _, width = weight.shape
    grid = (triton.cdiv(tokens, _CONV_TILE["TOKENS"]), triton.cdiv(channels, _CONV_TILE["CHANNELS"]), batch)
    parts = torch.empty(batch * grid[0], directions, width + 1, channels, dtype=torch.float32, device=x.device)
    conv_backward_kernel[grid](
        x, weight, bias, du, dx, parts, tokens, channels, batch, x.stride(1), x.stride(0), dx.stride(1), dx.stride(0),
        W=width, K=directions, REVERSE=_mask(reverse), **_CONV_TILE,
    )  # fmt: skip
    total = parts.sum(dim=0)
    return total[:, :width].transpose(1, 2), total[:, width]


@dataclass
class ScanInputs:
    """What both kernels read. u, dt (K, B, S, E) contiguous; bc (K, B, S, rank + 2N) contiguous, B and C after `rank`
    columns; z (B, S, E) with contiguous channels, or None; a2 = A log2(e) as (K, N, E), skip, bias (K, E) in fp32."""

    u: Tensor
    dt: Tensor
    bc: Tensor
    rank: int
    z: Tensor | None
    a2: Tensor
    skip: Tensor
    bias: Tensor
    reverse: Sequence[bool]

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """K, B, S, E, N."""
        return (*self.u.shape, self.a2.shape[1])

    def plan(self, settings: ScanSettings, channels: int) -> tuple[int, int]:
        """Segments, and chunks of each, so that there are about `settings.programs` programs."""
        directions, batch, tokens, width, _ = self.sizes
        chunks = triton.cdiv(tokens, settings.chunk)
        wanted = max(1, min(chunks, settings.programs // max(1, directions * batch * (width // channels))))
        per_segment = triton.cdiv(chunks, wanted)
        return triton.cdiv(chunks, per_segment), per_segment

    def gate(self) -> tuple[Tensor, int, int]:
        """The gate and its strides of rows and batch; without one, `u` in its place, which the kernels do not read."""
        return (self.u, 0, 0) if self.z is None else (self.z, self.z.stride(1), self.z.stride(0))


def decay_rates(A: Tensor) -> Tensor:
    """(K, E, N) -> the kernels' (K, N, E), for powers of two."""
    return (A.float() * math.log2(math.e)).transpose(1, 2).contiguous()


def scan_forward(given: ScanInputs, initial: Tensor | None, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gated y (K, B, S, E), final state (K, B, N, E), and with `keep` the state at every chunk's start."""
    settings = settings_for(given.u.device)
    directions, batch, tokens, width, state = given.sizes
    channels = min(settings.channels, width)
    segments, per_segment = given.plan(settings, channels)
    chunks = triton.cdiv(tokens, settings.chunk)
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": given.u.device}
    y = torch.empty_like(given.u)
    end = torch.empty(directions, batch, state, width, **fp32)
    kept = torch.empty(directions, batch, chunks, state, width, **fp32) if keep else end
    gate, z_row, z_batch = given.gate()
    sizes = (tokens, width, batch, given.bc.shape[-1], given.rank, z_row, z_batch, per_segment, segments)
    launch: dict[str, Any] = {
        "N": state, "CHANNELS": channels, "CHUNK": settings.chunk, "REVERSE": _mask(given.reverse),
        "GATED": given.z is not None, "STAGES": settings.stages, "num_warps": settings.warps,
    }  # fmt: skip
    reads = (given.u, given.dt, given.bc, gate, given.a2, given.skip, given.bias)
    grid = (width // channels, segments, directions * batch)
    starts, has_start = initial, initial is not None
    if segments > 1:
        local = torch.empty(directions * batch, segments, state, width, **fp32)
        sums = torch.empty(directions * batch, segments, width, **fp32)
        scan_forward_kernel[grid](
            *reads, local, y, kept, local, sums, *sizes, OUTPUT=False, KEEP=False, STARTS=False, **launch
        )
        starts, has_start = torch.empty_like(local), True
        pass_states_kernel[(grid[0], grid[2])](
            local, sums, given.a2, local if initial is None else initial, starts, width, batch, segments,
            N=state, CHANNELS=channels, GIVEN=initial is not None, FROM_END=False, num_warps=settings.warps,
        )  # fmt: skip
    scan_forward_kernel[grid](
        *reads, starts if has_start else end, y, kept, end, end, *sizes,
        OUTPUT=True, KEEP=keep, STARTS=has_start, **launch,
    )  # fmt: skip
    return y, end, kept if keep else None


@dataclass
class ScanGradients:
    """Of `scan_backward`: y again (K, B, S, E), du, ddt (before bias and softplus), dz of each direction, dbc
    (K, B, S, 2N), dA (K, E, N), dskip, dbias (K, E), dinitial (K, B, N, E)."""

    y: Tensor
    du: Tensor
    ddt: Tensor
    dz: Tensor | None
    dbc: Tensor
    dA: Tensor
    dskip: Tensor
    dbias: Tensor
    dinitial: Tensor


def scan_backward(given: ScanInputs, kept: Tensor, dy: Tensor, dend: Tensor | None) -> ScanGradients:
    """Gradients of the scan.

    Args:
        kept: states at the chunks' starts, of `scan_forward` under the same settings.
        dy: gradient of y, (K, B, S, E), or (B, S, E) where it is the same for all directions (y is summed).
        dend: gradient of the final state (K, B, N, E), None for none.
    """
    settings = settings_for(given.u.device)
    directions, batch, tokens, width, state = given.sizes
    channels = min(settings.backward_channels, width)
    segments, per_segment = given.plan(settings, channels)
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": given.u.device}
    rows, blocks = directions * batch, width // channels
    grid = (blocks, segments, rows)
    dy = dy.contiguous()
    gate, z_row, z_batch = given.gate()
    dy_direction = 0 if dy.ndim == 3 else batch * tokens * width
    sizes = (tokens, width, batch, given.bc.shape[-1], given.rank, z_row, z_batch, dy_direction, per_segment, segments)
    launch: dict[str, Any] = {
        "N": state, "CHANNELS": channels, "CHUNK": settings.chunk, "REVERSE": _mask(given.reverse),
        "GATED": given.z is not None, "num_warps": settings.backward_warps,
    }  # fmt: skip
    ends, has_ends = dend, dend is not None
    if segments > 1:
        local = torch.empty(rows, segments, state, width, **fp32)
        sums = torch.empty(rows, segments, width, **fp32)
        scan_gradient_ends_kernel[grid](
            given.dt, given.bc, gate, dy, given.a2, given.bias, local, sums, *sizes, **launch
        )
        ends, has_ends = torch.empty_like(local), True
        pass_states_kernel[(blocks, rows)](
            local, sums, given.a2, local if dend is None else dend, ends, width, batch, segments,
            N=state, CHANNELS=channels, GIVEN=dend is not None, FROM_END=True, num_warps=settings.backward_warps,
        )  # fmt: skip
    out = [torch.empty_like(given.u) for _ in range(3)]
    dz = torch.empty_like(given.u) if given.z is not None else out[0]
    dbc = torch.empty(blocks, directions, batch, tokens, 2 * state, **fp32)
    dA = torch.empty(directions, batch, segments, state, width, **fp32)
    dskip, dbias = torch.empty(2, directions, batch, segments, width, **fp32)
    dinitial = torch.empty(directions, batch, state, width, **fp32)
    scratch = torch.empty(rows * segments * blocks, settings.chunk // TOKENS_AT_ONCE, state, channels, **fp32)
    scan_backward_kernel[grid](
        given.u, given.dt, given.bc, gate, dy, given.a2, given.skip, given.bias, kept, ends if has_ends else kept,
        scratch, *out, dz, dbc, dA, dskip, dbias, dinitial, *sizes, ENDS=has_ends, STAGES=settings.stages, **launch,
    )  # fmt: skip
    return ScanGradients(
        y=out[0],
        du=out[1],
        ddt=out[2],
        dz=dz if given.z is not None else None,
        dbc=dbc.sum(dim=0),
        dA=dA.sum(dim=(1, 2)).transpose(1, 2),
        dskip=dskip.sum(dim=(1, 2)),
        dbias=dbias.sum(dim=(1, 2)),
        dinitial=dinitial,
    )
