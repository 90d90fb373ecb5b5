"""The two RMS norms of `ops_norm` as Triton kernels, forward and backward.

Forward takes one row a program. Backward is one pass: as many programs as fill the GPU walk the rows and keep the
weight's gradient of theirs in registers, which a sum over the programs ends; results do not change from run to run. A
row is a power of two of channels and a rest, so that the widths of the released models leave no lane idle.
"""

import torch
from torch import Tensor

from .ops_triton_parts import kernel, sigmoid, tl, triton
from .ops_triton_settings import settings_for


@triton.jit
def _load(ptr, at, width):
    return tl.load(ptr + at, mask=at < width, other=0.0).to(tl.float32)


@triton.jit
def _ahead(ptr, row, stride, at, width, rows):
    """Numbers of a row that is computed next, as they are; zero where there is none."""
    return tl.load(ptr + row * stride + at, mask=(at < width) & (row < rows), other=0.0)


@triton.jit
def _store(ptr, at, width, value):
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=at < width)


@triton.jit
def _gate(z):
    """silu(z) and its derivative."""
    half = sigmoid(z)
    return z * half, half * (1.0 + z * (1.0 - half))


@kernel()
def add_norm_forward_kernel(
    residual_ptr, delta_ptr, squares_ptr, weight_ptr, normed_ptr, total_ptr, rstd_ptr, delta_row, width, inner, eps,
    delta_eps, ADD: tl.constexpr, PARTS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """One row: total = residual + delta, normed = total / rms * weight. PARTS: delta lacks the factor of a norm of
    `inner` channels, the sums of whose squares are given."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.arange(0, MAIN)
    x = _load(residual_ptr + row * width, first, width)
    factor = 1.0
    if PARTS > 0:
        part = tl.arange(0, triton.next_power_of_2(PARTS))
        squares = tl.load(squares_ptr + row * PARTS + part, mask=part < PARTS, other=0.0)
        factor = tl.rsqrt(tl.sum(squares) / inner + delta_eps)
    if ADD:
        x += _load(delta_ptr + row * delta_row, first, width) * factor
        x = x.to(total_ptr.dtype.element_ty).to(tl.float32)
        _store(total_ptr + row * width, first, width, x)
    squares = tl.sum(x * x)
    if REST > 0:
        later = MAIN + tl.arange(0, REST)
        x_rest = _load(residual_ptr + row * width, later, width)
        if ADD:
            x_rest += _load(delta_ptr + row * delta_row, later, width) * factor
            x_rest = x_rest.to(total_ptr.dtype.element_ty).to(tl.float32)
            _store(total_ptr + row * width, later, width, x_rest)
        squares += tl.sum(x_rest * x_rest)
    rstd = tl.rsqrt(squares / width + eps)
    tl.store(rstd_ptr + row, rstd)
    _store(normed_ptr + row * width, first, width, x * rstd * _load(weight_ptr, first, width))
    if REST > 0:
        _store(normed_ptr + row * width, later, width, x_rest * rstd * _load(weight_ptr, later, width))


@kernel(do_not_specialize=["rows"])
def add_norm_backward_kernel(
    total_ptr, weight_ptr, rstd_ptr, dnormed_ptr, dtotal_ptr, dresidual_ptr, ddelta_ptr, dweight_ptr, rows, width,
    SUM: tl.constexpr, ADD: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows of one program: gradients of residual and delta, the same numbers in their types; dweight of these rows."""
    program = tl.program_id(0).to(tl.int64)
    first = tl.arange(0, MAIN)
    weight = _load(weight_ptr, first, width)
    dweight = tl.zeros([MAIN], tl.float32)
    if REST > 0:
        later = MAIN + tl.arange(0, REST)
        weight_rest = _load(weight_ptr, later, width)
        dweight_rest = tl.zeros([REST], tl.float32)
    for row in tl.range(program, rows, tl.num_programs(0), num_stages=STAGES):
        start = row * width
        rstd = tl.load(rstd_ptr + row)
        x = _load(total_ptr + start, first, width) * rstd
        dn = _load(dnormed_ptr + start, first, width)
        if SUM:
            dsum = _load(dtotal_ptr + start, first, width)
        dweight += dn * x
        dn *= weight
        product = tl.sum(dn * x)
        if REST > 0:
            x_rest = _load(total_ptr + start, later, width) * rstd
            dn_rest = _load(dnormed_ptr + start, later, width)
            if SUM:
                dsum_rest = _load(dtotal_ptr + start, later, width)
            dweight_rest += dn_rest * x_rest
            dn_rest *= weight_rest
            product += tl.sum(dn_rest * x_rest)
        product /= width
        dx = (dn - x * product) * rstd
        if SUM:
            dx += dsum
        _store(dresidual_ptr + start, first, width, dx)
        if ADD:
            _store(ddelta_ptr + start, first, width, dx)
        if REST > 0:
            dx_rest = (dn_rest - x_rest * product) * rstd
            if SUM:
                dx_rest += dsum_rest
            _store(dresidual_ptr + start, later, width, dx_rest)
            if ADD:
                _store(ddelta_ptr + start, later, width, dx_rest)
    _store(dweight_ptr + program * width, first, width, dweight)
    if REST > 0:
        _store(dweight_ptr + program * width, later, width, dweight_rest)


@kernel()
def gated_norm_forward_kernel(
    y_ptr, z_ptr, weight_ptr, out_ptr, rstd_ptr, y_row, z_row, out_row, width, eps, MAIN: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    """One group of channels of one row: y * silu(z) / rms * weight."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    y_ptr += row * y_row + group * width
    z_ptr += row * z_row + group * width
    out_ptr += row * out_row + group * width
    weight_ptr += group * width
    first = tl.arange(0, MAIN)
    gate, _ = _gate(_load(z_ptr, first, width))
    x = _load(y_ptr, first, width) * gate
    squares = tl.sum(x * x)
    if REST > 0:
        later = MAIN + tl.arange(0, REST)
        gate_rest, _ = _gate(_load(z_ptr, later, width))
        x_rest = _load(y_ptr, later, width) * gate_rest
        squares += tl.sum(x_rest * x_rest)
    rstd = tl.rsqrt(squares / width + eps)
    tl.store(rstd_ptr + row * tl.num_programs(1) + group, rstd)
    _store(out_ptr, first, width, x * rstd * _load(weight_ptr, first, width))
    if REST > 0:
        _store(out_ptr, later, width, x_rest * rstd * _load(weight_ptr, later, width))


@kernel(do_not_specialize=["rows"])
def gated_norm_backward_kernel(
    y_ptr, z_ptr, weight_ptr, rstd_ptr, dout_ptr, dy_ptr, dz_ptr, dweight_ptr, y_row, z_row, dout_row, dz_row, rows,
    width, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Rows of one program, one group of channels: gradients of y and z, and of the weight from these rows. The next
    row is on its way while one is computed."""
    program, group, groups = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    y_ptr += group * width
    z_ptr += group * width
    dout_ptr += group * width
    dy_ptr += group * width
    dz_ptr += group * width
    weight_ptr += group * width
    first = tl.arange(0, MAIN)
    weight = _load(weight_ptr, first, width)
    dweight = tl.zeros([MAIN], tl.float32)
    y_next = _ahead(y_ptr, program, y_row, first, width, rows)
    z_next = _ahead(z_ptr, program, z_row, first, width, rows)
    dn_next = _ahead(dout_ptr, program, dout_row, first, width, rows)
    if REST > 0:
        later = MAIN + tl.arange(0, REST)
        weight_rest = _load(weight_ptr, later, width)
        dweight_rest = tl.zeros([REST], tl.float32)
        y_rest_next = _ahead(y_ptr, program, y_row, later, width, rows)
        z_rest_next = _ahead(z_ptr, program, z_row, later, width, rows)
        dn_rest_next = _ahead(dout_ptr, program, dout_row, later, width, rows)
    for row in range(program, rows, tl.num_programs(0)):
        rstd = tl.load(rstd_ptr + row * groups + group)
        following = row + tl.num_programs(0)
        y, dn = y_next.to(tl.float32), dn_next.to(tl.float32)
        gate, slope = _gate(z_next.to(tl.float32))
        y_next = _ahead(y_ptr, following, y_row, first, width, rows)
        z_next = _ahead(z_ptr, following, z_row, first, width, rows)
        dn_next = _ahead(dout_ptr, following, dout_row, first, width, rows)
        x = y * gate * rstd
        dweight += dn * x
        dn *= weight
        product = tl.sum(dn * x)
        if REST > 0:
            y_rest, dn_rest = y_rest_next.to(tl.float32), dn_rest_next.to(tl.float32)
            gate_rest, slope_rest = _gate(z_rest_next.to(tl.float32))
            y_rest_next = _ahead(y_ptr, following, y_row, later, width, rows)
            z_rest_next = _ahead(z_ptr, following, z_row, later, width, rows)
            dn_rest_next = _ahead(dout_ptr, following, dout_row, later, width, rows)
            x_rest = y_rest * gate_rest * rstd
            dweight_rest += dn_rest * x_rest
            dn_rest *= weight_rest
            product += tl.sum(dn_rest * x_rest)
        product /= width
        dx = (dn - x * product) * rstd
        _store(dy_ptr + row * y_row, first, width, dx * gate)
        _store(dz_ptr + row * dz_row, first, width, dx * y * slope)
        if REST > 0:
            dx_rest = (dn_rest - x_rest * product) * rstd
            _store(dy_ptr + row * y_row, later, width, dx_rest * gate_rest)
            _store(dz_ptr + row * dz_row, later, width, dx_rest * y_rest * slope_rest)
    dweight_ptr += (program * groups + group) * width
    _store(dweight_ptr, first, width, dweight)
    if REST > 0:
        _store(dweight_ptr, later, width, dweight_rest)


@kernel(do_not_specialize=["count"])
def sum_kernel(wide_ptr, narrow_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """wide + narrow for a block of numbers."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(wide_ptr + at, mask=at < count, other=0.0)
    total += tl.load(narrow_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total, mask=at < count)


def _pieces(width: int) -> dict[str, int]:
    """The largest power of two within a row, and what is left rounded up to one."""
    main = 1 << (width.bit_length() - 1)
    rest = width - main
    return {"MAIN": main, "REST": max(16, 1 << (rest - 1).bit_length()) if rest else 0}


def _programs(device: torch.device, rows: int, each: int) -> int:
    """How many walk the rows: `each` a multiprocessor."""
    units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return max(1, min(rows, units * each))


def _rows(x: Tensor) -> Tensor:
    """(…, D) as rows (R, D) of neighbouring numbers, any distance apart."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def add_norm_forward(
    residual: Tensor, delta: Tensor | None, weight: Tensor, *, eps: float, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
    """`add_rms_norm` for the registry of operations: keeps the sum, 1 / rms, and an empty tensor of delta's type."""
    normed, total, rstd = _add_norm(residual, delta, None, 1, weight, eps, eps, dtype)
    kept = (total, rstd) if delta is None else (total, rstd, delta.new_empty(0))
    return (normed, total.view(residual.shape)), kept


def add_pending_norm(
    residual: Tensor, delta: Tensor, squares: Tensor, inner: int, delta_eps: float, weight: Tensor, eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`ops_norm.add_rms_norm` of a `PendingDelta`."""
    normed, total, _ = _add_norm(residual, delta, squares.contiguous(), inner, weight, eps, delta_eps, dtype)
    return normed, total.view(residual.shape)


def _add_norm(
    residual: Tensor, delta: Tensor | None, squares: Tensor | None, inner: int, weight: Tensor, eps: float,
    delta_eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Normed like residual, the sum and 1 / rms by rows."""
    width = residual.shape[-1]
    rows = residual.reshape(-1, width).contiguous()
    changes = None if delta is None else _rows(delta)
    total = rows if changes is None else torch.empty_like(rows)
    normed = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    rstd = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    if len(rows):
        add_norm_forward_kernel[(len(rows),)](
            rows, changes, squares, weight, normed, total, rstd, 0 if changes is None else changes.stride(0), width,
            inner, eps, delta_eps, ADD=changes is not None, PARTS=0 if squares is None else squares.shape[-1],
            num_warps=settings_for(rows.device).add_norm[0], **_pieces(width),
        )  # fmt: skip
    return normed.view(residual.shape), total, rstd


def add_norm_backward(
    tensors: tuple[Tensor | None, ...],
    kept: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, Tensor | None],
    into: None = None,
    *,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """Gradients of residual, delta (in its type) and weight."""
    weight, (total, rstd, *like_delta) = tensors[2], kept
    assert weight is not None
    dnormed, dtotal = gradients
    shape = next(g.shape for g in gradients if g is not None)
    width = total.shape[-1]
    if dnormed is None:  # only the sum was used
        dnormed = torch.zeros_like(total, dtype=dtype)
    dnormed = dnormed.reshape(-1, width).contiguous()
    dtotal = None if dtotal is None else dtotal.reshape(-1, width).contiguous()
    _, warps, each, stages = settings_for(total.device).add_norm
    programs = _programs(total.device, len(total), each)
    dresidual = torch.empty_like(total)
    ddelta = torch.empty(total.shape, dtype=like_delta[0].dtype, device=total.device) if like_delta else None
    dweight = (torch.empty if len(total) else torch.zeros)(programs, width, dtype=torch.float32, device=total.device)
    if len(total):
        add_norm_backward_kernel[(programs,)](
            total, weight, rstd, dnormed, dtotal, dresidual, ddelta, dweight, len(total), width,
            SUM=dtotal is not None, ADD=ddelta is not None, num_warps=warps, STAGES=stages, **_pieces(width),
        )  # fmt: skip
    ddelta = None if ddelta is None else ddelta.view(shape)
    return dresidual.view(shape), ddelta, dweight.sum(dim=0).to(weight.dtype)


def gated_norm_forward(
    y: Tensor, z: Tensor, weight: Tensor, *, eps: float, groups: int
) -> tuple[tuple[Tensor], tuple[Tensor]]:
    """`gated_rms_norm` for the registry of operations: keeps 1 / rms."""
    inner, rows, gates = y.shape[-1], _rows(y), _rows(z)
    out = torch.empty(rows.shape, dtype=y.dtype, device=y.device)
    rstd = torch.empty(len(rows), groups, dtype=torch.float32, device=y.device)
    if len(rows):
        gated_norm_forward_kernel[(len(rows), groups)](
            rows, gates, weight, out, rstd, rows.stride(0), gates.stride(0), inner, inner // groups, eps,
            num_warps=settings_for(y.device).gated_norm[0], **_pieces(inner // groups),
        )  # fmt: skip
    return (out.view(y.shape),), (rstd,)


def gated_norm_backward(
    tensors: tuple[Tensor, Tensor, Tensor],
    kept: tuple[Tensor],
    gradients: tuple[Tensor],
    into: Tensor | None = None,
    *,
    eps: float,
    groups: int,
) -> tuple[Tensor | None, ...]:
    """Gradients of y, z (written to `into` if given) and weight."""
    y, z, weight = tensors
    inner, width = y.shape[-1], y.shape[-1] // groups
    rows, gates, dout = y.reshape(-1, inner).contiguous(), _rows(z), _rows(gradients[0])
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device) if into is None else into
    dgates = dz.view(-1, inner)
    dy = torch.empty_like(rows)
    _, warps, each = settings_for(y.device).gated_norm
    programs = _programs(y.device, len(rows), each)
    dweight = (torch.empty if len(rows) else torch.zeros)(programs, inner, dtype=torch.float32, device=y.device)
    if len(rows):
        gated_norm_backward_kernel[(programs, groups)](
            rows, gates, weight, kept[0], dout, dy, dgates, dweight, inner, gates.stride(0), dout.stride(0),
            dgates.stride(0), len(rows), width, num_warps=warps, **_pieces(width),
        )  # fmt: skip
    return dy.view(y.shape), dz, dweight.sum(dim=0).to(weight.dtype)


def mixed_sum(wide: Tensor, narrow: Tensor, out: Tensor) -> None:
    """`ops_norm.mixed_sum`, of tensors that are dense and as large."""
    count, block = wide.numel(), 2048
    sum_kernel[(triton.cdiv(count, block),)](wide, narrow, out, count, BLOCK=block, num_warps=4)
