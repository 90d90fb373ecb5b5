"""The SSD scan of `ops_ssd` as Triton kernels, forward and backward, with carried state.

Forward: step sizes and their decays summed within chunks; scores C B^T; what every chunk adds to the state; the
recurrence over chunks in fp32; the outputs. Backward goes the same way from the end. It is given the states that
entered the chunks and computes the scores again, transposed from the start: several releases of Triton miscompile the
transpose of a product on Hopper. Scores' gradients, a sum over heads, and those of the decays come from one kernel,
since both need the products of x and dy. Sums over heads are taken in groups of heads and then over the groups, in a
fixed order: results do not change from run to run. Addresses are 64 bits wide where a chunk begins.

Legend: B batch, S tokens, H heads, P head width, N state size, G groups, Q chunk length, c chunks. For a chunk with
summed decays a_i: y_i = exp(a_i) C_i S + sum over j <= i of (C_i B_j) exp(a_i - a_j) s_j x_j + D x_i.
"""

from typing import Any

import torch
from torch import Tensor

from .ops_triton_parts import kernel, sigmoid, softplus, tl, triton
from .ops_triton_settings import KernelSettings, settings_for


@triton.jit
def _tile(ptr, rows, row_stride, columns, there):
    """A tile of a matrix whose columns are neighbours; zero where a row is not `there`."""
    return tl.load(ptr + rows[:, None] * row_stride + columns[None, :], mask=there[:, None], other=0.0)


@triton.jit
def _ids(ids_ptr, at, there):
    return tl.load(ids_ptr + at, mask=there, other=-1)


@triton.jit
def _id_before(ids_ptr, chunk, Q: tl.constexpr):
    """Sample of the token in front of a chunk; 0, that of the given state, in front of the first."""
    return tl.load(ids_ptr - 1, mask=chunk > 0, other=0)


@kernel(do_not_specialize=["S"])
def steps_kernel(
    dt_ptr, a_ptr, bias_ptr, steps_ptr, total_ptr, S, dt_row, dt_batch, low, high, heads, Q: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """Steps behind softplus and bounds, and step * a summed within one chunk, for a block of heads."""
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    chunk, chunks = tl.program_id(1), tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    token = tl.arange(0, Q)
    known = head < heads
    there = (chunk * Q + token < S)[:, None] & known[None, :]
    dt_ptr += batch * dt_batch + (chunk.to(tl.int64) * Q) * dt_row
    raw = tl.load(dt_ptr + token[:, None] * dt_row + head[None, :], mask=there, other=0.0).to(tl.float32)
    raw += tl.load(bias_ptr + head, mask=known, other=0.0).to(tl.float32)[None, :]
    step = tl.minimum(tl.maximum(softplus(raw), low), high)
    step = tl.where(there, step, 0.0)
    # exp(-104) is zero in fp32: a faster decay would only cost the sums behind it their last digits.
    decay = tl.maximum(step * tl.load(a_ptr + head, mask=known, other=0.0).to(tl.float32)[None, :], -104.0)
    total = tl.cumsum(decay, axis=0)
    out = ((batch * heads + head[None, :]) * chunks + chunk) * Q + token[:, None]
    tl.store(steps_ptr + out, step, mask=known[None, :])
    tl.store(total_ptr + out, total, mask=known[None, :])


@kernel(do_not_specialize=["S"])
def scores_kernel(
    first_ptr, second_ptr, out_ptr, S, row, batch_stride, row2, batch_stride2, groups, TRANSPOSED: tl.constexpr,
    Q: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One tile of first second^T within a chunk and group: C B^T, needed for rows at or behind columns; TRANSPOSED:
    B C^T, for rows at or before columns."""
    tiles: tl.constexpr = Q // TILE
    m, n = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    chunk, chunks = tl.program_id(1), tl.num_programs(1)
    batch, group = (tl.program_id(2) // groups).to(tl.int64), tl.program_id(2) % groups
    needed = m <= n if TRANSPOSED else m >= n
    if needed:
        rows, columns = m * TILE + tl.arange(0, TILE), n * TILE + tl.arange(0, TILE)
        k = tl.arange(0, N)
        start = chunk.to(tl.int64) * Q
        left = S - chunk * Q
        first_ptr += batch * batch_stride + start * row + group * N
        second_ptr += batch * batch_stride2 + start * row2 + group * N
        first = _tile(first_ptr, rows, row, k, rows < left)
        second = tl.load(second_ptr + columns[None, :] * row2 + k[:, None], mask=(columns < left)[None, :], other=0.0)
        out_ptr += ((batch * chunks + chunk) * groups + group) * Q * Q
        tl.store(out_ptr + rows[:, None] * Q + columns[None, :], tl.dot(first, second))


@triton.jit
def _chunk_scale(total_ptr, steps_ptr, at, left, ENDS: tl.constexpr, Q: tl.constexpr):
    """By how much tokens of a chunk count in `chunk_state_kernel`, for one head, whose sums the pointers are at."""
    total = tl.load(total_ptr + at)
    if ENDS:
        end = tl.load(total_ptr + tl.minimum(left, Q) - 1)
        return tl.exp(tl.minimum(end - total, 0.0)) * tl.load(steps_ptr + at)
    else:
        return tl.exp(total)


@kernel(do_not_specialize=["S"])
def chunk_state_kernel(
    x_ptr, b_ptr, steps_ptr, total_ptr, ids_ptr, out_ptr, S, x_row, x_batch, b_row, b_batch, heads, per_group,
    ENDS: tl.constexpr, PACKED: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Sum over a chunk's tokens of scale x b^T, (P, N), for one head. ENDS: scale is step * decay to the chunk's end
    (what the chunk adds to the state); else the decay from its start (dy C^T: the gradient of the entering state)."""
    head, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    start = chunk.to(tl.int64) * Q
    left = S - chunk * Q
    x_ptr += batch * x_batch + start * x_row + head * P
    b_ptr += batch * b_batch + start * b_row + (head // per_group) * N
    total_ptr += ((batch * heads + head) * chunks + chunk) * Q
    steps_ptr += ((batch * heads + head) * chunks + chunk) * Q
    if PACKED:
        ids_ptr += batch * S + start
        border = tl.load(ids_ptr + tl.minimum(left, Q) - 1) if ENDS else _id_before(ids_ptr, chunk, Q)
    p, n = tl.arange(0, P), tl.arange(0, N)
    state = tl.zeros([P, N], tl.float32)
    for token in range(0, Q, TILE):
        at = token + tl.arange(0, TILE)
        there = at < left
        scale = _chunk_scale(total_ptr, steps_ptr, at, left, ENDS, Q)[None, :]
        if PACKED:
            scale = tl.where((_ids(ids_ptr, at, there) == border)[None, :], scale, 0.0)
        x = tl.load(x_ptr + at[None, :] * x_row + p[:, None], mask=there[None, :], other=0.0)
        x = (x.to(tl.float32) * scale).to(x_ptr.dtype.element_ty)
        state = tl.dot(x, _tile(b_ptr, at, b_row, n, there), state)
    out_ptr += ((batch * chunks + chunk) * heads + head) * P * N
    tl.store(out_ptr + p[:, None] * N + n[None, :], state)


@triton.jit
def _carry(total_ptr, ids_ptr, chunk, S, PACKED: tl.constexpr, Q: tl.constexpr):
    """How much of the state that enters a chunk is left behind it. `total_ptr` is at the first chunk."""
    end = tl.minimum(S - chunk * Q, Q) - 1  # not beyond the last token: sums of nothing round
    kept = tl.exp(tl.load(total_ptr + chunk * Q + end))
    if PACKED:
        last = tl.load(ids_ptr + chunk * Q + end)
        before = tl.load(ids_ptr + chunk * Q - 1, mask=chunk > 0, other=0)
        kept = tl.where(last == before, kept, 0.0)
    return kept


@kernel(do_not_specialize=["S", "chunks"])
def state_passing_kernel(
    added_ptr, total_ptr, start_ptr, ids_ptr, states_ptr, end_ptr, S, chunks, heads, size, PACKED: tl.constexpr,
    Q: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The states that enter the chunks, and the one behind the last, for some of the numbers of one head's state."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = at < size
    total_ptr += (batch * heads + head) * chunks * Q
    ids_ptr += batch * S
    here = (batch * chunks * heads + head) * size
    state = tl.load(start_ptr + (batch * heads + head) * size + at, mask=inside, other=0.0).to(tl.float32)
    added_ptr += here
    states_ptr += here
    added = tl.load(added_ptr + at, mask=inside, other=0.0)
    for chunk in range(0, chunks):
        added_ptr += heads * size
        later = tl.load(added_ptr + at, mask=inside & (chunk + 1 < chunks), other=0.0)
        tl.store(states_ptr + at, state.to(states_ptr.dtype.element_ty), mask=inside)
        state = state * _carry(total_ptr, ids_ptr, chunk, S, PACKED, Q) + added
        states_ptr += heads * size
        added = later
    tl.store(end_ptr + (batch * heads + head) * size + at, state, mask=inside)


@kernel(do_not_specialize=["S", "chunks"])
def state_passing_backward_kernel(
    said_ptr, dstates_ptr, total_ptr, dend_ptr, ids_ptr, dstart_ptr, S, chunks, heads, size, END: tl.constexpr,
    PACKED: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`said_ptr` holds what the outputs of a chunk say about the state that enters it, `dstates_ptr` gets the gradient
    of the state that leaves it."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = at < size
    total_ptr += (batch * heads + head) * chunks * Q
    ids_ptr += batch * S
    last = ((batch * chunks + chunks - 1) * heads + head) * size
    said_ptr += last
    dstates_ptr += last
    gradient = tl.zeros([BLOCK], tl.float32)
    if END:
        gradient += tl.load(dend_ptr + (batch * heads + head) * size + at, mask=inside, other=0.0).to(tl.float32)
    said = tl.load(said_ptr + at, mask=inside, other=0.0)
    for back in range(0, chunks):
        chunk = chunks - 1 - back
        said_ptr -= heads * size
        earlier = tl.load(said_ptr + at, mask=inside & (chunk > 0), other=0.0)
        tl.store(dstates_ptr + at, gradient.to(dstates_ptr.dtype.element_ty), mask=inside)
        gradient = gradient * _carry(total_ptr, ids_ptr, chunk, S, PACKED, Q) + said
        said = earlier
        dstates_ptr -= heads * size
    tl.store(dstart_ptr + (batch * heads + head) * size + at, gradient, mask=inside)


@kernel(do_not_specialize=["S"])
def carry_backward_kernel(
    dstates_ptr, states_ptr, total_ptr, ids_ptr, dcarry_ptr, S, heads, size, PACKED: tl.constexpr, Q: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of one chunk's whole decay: what the leaving state's gradient says about the entering state."""
    head, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    at = tl.arange(0, BLOCK)
    here = ((batch * chunks + chunk) * heads + head) * size
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        gradient = tl.load(dstates_ptr + here + start + at).to(tl.float32)
        products += gradient * tl.load(states_ptr + here + start + at).to(tl.float32)
    total_ptr += (batch * heads + head) * chunks * Q
    carry = _carry(total_ptr, ids_ptr + batch * S, chunk, S, PACKED, Q)
    tl.store(dcarry_ptr + (batch * heads + head) * chunks + chunk, tl.sum(products) * carry)


@kernel(do_not_specialize=["S"])
def chunk_scan_kernel(
    x_ptr, c_ptr, scores_ptr, steps_ptr, total_ptr, states_ptr, D_ptr, ids_ptr, z_ptr, weight_ptr, squares_ptr, y_ptr,
    S, x_row, x_batch, c_row, c_batch, z_row, z_batch, heads, groups, GATE: tl.constexpr, PACKED: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Outputs of TILE tokens of one head: from the state that entered the chunk, and from the tokens before. GATE:
    times silu(z), squared and summed up for the norm behind, times its weight."""
    tiles: tl.constexpr = Q // TILE
    head, m = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    chunk, chunks = tl.program_id(1), tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    group = head // (heads // groups)
    start = chunk.to(tl.int64) * Q
    left = S - chunk * Q
    rows = m * TILE + tl.arange(0, TILE)
    there = rows < left
    p, n = tl.arange(0, P), tl.arange(0, N)
    x_ptr += batch * x_batch + start * x_row
    c_ptr += batch * c_batch + start * c_row + group * N
    y_ptr += (batch * S + start) * heads * P
    scores_ptr += ((batch * chunks + chunk) * groups + group) * Q * Q
    states_ptr += (batch * chunks + chunk) * heads * P * N
    if PACKED:
        ids_ptr += batch * S + start
        sample = _ids(ids_ptr, rows, there)
        entered = sample == _id_before(ids_ptr, chunk, Q)
    c = _tile(c_ptr, rows, c_row, n, there)
    sums = ((batch * heads + head) * chunks + chunk) * Q
    total = tl.load(total_ptr + sums + rows)
    # A decay that leads into this tile is one to its edge and one from there: both are at most 1.
    edge = tl.load(total_ptr + sums + m * TILE - 1, mask=m > 0, other=0.0)
    state = tl.load(states_ptr + head * P * N + p[None, :] * N + n[:, None])
    y = tl.dot(c, state) * tl.exp(edge)
    if PACKED:
        y = tl.where(entered[:, None], y, 0.0)
    for token in range(0, m * TILE, TILE):
        at = token + tl.arange(0, TILE)
        weight = tl.exp(tl.minimum(edge - tl.load(total_ptr + sums + at), 0.0)) * tl.load(steps_ptr + sums + at)
        scores = tl.load(scores_ptr + rows[:, None] * Q + at[None, :]) * weight[None, :]
        if PACKED:
            scores = tl.where(sample[:, None] == _ids(ids_ptr, at, at < left)[None, :], scores, 0.0)
        x = _tile(x_ptr + head * P, at, x_row, p, at < left)
        y = tl.dot(scores.to(x_ptr.dtype.element_ty), x, y)
    y *= tl.exp(tl.minimum(total - edge, 0.0))[:, None]
    decay = tl.exp(tl.minimum(total[:, None] - tl.load(total_ptr + sums + rows)[None, :], 0.0))
    seen = rows[:, None] >= rows[None, :]
    if PACKED:
        seen = seen & (sample[:, None] == _ids(ids_ptr, rows, there)[None, :])
    scores = tl.load(scores_ptr + rows[:, None] * Q + rows[None, :])
    scores = tl.where(seen, scores * decay, 0.0) * tl.load(steps_ptr + sums + rows)[None, :]
    x = _tile(x_ptr + head * P, rows, x_row, p, there)
    y = tl.dot(scores.to(x_ptr.dtype.element_ty), x, y)
    y += x.to(tl.float32) * tl.load(D_ptr + head).to(tl.float32)
    if GATE:
        z = _tile(z_ptr + batch * z_batch + start * z_row + head * P, rows, z_row, p, there).to(tl.float32)
        y = y.to(y_ptr.dtype.element_ty).to(tl.float32) * (z * sigmoid(z))  # rounded as where the norm is by itself
        tl.store(squares_ptr + (batch * S + start + rows) * heads + head, tl.sum(y * y, axis=1), mask=there)
        y *= tl.load(weight_ptr + head * P + p).to(tl.float32)[None, :]
    out = y_ptr + head * P + rows[:, None] * (heads * P) + p[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=there[:, None])


@kernel(do_not_specialize=["S"])
def dx_kernel(
    x_ptr, b_ptr, scores_ptr, steps_ptr, total_ptr, dstates_ptr, D_ptr, ids_ptr, dy_ptr, dx_ptr, dsteps_ptr,
    dends_ptr, dD_ptr, S, x_row, x_batch, b_row, b_batch, dy_row, dy_batch, dx_row, dx_batch, heads, groups,
    PACKED: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradients of TILE tokens' x and steps (without what steps do through decays), of their decay to the chunk's end,
    and of D. `scores_ptr` holds B C^T."""
    tiles: tl.constexpr = Q // TILE
    head, m = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    chunk, chunks = tl.program_id(1), tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    group = head // (heads // groups)
    start = chunk.to(tl.int64) * Q
    left = S - chunk * Q
    rows = m * TILE + tl.arange(0, TILE)
    there = rows < left
    p, n = tl.arange(0, P), tl.arange(0, N)
    x_ptr += batch * x_batch + start * x_row + head * P
    dx_ptr += batch * dx_batch + start * dx_row + head * P
    dy_ptr += batch * dy_batch + start * dy_row + head * P
    b_ptr += batch * b_batch + start * b_row + group * N
    sums = ((batch * heads + head) * chunks + chunk) * Q
    scores_ptr += ((batch * chunks + chunk) * groups + group) * Q * Q
    dstates_ptr += ((batch * chunks + chunk) * heads + head) * P * N
    total, step = tl.load(total_ptr + sums + rows), tl.load(steps_ptr + sums + rows)
    # A decay that leads out of this tile is one to its last token and one from there: both are at most 1.
    edge = tl.load(total_ptr + sums + tl.minimum(left, (m + 1) * TILE) - 1)
    to_edge = tl.exp(tl.minimum(edge - total, 0.0))
    to_end = tl.exp(tl.minimum(tl.load(total_ptr + sums + tl.minimum(left, Q) - 1) - edge, 0.0))
    if PACKED:
        ids_ptr += batch * S + start
        sample = _ids(ids_ptr, rows, there)
        to_edge_end = tl.where(sample == tl.load(ids_ptr + tl.minimum(left, Q) - 1), to_end, 0.0)[:, None]
    else:
        to_edge_end = to_end
    x = _tile(x_ptr, rows, x_row, p, there)
    b = _tile(b_ptr, rows, b_row, n, there)
    dstate = tl.load(dstates_ptr + p[None, :] * N + n[:, None])
    gradient = tl.dot(b, dstate) * to_edge_end
    tl.store(dends_ptr + sums + rows, tl.sum(gradient * x, axis=1) * to_edge * step)
    for token in range((m + 1) * TILE, Q, TILE):
        at = token + tl.arange(0, TILE)
        weight = tl.exp(tl.minimum(tl.load(total_ptr + sums + at) - edge, 0.0))
        scores = tl.load(scores_ptr + rows[:, None] * Q + at[None, :]) * weight[None, :]
        if PACKED:
            scores = tl.where(sample[:, None] == _ids(ids_ptr, at, at < left)[None, :], scores, 0.0)
        dy = _tile(dy_ptr, at, dy_row, p, at < left)
        gradient = tl.dot(scores.to(dy_ptr.dtype.element_ty), dy, gradient)
    gradient *= to_edge[:, None]
    decay = tl.exp(tl.minimum(tl.load(total_ptr + sums + rows)[None, :] - total[:, None], 0.0))
    seen = rows[:, None] <= rows[None, :]
    if PACKED:
        seen = seen & (sample[:, None] == _ids(ids_ptr, rows, there)[None, :])
    scores = tl.where(seen, tl.load(scores_ptr + rows[:, None] * Q + rows[None, :]) * decay, 0.0)
    dy = _tile(dy_ptr, rows, dy_row, p, there)
    gradient = tl.dot(scores.to(dy_ptr.dtype.element_ty), dy, gradient)
    x = _tile(x_ptr, rows, x_row, p, there).to(tl.float32)  # again: it would take too many registers
    tl.store(dsteps_ptr + sums + rows, tl.sum(gradient * x, axis=1))
    dy = _tile(dy_ptr, rows, dy_row, p, there).to(tl.float32)
    tl.store(dD_ptr + ((batch * chunks + chunk) * heads + head) * tiles + m, tl.sum(dy * x))
    dx = gradient * step[:, None] + dy * tl.load(D_ptr + head).to(tl.float32)
    tl.store(dx_ptr + rows[:, None] * dx_row + p[None, :], dx.to(dx_ptr.dtype.element_ty), mask=there[:, None])


@kernel(do_not_specialize=["S", "splits"])
def dscores_kernel(
    x_ptr, dy_ptr, scores_ptr, steps_ptr, total_ptr, ids_ptr, dscores_ptr, later_ptr, earlier_ptr, S, x_row, x_batch,
    dy_row, dy_batch, heads, groups, splits, PACKED: tl.constexpr, Q: tl.constexpr, P: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """One tile (tokens j, later tokens i) of the gradient of B C^T, summed over some heads of a group; and for every
    head what the pairs (j, i) of this tile say about the decays: sums over j for each i, and over i for each j."""
    tiles: tl.constexpr = Q // TILE
    m, n = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    chunk, chunks = tl.program_id(1), tl.num_programs(1)
    split = tl.program_id(2) % splits
    group = (tl.program_id(2) // splits) % groups
    batch = (tl.program_id(2) // (splits * groups)).to(tl.int64)
    if m <= n:
        per_split = heads // (groups * splits)
        start = chunk.to(tl.int64) * Q
        left = S - chunk * Q
        rows, columns = m * TILE + tl.arange(0, TILE), n * TILE + tl.arange(0, TILE)
        p = tl.arange(0, P)
        seen = rows[:, None] <= columns[None, :]
        if PACKED:
            ids_ptr += batch * S + start
            sample = _ids(ids_ptr, rows, rows < left)
            seen = seen & (sample[:, None] == _ids(ids_ptr, columns, columns < left)[None, :])
        place = ((batch * chunks + chunk) * groups + group) * Q * Q + rows[:, None] * Q + columns[None, :]
        # A token does not decay on its way to itself. What is not seen is left out here, and of dscores at the end.
        scores = tl.where(seen & (rows[:, None] < columns[None, :]), tl.load(scores_ptr + place), 0.0)
        first = group * (heads // groups) + split * per_split
        x_ptr += batch * x_batch + start * x_row
        dy_ptr += batch * dy_batch + start * dy_row
        dscores = tl.zeros([TILE, TILE], tl.float32)
        for head in range(first, first + per_split):
            sums = ((batch * heads + head) * chunks + chunk) * Q
            x = _tile(x_ptr + head * P, rows, x_row, p, rows < left)
            dy = tl.load(
                dy_ptr + head * P + columns[None, :] * dy_row + p[:, None], mask=(columns < left)[None, :], other=0.0
            )
            total, step = tl.load(total_ptr + sums + rows), tl.load(steps_ptr + sums + rows)
            decay = tl.exp(tl.minimum(tl.load(total_ptr + sums + columns)[None, :] - total[:, None], 0.0))
            product = tl.dot(x, dy) * decay * step[:, None]
            dscores += product
            product *= scores
            tl.store(later_ptr + sums * tiles + m * Q + columns, tl.sum(product, axis=0))
            tl.store(earlier_ptr + sums * tiles + n * Q + rows, tl.sum(product, axis=1))
        size = tl.num_programs(2) // (splits * groups) * chunks * groups
        tl.store(dscores_ptr + split.to(tl.int64) * size * Q * Q + place, tl.where(seen, dscores, 0.0))


@kernel(do_not_specialize=["S", "splits"])
def rows_by_states_kernel(
    rows_ptr, states_ptr, with_ptr, steps_ptr, total_ptr, ids_ptr, out_ptr, sums_ptr, S, row, batch_stride, with_row,
    with_batch, heads, groups, splits, ENDS: tl.constexpr, PACKED: tl.constexpr, Q: tl.constexpr, P: tl.constexpr,
    N: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Sum over some heads of a group of scale * rows (TILE, P) states (P, N). ENDS: the part of dB that came through
    the states, from x and their gradients; else that of dC, from dy and the states, and for every head and token its
    product with C, the gradient of the decay from the chunk's start."""
    m, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    split = tl.program_id(2) % splits
    group = (tl.program_id(2) // splits) % groups
    batch = (tl.program_id(2) // (splits * groups)).to(tl.int64)
    per_split = heads // (groups * splits)
    start = chunk.to(tl.int64) * Q
    left = S - chunk * Q
    at = m * TILE + tl.arange(0, TILE)
    there = at < left
    p, n = tl.arange(0, P), tl.arange(0, N)
    rows_ptr += batch * batch_stride + start * row
    states_ptr += (batch * chunks + chunk) * heads * P * N
    if PACKED:
        ids_ptr += batch * S + start
        border = tl.load(ids_ptr + tl.minimum(left, Q) - 1) if ENDS else _id_before(ids_ptr, chunk, Q)
        kept = _ids(ids_ptr, at, there) == border
    if not ENDS:
        c = _tile(with_ptr + batch * with_batch + start * with_row + group * N, at, with_row, n, there)
        c = c.to(tl.float32)
    out = tl.zeros([TILE, N], tl.float32)
    first = group * (heads // groups) + split * per_split
    for head in range(first, first + per_split):
        sums = ((batch * heads + head) * chunks + chunk) * Q
        total = tl.load(total_ptr + sums + at)
        if ENDS:
            end = tl.load(total_ptr + sums + tl.minimum(left, Q) - 1)
            scale = tl.exp(tl.minimum(end - total, 0.0)) * tl.load(steps_ptr + sums + at)
        else:
            scale = tl.exp(total)
        if PACKED:
            scale = tl.where(kept, scale, 0.0)
        x = _tile(rows_ptr + head * P, at, row, p, there)
        state = tl.load(states_ptr + head * P * N + p[:, None] * N + n[None, :]).to(rows_ptr.dtype.element_ty)
        product = tl.dot(x, state) * scale[:, None]
        out += product
        if not ENDS:
            tl.store(sums_ptr + sums + at, tl.sum(product * c, axis=1))
    size = tl.num_programs(2) // (splits * groups) * chunks * groups * Q * N
    out_ptr += split.to(tl.int64) * size + ((batch * chunks + chunk) * groups + group) * Q * N
    tl.store(out_ptr + at[:, None] * N + n[None, :], out)


@kernel(do_not_specialize=["S", "splits", "score_splits"])
def finish_kernel(
    parts_ptr, dscores_ptr, other_ptr, out_ptr, S, other_row, other_batch, out_row, out_batch, groups, splits,
    score_splits, EARLIER: tl.constexpr, Q: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dB (EARLIER) or dC of TILE tokens: the parts of all heads, and the gradient of B C^T times C or B."""
    m, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch, group = (tl.program_id(2) // groups).to(tl.int64), tl.program_id(2) % groups
    start = chunk.to(tl.int64) * Q
    left = S - chunk * Q
    at = m * TILE + tl.arange(0, TILE)
    n = tl.arange(0, N)
    size = (tl.num_programs(2) * chunks).to(tl.int64) * Q
    place = ((batch * chunks + chunk) * groups + group) * Q
    parts_ptr += place * N
    dscores_ptr += place * Q
    other_ptr += batch * other_batch + start * other_row + group * N
    out_ptr += batch * out_batch + start * out_row + group * N
    out = tl.zeros([TILE, N], tl.float32)
    for split in range(0, splits):
        out += tl.load(parts_ptr + split * size * N + at[:, None] * N + n[None, :])
    if EARLIER:
        low, high = m * TILE, Q
    else:
        low, high = 0, (m + 1) * TILE
    for token in range(low, high, TILE):
        k = token + tl.arange(0, TILE)
        where = at[:, None] * Q + k[None, :] if EARLIER else k[None, :] * Q + at[:, None]
        dscores = tl.zeros([TILE, TILE], tl.float32)
        for split in range(0, score_splits):
            dscores += tl.load(dscores_ptr + split * size * Q + where)
        other = _tile(other_ptr, k, other_row, n, k < left).to(tl.float32)
        out = tl.dot(dscores, other, out, input_precision="tf32")
    tl.store(out_ptr + at[:, None] * out_row + n[None, :], out.to(out_ptr.dtype.element_ty), mask=(at < left)[:, None])


@kernel(do_not_specialize=["S"])
def steps_backward_kernel(
    dt_ptr, a_ptr, bias_ptr, steps_ptr, dsteps_ptr, dends_ptr, dstarts_ptr, later_ptr, earlier_ptr, dcarry_ptr,
    dD_ptr, ddt_ptr, sums_ptr, S, dt_row, dt_batch, ddt_row, ddt_batch, low, high, heads, Q: tl.constexpr,
    TILES: tl.constexpr, D_TILES: tl.constexpr,
):  # fmt: skip
    """Gradients of one head's steps before bias and softplus in one chunk, and this chunk's part of those of a, bias
    and D, from what was said about steps and decays, and about D tile by tile.

    A decay from j to i holds every step behind j up to i: what pairs say about a step is what they say about the ends
    behind it less what they say about the starts from it on; what was said about decays to the chunk's end comes from
    the tokens before a step, about decays from its start from those at and behind it."""
    head, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    token = tl.arange(0, Q)
    there = chunk * Q + token < S
    sums = ((batch * heads + head) * chunks + chunk) * Q
    step = tl.load(steps_ptr + sums + token)
    a = tl.load(a_ptr + head).to(tl.float32)
    behind = tl.load(dstarts_ptr + sums + token)
    tile = token // (Q // TILES)
    for m in tl.static_range(TILES):
        behind += tl.load(later_ptr + sums * TILES + m * Q + token, mask=tile >= m, other=0.0)
        behind -= tl.load(earlier_ptr + sums * TILES + m * Q + token, mask=tile <= m, other=0.0)
    ends = tl.load(dends_ptr + sums + token)
    whole = tl.load(dcarry_ptr + (batch * heads + head) * chunks + chunk)
    decay = tl.cumsum(behind, axis=0, reverse=True) + (tl.cumsum(ends, axis=0) - ends) + whole
    decay = tl.where(there, decay, 0.0)
    gradient = tl.load(dsteps_ptr + sums + token) + decay * a
    dt_ptr += batch * dt_batch + (chunk.to(tl.int64) * Q) * dt_row
    ddt_ptr += batch * ddt_batch + (chunk.to(tl.int64) * Q) * ddt_row
    raw = tl.load(dt_ptr + token * dt_row + head, mask=there, other=0.0).to(tl.float32)
    raw += tl.load(bias_ptr + head).to(tl.float32)
    soft = softplus(raw)
    gradient = tl.where(there & (soft >= low) & (soft <= high), gradient, 0.0) / (1.0 + tl.exp(-raw))
    tl.store(ddt_ptr + token * ddt_row + head, gradient.to(ddt_ptr.dtype.element_ty), mask=there)
    out = (batch * chunks + chunk) * heads + head
    size = (tl.num_programs(2) * chunks).to(tl.int64) * heads
    tl.store(sums_ptr + out, tl.sum(decay * step))
    tl.store(sums_ptr + size + out, tl.sum(gradient))
    tl.store(sums_ptr + 2 * size + out, tl.sum(tl.load(dD_ptr + out * D_TILES + tl.arange(0, D_TILES))))


def _splits(heads: int, programs: int, wanted: int) -> int:
    """Into how many groups to deal `heads` so that there are `wanted` programs: the fewest that do, dividing them."""
    for splits in range(1, heads + 1):
        if heads % splits == 0 and programs * splits >= wanted:
            return splits
    return heads


def _tokens_first(x: Tensor) -> Tensor:
    """(B, S, H, P) or (B, S, G, N) whose last two dimensions are dense, as the kernels read them."""
    dense = x.stride(-1) == 1 and (x.shape[2] == 1 or x.stride(2) == x.shape[3])
    return x if dense else x.contiguous()


def ssd_forward(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, D: Tensor, dt_bias: Tensor, state: Tensor,
    ids: Tensor | None, chunk_size: int, dt_limit: tuple[float, float],
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """`ssd` for the registry of operations. Keeps step sizes and their decays summed within each chunk, both
    (B, H, c, Q) in fp32, and the states entering the chunks, (B, c, H, P, N) in x's type."""
    y, new_state, _, *kept = _forward(x, dt, a, b, c, D, dt_bias, state, ids, None, chunk_size, dt_limit)
    return (y, new_state), (kept[0], kept[1], kept[2])


def gated_ssd(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, D: Tensor, dt_bias: Tensor, state: Tensor,
    ids: Tensor | None, z: Tensor, weight: Tensor, chunk_size: int, dt_limit: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`ops_ssd.gated_ssd`: y, the new state, sums of squares."""
    y, new_state, squares, *_ = _forward(x, dt, a, b, c, D, dt_bias, state, ids, (z, weight), chunk_size, dt_limit)
    return y, new_state, squares


def _forward(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, D: Tensor, dt_bias: Tensor, state: Tensor,
    ids: Tensor | None, gate: tuple[Tensor, Tensor] | None, chunk_size: int, dt_limit: tuple[float, float],
) -> tuple[Tensor, ...]:  # fmt: skip
    """y, the new state, with a gate (z, weight) sums of squares (B, S, H), and what `ssd_forward` keeps."""
    x, b, c = _tokens_first(x), _tokens_first(b), _tokens_first(c)
    dt = dt if dt.stride(-1) == 1 else dt.contiguous()
    batch, tokens, heads, width = x.shape
    groups, size = b.shape[2:]
    chunks, use = triton.cdiv(tokens, chunk_size), settings_for(x.device)
    dims = {"Q": chunk_size, "P": width, "N": size}
    packed, ids = ids is not None, x if ids is None else ids.contiguous()
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    steps, total = torch.empty(2, batch, heads, chunks, chunk_size, **fp32).unbind(0)
    steps_kernel[(triton.cdiv(heads, 8), chunks, batch)](
        dt, a, dt_bias, steps, total, tokens, dt.stride(1), dt.stride(0), *dt_limit, heads, Q=chunk_size, HEADS=8,
    )  # fmt: skip
    scores = _scores(c, b, chunk_size, False, use)
    added = _chunk_states(x, b, steps, total, ids, packed, True, chunk_size, use)
    states, new_state = torch.empty_like(added, dtype=x.dtype), torch.empty(state.shape, **fp32)
    numbers, block = width * size, min(use.state_passing[0], width * size)
    state_passing_kernel[(triton.cdiv(numbers, block), heads, batch)](
        added, total, state.contiguous(), ids, states, new_state, tokens, chunks, heads, numbers, PACKED=packed,
        Q=chunk_size, BLOCK=block, num_warps=use.state_passing[1],
    )  # fmt: skip
    del added
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    z, weight = (y, D) if gate is None else gate
    squares = torch.empty(batch, tokens, 0 if gate is None else heads, **fp32)
    tiles = chunk_size // min(use.chunk_scan.tile, chunk_size)
    chunk_scan_kernel[(heads * tiles, chunks, batch)](
        x, c, scores, steps, total, states, D, ids, z, weight, squares, y, tokens, x.stride(1), x.stride(0),
        c.stride(1), c.stride(0), z.stride(1), z.stride(0), heads, groups, GATE=gate is not None, PACKED=packed,
        **dims, **use.chunk_scan.options(chunk_size),
    )  # fmt: skip
    return y, new_state, squares, steps, total, states


def _chunk_states(
    x: Tensor, b: Tensor, steps: Tensor, total: Tensor, ids: Tensor, packed: bool, ends: bool, chunk: int,
    use: KernelSettings,
) -> Tensor:  # fmt: skip
    """`chunk_state_kernel` for all heads and chunks, (B, c, H, P, N) in fp32."""
    batch, tokens, heads, width = x.shape
    per_group, chunks, size = heads // b.shape[2], total.shape[2], b.shape[3]
    out = torch.empty(batch, chunks, heads, width, size, dtype=torch.float32, device=x.device)
    chunk_state_kernel[(heads, chunks, batch)](
        x, b, steps, total, ids, out, tokens, x.stride(1), x.stride(0), b.stride(1), b.stride(0), heads, per_group,
        ENDS=ends, PACKED=packed, Q=chunk, P=width, N=size, **use.chunk_state.options(chunk),
    )  # fmt: skip
    return out


def _scores(first: Tensor, second: Tensor, chunk: int, transposed: bool, use: KernelSettings) -> Tensor:
    """first second^T within chunks, (B, c, G, Q, Q) in fp32; only the triangle that is needed is written."""
    batch, tokens, groups, size = first.shape
    chunks, tile = triton.cdiv(tokens, chunk), min(use.scores.tile, chunk)
    out = torch.empty(batch, chunks, groups, chunk, chunk, dtype=torch.float32, device=first.device)
    scores_kernel[((chunk // tile) ** 2, chunks, batch * groups)](
        first, second, out, tokens, first.stride(1), first.stride(0), second.stride(1), second.stride(0), groups,
        TRANSPOSED=transposed, Q=chunk, N=size, **use.scores.options(chunk),
    )  # fmt: skip
    return out


def ssd_backward(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, None, Tensor | None],
    kept: tuple[Tensor, Tensor, Tensor],
    gradients: tuple[Tensor | None, Tensor | None],
    into: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    *,
    chunk_size: int,
    dt_limit: tuple[float, float],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, a, b, c, D, dt_bias and state; those of x, dt, b and c are written to `into` if given."""
    x, dt, a, b, c, D, dt_bias, _, ids = tensors
    x, b, c = _tokens_first(x), _tokens_first(b), _tokens_first(c)
    dt = dt if dt.stride(-1) == 1 else dt.contiguous()
    steps, total, states = kept
    dy, dnew_state = gradients
    dy = torch.zeros_like(x) if dy is None else _tokens_first(dy)  # None: only the state was used
    dx, ddt, db, dc = (torch.empty_like(t) for t in (x, dt, b, c)) if into is None else into
    batch, tokens, heads, width = x.shape
    groups, size = b.shape[2:]
    chunks, use = steps.shape[2], settings_for(x.device)
    dims = {"Q": chunk_size, "P": width}
    packed, ids = ids is not None, x if ids is None else ids.contiguous()
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    xs, dys, bs, cs = ((t.stride(1), t.stride(0)) for t in (x, dy, b, c))

    said = _chunk_states(dy, c, steps, total, ids, packed, False, chunk_size, use)
    dstates = torch.empty_like(said, dtype=x.dtype)
    numbers, block = width * size, min(use.state_passing[0], width * size)
    dcarry = torch.empty(batch, heads, chunks, **fp32)
    dstate = torch.empty(batch, heads, width, size, **fp32)
    state_passing_backward_kernel[(triton.cdiv(numbers, block), heads, batch)](
        said, dstates, total, dstate if dnew_state is None else dnew_state.contiguous(), ids, dstate, tokens, chunks,
        heads, numbers, END=dnew_state is not None, PACKED=packed, Q=chunk_size, BLOCK=block,
        num_warps=use.state_passing[1],
    )  # fmt: skip
    del said
    carry_backward_kernel[(heads, chunks, batch)](
        dstates, states, total, ids, dcarry, tokens, heads, numbers, PACKED=packed, Q=chunk_size,
        BLOCK=min(2048, numbers),
    )  # fmt: skip

    scores = _scores(b, c, chunk_size, True, use)
    # Triton 3.6 miscompiles tiles of 64 tokens by 32 channels here for Hopper, with states of 64 (gradients 40 % off).
    dx_use = use.dx if width >= 64 else use.dx._replace(tile=min(use.dx.tile, 32))
    dx_tiles = chunk_size // min(dx_use.tile, chunk_size)
    dsteps, dends, dstarts = torch.empty(3, *steps.shape, **fp32).unbind(0)
    dD = torch.empty(batch, chunks, heads, dx_tiles, **fp32)
    dx_kernel[(heads * dx_tiles, chunks, batch)](
        x, b, scores, steps, total, dstates, D, ids, dy, dx, dsteps, dends, dD, tokens, *xs, *bs, *dys, dx.stride(1),
        dx.stride(0), heads, groups, PACKED=packed, N=size, **dims, **dx_use.options(chunk_size),
    )  # fmt: skip
    per_group, tiles = heads // groups, chunk_size // min(use.dscores.tile, chunk_size)
    score_splits = _splits(per_group, batch * chunks * groups * tiles * (tiles + 1) // 2, use.programs)
    dscores = torch.empty(score_splits, *scores.shape, **fp32)
    later, earlier = torch.empty(2, batch, heads, chunks, tiles, chunk_size, **fp32).unbind(0)
    dscores_kernel[(tiles * tiles, chunks, batch * groups * score_splits)](
        x, dy, scores, steps, total, ids, dscores, later, earlier, tokens, *xs, *dys, heads, groups, score_splits,
        PACKED=packed, **dims, **use.dscores.options(chunk_size),
    )  # fmt: skip
    del scores
    row_tiles, finish_tiles = (chunk_size // min(t.tile, chunk_size) for t in (use.rows_by_states, use.finish))
    splits = _splits(per_group, batch * chunks * groups * row_tiles, use.programs)
    for rows, row_strides, held, other, out, ends in ((x, xs, dstates, c, db, True), (dy, dys, states, b, dc, False)):
        parts = torch.empty(splits, batch, chunks, groups, chunk_size, size, **fp32)
        rows_by_states_kernel[(row_tiles, chunks, batch * groups * splits)](
            rows, held, c, steps, total, ids, parts, dstarts, tokens, *row_strides, *cs, heads, groups, splits,
            ENDS=ends, PACKED=packed, N=size, **dims, **use.rows_by_states.options(chunk_size),
        )  # fmt: skip
        finish_kernel[(finish_tiles, chunks, batch * groups)](
            parts, dscores, other, out, tokens, other.stride(1), other.stride(0), out.stride(1), out.stride(0),
            groups, splits, score_splits, EARLIER=ends, Q=chunk_size, N=size, **use.finish.options(chunk_size),
        )  # fmt: skip
    sums = torch.empty(3, batch * chunks, heads, **fp32)
    steps_backward_kernel[(heads, chunks, batch)](
        dt, a, dt_bias, steps, dsteps, dends, dstarts, later, earlier, dcarry, dD, ddt, sums, tokens, dt.stride(1),
        dt.stride(0), ddt.stride(1), ddt.stride(0), *dt_limit, heads, Q=chunk_size, TILES=tiles, D_TILES=dx_tiles,
    )  # fmt: skip
    da, dbias, dD = (total.to(t.dtype) for total, t in zip(sums.sum(dim=1), (a, dt_bias, D), strict=True))
    return dx, ddt, da, db, dc, dD, dbias, dstate, None
