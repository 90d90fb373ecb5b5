# Tuples in Triton's language grow by `+` (its compiler has no unpacking), and so change their type:
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"
"""The selective scan of `ops_selective_scan` as Triton kernels, forward and backward, all directions in one launch.

A thread has one channel (forward: two) with all N states of it in registers and walks the tokens of a segment; a
segment is as long as the whole sequence where batch and channels alone fill the GPU, else segments run at the same
time and a short pass hands states from one to the next. Of forward only the state at every chunk's start is kept.
Backward goes through the chunks from the end: it walks a chunk once to leave the state of every second token in a
scratch, of which a thread reads what it wrote itself, then takes two tokens at a time. All state is fp32. Only what is
summed over channels (the gradients of B and C) crosses threads: by the matrix unit, for 16-bit inputs from bf16, else
in three TF32 products; partial sums of a block of channels are added in a fixed order. Results do not change from run
to run.

Settings come from a fixed table (`settings_for`): nothing is tuned when a model runs.
Layout: K directions, B batch, S tokens, E channels, N states, W conv width; states are (..., N, E) here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .ops_triton_parts import LaunchTable, softplus, tl, triton


@dataclass(frozen=True)
class ScanSettings:
    """How to launch.

    Args:
        channels, warps: of a program, forward; backward_channels, backward_warps: backward.
        chunk: tokens between kept states.
        programs: as many fill the GPU; sequences are cut in segments until there are so many.
        tokens, backward_tokens: loaded together; backward holds their states in registers. They divide `chunk`.
        short: backward's scratch in 16 bits for inputs in 16 bits.
    """

    channels: int = 64
    warps: int = 1
    backward_channels: int = 32
    backward_warps: int = 1
    chunk: int = 96
    programs: int = 8448
    tokens: int = 2
    backward_tokens: int = 2
    short: bool = True

    def block(self, width: int, backward: bool = False) -> int:
        """Channels of a program where there are `width`."""
        return min(self.backward_channels if backward else self.channels, width & -width)


_TABLE = LaunchTable({(9, 0): ScanSettings()}, ScanSettings())
"""Measured on an H200, see benchmarks/selective_scan_kernels.py."""
settings_for, force_settings = _TABLE.settings_for, _TABLE.force_settings


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
def _channels(ptr, row, stride, d, inside):
    return tl.load(ptr + row * stride + d, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _numbers(ptr, N: tl.constexpr):
    """N neighbours as fp32 scalars, read 64 bits at a time, to which they are aligned."""
    kind: tl.constexpr = ptr.dtype.element_ty
    each: tl.constexpr = 64 // kind.primitive_bitwidth
    words = ptr.to(tl.pointer_type(tl.int64))
    out = ()
    for place in tl.static_range(N // each):
        word = tl.load(words + place)
        for i in tl.static_range(each):
            half = (word >> (i * 64 // each // 32 * 32)).to(tl.int32)
            if each == 2:
                number = half.to(tl.float32, bitcast=True)
            elif kind == tl.bfloat16:
                number = ((half & -65536) if i % 2 else (half << 16)).to(tl.float32, bitcast=True)
            else:
                number = (half >> (16 * (i % 2))).to(tl.int16).to(kind, bitcast=True).to(tl.float32)
            out = out + (number,)
    return out


@triton.jit
def _load_states(ptr, stride, d, N: tl.constexpr):
    out = ()
    for i in tl.static_range(N):
        out = out + (tl.load(ptr + i * stride + d).to(tl.float32),)
    return out


@triton.jit
def _store_states(ptr, stride, d, s, N: tl.constexpr):
    for i in tl.static_range(N):
        tl.store(ptr + i * stride + d, s[i])


@triton.jit
def _zeros(N: tl.constexpr, CHANNELS: tl.constexpr):
    out = ()
    for _ in tl.static_range(N):
        out = out + (tl.zeros([CHANNELS], tl.float32),)
    return out


@triton.jit
def _advance(s, step, x, b, a2, N: tl.constexpr):
    """States after a token; a step of zero leaves them alone."""
    out = ()
    for i in tl.static_range(N):
        out = out + (tl.exp2(step * a2[i]) * s[i] + x * b[i],)
    return out


@triton.jit
def _inner(s, c, N: tl.constexpr):
    y = s[0] * c[0]
    for i in tl.static_range(1, N):
        y += s[i] * c[i]
    return y


@triton.jit
def _read(
    at, left, sign, u_ptr, dt_ptr, bc_ptr, E, bc_width, bias, d, N: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Of TOKENS tokens from place `at` of a chunk: row, whether it is inside, step, raw step, u, B."""
    out = ()
    for i in tl.static_range(TOKENS):
        inside = at + i < left
        row = _row(at + i, left, sign)
        raw = _channels(dt_ptr, row, E, d, inside) + bias
        u = _channels(u_ptr, row, E, d, inside)
        out = out + ((row, inside, raw, u, _numbers(bc_ptr + row * bc_width, N)),)
    return out


@triton.jit(do_not_specialize=["S", "batch", "segment_chunks", "segments"])
def scan_forward_kernel(
    u_ptr, dt_ptr, bc_ptr, z_ptr, a2_ptr, skip_ptr, bias_ptr, start_ptr, y_ptr, kept_ptr, end_ptr, sum_ptr,
    S, E, batch, bc_width, rank, z_row, z_batch, segment_chunks, segments,
    N: tl.constexpr, CHANNELS: tl.constexpr, CHUNK: tl.constexpr, REVERSE: tl.constexpr, TOKENS: tl.constexpr,
    OUTPUT: tl.constexpr, GATED: tl.constexpr, KEEP: tl.constexpr, STARTS: tl.constexpr,
):  # fmt: skip
    """One segment of one direction of one row. With OUTPUT: y and kept states; without: the segment's state from zero
    and its summed steps, which nobody asks of the last one."""
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    segment = tl.program_id(1)
    kb = tl.program_id(2).to(tl.int64)
    k, b_row = kb // batch, kb % batch
    backwards = ((REVERSE >> k) & 1) == 1
    sign = tl.where(backwards, -1, 1)
    chunks = tl.cdiv(S, CHUNK)
    a2 = _load_states(a2_ptr + k * N * E, E, d, N)
    skip = tl.load(skip_ptr + k * E + d)
    bias = tl.load(bias_ptr + k * E + d)
    u_ptr += kb * S * E
    dt_ptr += kb * S * E
    y_ptr += kb * S * E
    bc_ptr += kb * S * bc_width + rank
    z_ptr += b_row * z_batch
    s = _load_states(start_ptr + (kb * segments + segment) * N * E, E, d, N) if STARTS else _zeros(N, CHANNELS)
    total = tl.zeros([CHANNELS], tl.float32)
    first = segment * segment_chunks
    for chunk in range(first, tl.minimum(first + segment_chunks, chunks)):
        if KEEP:
            _store_states(kept_ptr + (kb * chunks + chunk) * N * E, E, d, s, N)
        base = _first_row(chunk, backwards, S, CHUNK)
        left = tl.minimum(S - chunk * CHUNK, CHUNK)
        u_at, dt_at, y_at = u_ptr + base * E, dt_ptr + base * E, y_ptr + base * E
        bc_at, z_at = bc_ptr + base * bc_width, z_ptr + base * z_row
        for at in range(0, left, TOKENS):
            given = _read(at, left, sign, u_at, dt_at, bc_at, E, bc_width, bias, d, N, TOKENS)
            ys = ()
            for i in tl.static_range(TOKENS):
                row, inside, raw, u, b = given[i]
                step = tl.where(inside, softplus(raw), 0.0)
                s = _advance(s, step, step * u, b, a2, N)
                if OUTPUT:
                    y = _inner(s, _numbers(bc_at + row * bc_width + N, N), N) + skip * u
                    if GATED:
                        z = _channels(z_at, row, z_row, d, inside)
                        y = y * z * _sigmoid(z)
                    ys = ys + (y,)
                else:
                    total += step
            if OUTPUT:  # after all loads, which could not pass a store
                for i in tl.static_range(TOKENS):
                    tl.store(y_at + given[i][0] * E + d, ys[i].to(y_ptr.dtype.element_ty), mask=given[i][1])
    if OUTPUT:
        if segment == segments - 1:
            _store_states(end_ptr + kb * N * E, E, d, s, N)
    else:
        _store_states(end_ptr + (kb * segments + segment) * N * E, E, d, s, N)
        tl.store(sum_ptr + (kb * segments + segment) * E + d, total)


@triton.jit(do_not_specialize=["batch", "segments"])
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
        if number < segments - 1:
            total = tl.load(sum_ptr + place * E + d)
            s = tl.exp2(total[None, :] * a2) * s + tl.load(local_ptr + place * N * E + tile)


@triton.jit(do_not_specialize=["S", "batch", "segment_chunks", "segments"])
def scan_gradient_ends_kernel(
    dt_ptr, bc_ptr, z_ptr, dy_ptr, a2_ptr, bias_ptr, end_ptr, sum_ptr,
    S, E, batch, bc_width, rank, z_row, z_batch, dy_direction, segment_chunks, segments,
    N: tl.constexpr, CHANNELS: tl.constexpr, CHUNK: tl.constexpr, REVERSE: tl.constexpr, TOKENS: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """A segment's gradient of the state before it, if nothing came from after it, and its summed steps; of the first
    segment nobody asks."""
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    segment = tl.program_id(1) + 1
    kb = tl.program_id(2).to(tl.int64)
    k, b_row = kb // batch, kb % batch
    backwards = ((REVERSE >> k) & 1) == 1
    sign = tl.where(backwards, -1, 1)
    a2 = _load_states(a2_ptr + k * N * E, E, d, N)
    bias = tl.load(bias_ptr + k * E + d)
    dt_ptr += kb * S * E
    bc_ptr += kb * S * bc_width + rank + N
    z_ptr += b_row * z_batch
    dy_ptr += k * dy_direction + b_row * S * E
    ds = _zeros(N, CHANNELS)
    total = tl.zeros([CHANNELS], tl.float32)
    first = segment * segment_chunks
    last = tl.minimum(first + segment_chunks, tl.cdiv(S, CHUNK))
    for number in range(0, last - first):
        chunk = last - 1 - number
        base = _first_row(chunk, backwards, S, CHUNK)
        left = tl.minimum(S - chunk * CHUNK, CHUNK)
        dt_at, dy_at = dt_ptr + base * E, dy_ptr + base * E
        bc_at, z_at = bc_ptr + base * bc_width, z_ptr + base * z_row
        parts = tl.cdiv(left, TOKENS)
        for done in range(0, parts):
            at = (parts - 1 - done) * TOKENS
            given = ()
            for i in tl.static_range(TOKENS):
                inside = at + TOKENS - 1 - i < left
                row = _row(at + TOKENS - 1 - i, left, sign)
                raw = _channels(dt_at, row, E, d, inside) + bias
                dy = _channels(dy_at, row, E, d, inside)
                z = _channels(z_at, row, z_row, d, inside) if GATED else dy
                given = given + ((inside, raw, dy, z, _numbers(bc_at + row * bc_width, N)),)
            for i in tl.static_range(TOKENS):
                inside, raw, dy, z, c = given[i]
                step = tl.where(inside, softplus(raw), 0.0)
                if GATED:
                    dy = dy * z * _sigmoid(z)
                new = ()
                for j in tl.static_range(N):
                    new = new + (tl.exp2(step * a2[j]) * (ds[j] + c[j] * dy),)
                ds = new
                total += step
    _store_states(end_ptr + (kb * segments + segment) * N * E, E, d, ds, N)
    tl.store(sum_ptr + (kb * segments + segment) * E + d, total)


@triton.jit
def _joined(v, COUNT: tl.constexpr):
    """COUNT vectors (a power of two, 128 at most) as the columns of a tile, whose axes are still apart."""
    for level in tl.static_range(7):
        if COUNT >> level > 1:
            pairs = ()
            for i in tl.static_range(COUNT >> (level + 1)):
                pairs = pairs + (tl.join(v[i], v[i + (COUNT >> (level + 1))]),)
            v = pairs
    return v[0]


@triton.jit
def _add_channel_sums(sums, v, first: tl.constexpr, COUNT: tl.constexpr, CHANNELS: tl.constexpr, EXACT: tl.constexpr):
    """Adds to rows `first` and `first + 1` of sums (16, COUNT) the sums over channels of 2 * COUNT vectors, by the
    matrix unit: it sums over channels and the two tokens, whose rows of the other factor pick one token each."""
    tile = tl.reshape(_joined(v, 2 * COUNT), [2 * CHANNELS, COUNT])
    rows, columns = tl.arange(0, 16), tl.arange(0, 2 * CHANNELS)
    picks = tl.where(rows[:, None] == first + columns[None, :] % 2, 1.0, 0.0)
    if EXACT:
        return tl.dot(picks, tile, sums, input_precision="tf32x3")
    return tl.dot(picks.to(tl.bfloat16), tile.to(tl.bfloat16), sums)


@triton.jit(do_not_specialize=["S", "batch", "segment_chunks", "segments"])
def scan_backward_kernel(
    u_ptr, dt_ptr, bc_ptr, z_ptr, dy_ptr, a2_ptr, skip_ptr, bias_ptr, kept_ptr, ends_ptr, scratch_ptr,
    y_ptr, du_ptr, ddt_ptr, dz_ptr, dbc_ptr, dA_ptr, dskip_ptr, dbias_ptr, dstart_ptr,
    S, E, batch, bc_width, rank, z_row, z_batch, dy_direction, segment_chunks, segments,
    N: tl.constexpr, CHANNELS: tl.constexpr, CHUNK: tl.constexpr, REVERSE: tl.constexpr, TOKENS: tl.constexpr,
    GATED: tl.constexpr, ENDS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Gradients of one segment of one direction of one row, from its last chunk to its first."""
    block = tl.program_id(0)
    own = tl.arange(0, CHANNELS)
    d = block * CHANNELS + own
    segment = tl.program_id(1)
    kb = tl.program_id(2).to(tl.int64)
    k, b_row = kb // batch, kb % batch
    backwards = ((REVERSE >> k) & 1) == 1
    sign = tl.where(backwards, -1, 1)
    chunks = tl.cdiv(S, CHUNK)
    kind: tl.constexpr = du_ptr.dtype.element_ty
    a2 = _load_states(a2_ptr + k * N * E, E, d, N)
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
    scratch_ptr += program * (CHUNK // TOKENS) * N * CHANNELS
    slot = tl.arange(0, 16)
    column = tl.arange(0, 2 * N)
    dA = _zeros(N, CHANNELS)
    dskip = tl.zeros([CHANNELS], tl.float32)
    dbias = tl.zeros([CHANNELS], tl.float32)
    place = kb * segments + segment
    ds = _load_states(ends_ptr + place * N * E, E, d, N) if ENDS else _zeros(N, CHANNELS)
    first = segment * segment_chunks
    last = tl.minimum(first + segment_chunks, chunks)
    for number in range(0, last - first):
        chunk = last - 1 - number
        s = _load_states(kept_ptr + (kb * chunks + chunk) * N * E, E, d, N)
        base = _first_row(chunk, backwards, S, CHUNK)
        left = tl.minimum(S - chunk * CHUNK, CHUNK)
        u_at, dt_at, y_at = u_ptr + base * E, dt_ptr + base * E, y_ptr + base * E
        du_at, ddt_at, dz_at, dy_at = du_ptr + base * E, ddt_ptr + base * E, dz_ptr + base * E, dy_ptr + base * E
        bc_at, z_at, dbc_at = bc_ptr + base * bc_width, z_ptr + base * z_row, dbc_ptr + base * 2 * N
        parts = tl.cdiv(left, TOKENS)
        # Every thread reads of the scratch what it wrote itself: one channel's states.
        for part in range(0, parts):
            _store_states(scratch_ptr + part * N * CHANNELS, CHANNELS, own, s, N)
            given = _read(part * TOKENS, left, sign, u_at, dt_at, bc_at, E, bc_width, bias, d, N, TOKENS)
            for i in tl.static_range(TOKENS):
                _, inside, raw, u, b = given[i]
                step = tl.where(inside, softplus(raw), 0.0)
                s = _advance(s, step, step * u, b, a2, N)
        tl.debug_barrier()
        for done in range(0, parts):
            at = (parts - 1 - done) * TOKENS
            s = _load_states(scratch_ptr + (parts - 1 - done) * N * CHANNELS, CHANNELS, own, N)
            given = _read(at, left, sign, u_at, dt_at, bc_at, E, bc_width, bias, d, N, TOKENS)
            dys = ()
            zs = ()
            for i in tl.static_range(TOKENS):
                dys = dys + (_channels(dy_at, given[i][0], E, d, given[i][1]),)
                zs = zs + ((_channels(z_at, given[i][0], z_row, d, given[i][1]) if GATED else dys[i]),)
            states = (s,)
            steps = ()
            for i in tl.static_range(TOKENS):
                steps = steps + (tl.where(given[i][1], softplus(given[i][2]), 0.0),)
                if i < TOKENS - 1:
                    s = _advance(s, steps[i], steps[i] * given[i][3], given[i][4], a2, N)
                    states = states + (s,)
            sums = tl.zeros([16, 2 * N], tl.float32)
            for pair in tl.static_range(TOKENS - 2, -1, -2):
                to_sum = ()
                for i in tl.static_range(pair + 1, pair - 1, -1):
                    row, inside, raw, u, b = given[i]
                    before, step, dy, z = states[i], steps[i], dys[i], zs[i]
                    c = _numbers(bc_at + row * bc_width + N, N)
                    x = step * u
                    a = ()
                    after = ()
                    for j in tl.static_range(N):
                        a = a + (tl.exp2(step * a2[j]),)
                        after = after + (a[j] * before[j] + x * b[j],)
                    y = _inner(after, c, N) + skip * u
                    if GATED:
                        sig = _sigmoid(z)
                        dz = dy * y * sig * (1.0 + z * (1.0 - sig))
                        tl.store(dz_at + row * E + d, dz.to(kind), mask=inside)
                        y = y * z * sig
                        dy = dy * z * sig
                    tl.store(y_at + row * E + d, y.to(kind), mask=inside)
                    through = tl.zeros([CHANNELS], tl.float32)
                    dstep = tl.zeros([CHANNELS], tl.float32)
                    dB = ()
                    dC = ()
                    new_ds = ()
                    new_dA = ()
                    for j in tl.static_range(N):
                        g = ds[j] + c[j] * dy
                        dB = dB + (g * x,)
                        dC = dC + (after[j] * dy,)
                        through += g * b[j]
                        g = g * a[j]
                        q = g * before[j]
                        dstep += q * a2[j]
                        new_ds = new_ds + (g,)
                        new_dA = new_dA + (dA[j] + q * step,)
                    ds, dA = new_ds, new_dA
                    to_sum = dB + dC + to_sum
                    draw = tl.where(inside, (dstep * 0.6931471805599453 + through * u) * _sigmoid(raw), 0.0)
                    tl.store(ddt_at + row * E + d, draw.to(kind), mask=inside)
                    tl.store(du_at + row * E + d, (through * step + skip * dy).to(kind), mask=inside)
                    dskip += dy * u
                    dbias += draw
                sums = _add_channel_sums(sums, to_sum, pair, 2 * N, CHANNELS, EXACT)
            rows = tl.minimum(at + slot, left - 1) * sign
            there = (slot < TOKENS) & (at + slot < left)
            to = dbc_at + rows[:, None] * (2 * N) + column[None, :]
            tl.store(to, sums.to(dbc_ptr.dtype.element_ty), mask=there[:, None])
    _store_states(dA_ptr + place * N * E, E, d, dA, N)
    tl.store(dskip_ptr + place * E + d, dskip)
    tl.store(dbias_ptr + place * E + d, dbias)
    if segment == 0:
        _store_states(dstart_ptr + kb * N * E, E, d, ds, N)


@triton.jit
def _shifted(window, new, W: tl.constexpr):
    """The last W values, oldest first."""
    out = ()
    for i in tl.static_range(W - 1):
        out = out + (window[i + 1],)
    return out + (new,)


@triton.jit
def _taps(w_ptr, bias_ptr, E, d, inside, W: tl.constexpr, K: tl.constexpr):
    """Taps and bias of every direction."""
    taps = ()
    offsets = ()
    for k in tl.static_range(K):
        own = ()
        for tap in tl.static_range(W):
            own = own + (tl.load(w_ptr + (k * E + d) * W + tap, mask=inside, other=0.0),)
        taps = taps + (own,)
        offsets = offsets + (tl.load(bias_ptr + k * E + d, mask=inside, other=0.0),)
    return taps, offsets


@triton.jit
def _before_silu(window, taps, offset, backwards: tl.constexpr, W: tl.constexpr):
    """Output at the window's last token, of a reversed direction at its first."""
    out = offset
    for i in tl.static_range(W):
        out += window[i] * taps[W - 1 - i if backwards else i]
    return out


@triton.jit(do_not_specialize=["S", "batch"])
def conv_forward_kernel(
    x_ptr, w_ptr, bias_ptr, u_ptr, S, E, batch, x_row, x_batch,
    W: tl.constexpr, K: tl.constexpr, REVERSE: tl.constexpr, STEPS: tl.constexpr, TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """silu(causal convolution) of STEPS - W + 1 tokens in every direction, walked with a window of W tokens."""
    first = tl.program_id(0).to(tl.int64) * (STEPS - W + 1)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    row = tl.program_id(2).to(tl.int64)
    cols = d < E
    last = tl.minimum(first + STEPS - W + 1, S)
    x_ptr += row * x_batch
    taps, offsets = _taps(w_ptr, bias_ptr, E, d, cols, W, K)
    window = _zeros(W, CHANNELS)
    for i in tl.static_range(W - 1):
        at = first - (W - 1) + i
        window = _shifted(window, _channels(x_ptr, at, x_row, d, cols & (at >= 0)), W)
    for step in range(0, STEPS, TOKENS):
        new = ()
        for i in tl.static_range(TOKENS):
            at = first + step + i
            new = new + (_channels(x_ptr, at, x_row, d, cols & (at < S)),)
        outs = ()
        for i in tl.static_range(TOKENS):
            window = _shifted(window, new[i], W)
            for k in tl.static_range(K):
                out = _before_silu(window, taps[k], offsets[k], ((REVERSE >> k) & 1) == 1, W)
                outs = outs + (out * _sigmoid(out),)
        for i in tl.static_range(TOKENS):
            for k in tl.static_range(K):
                at = first + step + i - ((W - 1) if (REVERSE >> k) & 1 else 0)
                to = ((k * batch + row) * S + at) * E + d
                tl.store(
                    u_ptr + to, outs[i * K + k].to(u_ptr.dtype.element_ty), mask=cols & (at >= first) & (at < last)
                )


@triton.jit(do_not_specialize=["S", "batch"])
def conv_backward_kernel(
    x_ptr, w_ptr, bias_ptr, du_ptr, dx_ptr, dw_ptr, S, E, batch, x_row, x_batch, dx_row, dx_batch,
    W: tl.constexpr, K: tl.constexpr, REVERSE: tl.constexpr, STEPS: tl.constexpr, TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradients of STEPS - W + 1 tokens of x, all directions summed, and these tokens' part of those of taps and bias
    (K, W + 1, E).

    The gradient before silu of the newest token (of a reversed direction: of the oldest in the window) is computed
    once; what a token of x gets is complete when it is the oldest in the window."""
    first = tl.program_id(0).to(tl.int64) * (STEPS - W + 1)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    row = tl.program_id(2).to(tl.int64)
    cols = d < E
    last = tl.minimum(first + STEPS - W + 1, S)
    x_ptr += row * x_batch
    dx_ptr += row * dx_batch
    taps, offsets = _taps(w_ptr, bias_ptr, E, d, cols, W, K)
    window = _zeros(W, CHANNELS)
    for i in tl.static_range(W - 1):
        at = first - (W - 1) + i
        window = _shifted(window, _channels(x_ptr, at, x_row, d, cols & (at >= 0)), W)
    gradients = _zeros(K * W, CHANNELS)  # before silu, W tokens of every direction
    sums = _zeros(K * (W + 1), CHANNELS)
    for step in range(0, STEPS, TOKENS):
        new = ()
        given = ()
        for i in tl.static_range(TOKENS):
            at = first + step + i
            new = new + (_channels(x_ptr, at, x_row, d, cols & (at < S)),)
            for k in tl.static_range(K):
                at = first + step + i - ((W - 1) if (REVERSE >> k) & 1 else 0)
                given = given + (_channels(du_ptr + (k * batch + row) * S * E, at, E, d, cols & (at >= 0) & (at < S)),)
        totals = ()
        for i in tl.static_range(TOKENS):
            window = _shifted(window, new[i], W)
            total = tl.zeros([CHANNELS], tl.float32)
            kept = ()
            added = ()
            for k in tl.static_range(K):
                pre = _before_silu(window, taps[k], offsets[k], ((REVERSE >> k) & 1) == 1, W)
                sig = _sigmoid(pre)
                dpre = given[i * K + k] * sig * (1.0 + pre * (1.0 - sig))
                own = _shifted(gradients[k * W : k * W + W], dpre, W)
                at = first + step + i - ((W - 1) if (REVERSE >> k) & 1 else 0)
                counted = tl.where((at >= first) & (at < last), dpre, 0.0)
                for tap in tl.static_range(W):
                    # Oldest first: own[j] of a forward direction lies j tokens after the window's first, of a
                    # reversed one W - 1 - j before it, and either reads it by the tap of that distance.
                    total += own[tap] * taps[k][(tap if (REVERSE >> k) & 1 else W - 1 - tap)]
                    added = added + (
                        sums[k * (W + 1) + tap] + counted * window[W - 1 - tap if (REVERSE >> k) & 1 else tap],
                    )
                added = added + (sums[k * (W + 1) + W] + counted,)
                kept = kept + own
            gradients, sums = kept, added
            totals = totals + (total,)
        for i in tl.static_range(TOKENS):
            at = first + step + i - (W - 1)
            there = cols & (at >= first) & (at < last)
            tl.store(dx_ptr + at * dx_row + d, totals[i].to(dx_ptr.dtype.element_ty), mask=there)
    dw_ptr += (row * tl.num_programs(0) + tl.program_id(0)) * K * (W + 1) * E
    for i in tl.static_range(K * (W + 1)):
        tl.store(dw_ptr + i * E + d, sums[i], mask=cols)


def _mask(reverse: Sequence[bool]) -> int:
    return sum(1 << k for k, backwards in enumerate(reverse) if backwards)


_CONV = {"STEPS": 128, "TOKENS": 4, "CHANNELS": 64, "num_warps": 1, "num_stages": 1}


def _conv_grid(batch: int, tokens: int, channels: int, width: int) -> tuple[int, int, int]:
    return triton.cdiv(tokens, _CONV["STEPS"] - width + 1), triton.cdiv(channels, _CONV["CHANNELS"]), batch


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor, reverse: Sequence[bool]) -> Tensor:
    """`directional_conv`: x (B, S, E), channels contiguous; weight (K, E, W), bias (K, E) -> (K, B, S, E)."""
    batch, tokens, channels = x.shape
    directions, _, width = weight.shape
    u = x.new_empty(directions, batch, tokens, channels)
    conv_forward_kernel[_conv_grid(batch, tokens, channels, width)](
        x, weight, bias, u, tokens, channels, batch, x.stride(1), x.stride(0),
        W=width, K=directions, REVERSE=_mask(reverse), **_CONV,
    )  # fmt: skip
    return u


def conv_backward(
    x: Tensor, weight: Tensor, bias: Tensor, du: Tensor, reverse: Sequence[bool], dx: Tensor
) -> tuple[Tensor, Tensor]:
    """Writes the gradient of x to `dx`; returns those of weight and bias (fp32)."""
    batch, tokens, channels = x.shape
    directions, _, width = weight.shape
    grid = _conv_grid(batch, tokens, channels, width)
    parts = torch.empty(batch * grid[0], directions, width + 1, channels, dtype=torch.float32, device=x.device)
    conv_backward_kernel[grid](
        x, weight, bias, du, dx, parts, tokens, channels, batch, x.stride(1), x.stride(0), dx.stride(1), dx.stride(0),
        W=width, K=directions, REVERSE=_mask(reverse), **_CONV,
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
    channels = settings.block(width)
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
        "GATED": given.z is not None, "TOKENS": settings.tokens, "num_warps": settings.warps, "num_stages": 1,
    }  # fmt: skip
    reads = (given.u, given.dt, given.bc, gate, given.a2, given.skip, given.bias)
    grid = (width // channels, segments, directions * batch)
    starts, has_start = initial, initial is not None
    if segments > 1:
        local = torch.empty(directions * batch, segments, state, width, **fp32)
        sums = torch.empty(directions * batch, segments, width, **fp32)
        scan_forward_kernel[(grid[0], segments - 1, grid[2])](
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
    channels = settings.block(width, backward=True)
    segments, per_segment = given.plan(settings, channels)
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": given.u.device}
    rows, blocks = directions * batch, width // channels
    grid = (blocks, segments, rows)
    dy = dy.contiguous()
    gate, z_row, z_batch = given.gate()
    dy_direction = 0 if dy.ndim == 3 else batch * tokens * width
    sizes = (tokens, width, batch, given.bc.shape[-1], given.rank, z_row, z_batch, dy_direction, per_segment, segments)
    launch: dict[str, Any] = {
        "CHUNK": settings.chunk, "REVERSE": _mask(given.reverse), "GATED": given.z is not None, "num_stages": 1,
    }  # fmt: skip
    ends, has_ends = dend, dend is not None
    if segments > 1:
        local = torch.empty(rows, segments, state, width, **fp32)
        sums = torch.empty(rows, segments, width, **fp32)
        light = settings.block(width)
        scan_gradient_ends_kernel[(width // light, segments - 1, rows)](
            given.dt, given.bc, gate, dy, given.a2, given.bias, local, sums, *sizes,
            N=state, CHANNELS=light, TOKENS=settings.tokens, num_warps=settings.warps, **launch,
        )  # fmt: skip
        ends, has_ends = torch.empty_like(local), True
        pass_states_kernel[(width // light, rows)](
            local, sums, given.a2, local if dend is None else dend, ends, width, batch, segments,
            N=state, CHANNELS=light, GIVEN=dend is not None, FROM_END=True, num_warps=settings.warps,
        )  # fmt: skip
    out = [torch.empty_like(given.u) for _ in range(3)]
    dz = torch.empty_like(given.u) if given.z is not None else out[0]
    dbc = given.u.new_empty(blocks, directions, batch, tokens, 2 * state)  # parts, summed in fp32
    dA = torch.empty(directions, batch, segments, state, width, **fp32)
    dskip, dbias = torch.empty(2, directions, batch, segments, width, **fp32)
    dinitial = torch.empty(directions, batch, state, width, **fp32)
    exact = given.u.dtype == torch.float32
    scratch = torch.empty(
        (rows * segments * blocks, settings.chunk // settings.backward_tokens, state, channels),
        dtype=torch.bfloat16 if settings.short and not exact else torch.float32,
        device=given.u.device,
    )
    scan_backward_kernel[grid](
        given.u, given.dt, given.bc, gate, dy, given.a2, given.skip, given.bias, kept, ends if has_ends else kept,
        scratch, *out, dz, dbc, dA, dskip, dbias, dinitial, *sizes,
        N=state, CHANNELS=channels, TOKENS=settings.backward_tokens, ENDS=has_ends, EXACT=exact,
        num_warps=settings.backward_warps, **launch,
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
