"""The chunked scan against the recurrence it stands for, written out token by token."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from video_ma2mba.modeling_video_ma2mba import ops_ssd, ops_ssd_mamba_ssm
from video_ma2mba.modeling_video_ma2mba.ops_ssd import (
    MixerShape,
    backend_for,
    force_backend,
    gated_rms_norm,
    mixer_core,
    mixer_core_torch,
)

EXACT = 1e-10
STATES = ("conv_state", "ssm_state")


def mixer_shape(chunk_size: int = 8, groups: int = 1, heads: int = 4, width: int = 4, **overrides) -> MixerShape:
    fields = {
        "num_heads": heads, "head_dim": 3, "state_size": 5, "n_groups": groups, "conv_kernel": width,
        "chunk_size": chunk_size, "eps": 1e-5, "time_step_limit": (0.0, math.inf),
    }  # fmt: skip
    return MixerShape(**(fields | overrides))


def mixer_inputs(shape: MixerShape, batch: int, tokens: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    values = {
        "zxbcdt": torch.randn(batch, tokens, shape.inner + shape.conv_dim + shape.num_heads, dtype=dtype),
        "conv_weight": torch.randn(shape.conv_dim, 1, shape.conv_kernel, dtype=dtype),
        "conv_bias": torch.randn(shape.conv_dim, dtype=dtype),
        "dt_bias": torch.randn(shape.num_heads, dtype=dtype) - 1,
        "A_log": torch.rand(shape.num_heads, dtype=dtype),
        "D": torch.randn(shape.num_heads, dtype=dtype),
        "norm_weight": torch.randn(shape.inner, dtype=dtype),
        "conv_state": torch.randn(batch, shape.conv_dim, shape.conv_kernel - 1, dtype=dtype),
        "ssm_state": torch.randn(batch, shape.num_heads, shape.head_dim, shape.state_size, dtype=dtype),
    }
    return {name: value.requires_grad_() for name, value in values.items()}


def recurrence(
    zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, conv_state, ssm_state, shape, lengths=None,
    seq_idx=None,
):  # fmt: skip
    """Mamba-2's mixer, one token of one row after the other: convolution over remembered inputs, one state update,
    one norm. A new sample forgets both; tokens after the last real one do nothing."""
    rows, convs, ssms = [], [], []
    heads, groups, size = shape.num_heads, shape.n_groups, shape.state_size
    for row in range(zxbcdt.shape[0]):
        window = list(conv_state[row].unbind(-1))
        owners = [0] * len(window) if seq_idx is None else seq_idx[row, : len(window)].tolist()
        h, sample, outputs = ssm_state[row], 0, []
        for t in range(zxbcdt.shape[1]):
            if lengths is not None and t >= lengths[row]:
                outputs.append(torch.zeros(shape.inner, dtype=zxbcdt.dtype))
                continue
            z, xbc, dt = zxbcdt[row, t].split([shape.inner, shape.conv_dim, heads])
            own = 0 if seq_idx is None else int(seq_idx[row, len(conv_state[row, 0]) + t])
            if own != sample:
                h, sample = torch.zeros_like(h), own
            window, owners = [*window, xbc], [*owners, own]
            seen = [
                value if owner == own else torch.zeros_like(value) for value, owner in zip(window, owners, strict=True)
            ]
            mixed = sum(value * conv_weight[:, 0, k] for k, value in enumerate(seen))
            mixed = mixed if conv_bias is None else mixed + conv_bias
            mixed = mixed / (1 + torch.exp(-mixed))
            window, owners = window[1:], owners[1:]
            x = mixed[: shape.inner].view(heads, shape.head_dim)
            b = mixed[shape.inner : shape.inner + groups * size].view(groups, size)
            c = mixed[shape.inner + groups * size :].view(groups, size)
            step = torch.log1p(torch.exp(dt + dt_bias)).clamp(*shape.time_step_limit)
            new_h, y = [], []
            for head in range(heads):
                group = head // (heads // groups)
                update = step[head] * torch.outer(x[head], b[group])
                new_h.append(torch.exp(-step[head] * torch.exp(A_log[head])) * h[head] + update)
                y.append(new_h[-1] @ c[group] + D[head] * x[head])
            h = torch.stack(new_h)
            gated = torch.cat(y) * z / (1 + torch.exp(-z))
            gated = gated.view(groups, -1)
            normed = gated / torch.sqrt((gated**2).mean(-1, keepdim=True) + shape.eps)
            outputs.append(normed.flatten() * norm_weight)
        rows.append(torch.stack(outputs))
        convs.append(torch.stack(window, -1))
        ssms.append(h)
    return torch.stack(rows), torch.stack(convs), torch.stack(ssms)


def everything(function, values: dict, shape: MixerShape, lengths=None, seq_idx=None) -> dict[str, Tensor]:
    """Outputs, states and gradients of a loss over all of them, without what stands on padding."""
    y, conv, ssm = function(**values, shape=shape, lengths=lengths, seq_idx=seq_idx)
    if lengths is not None:
        y = y * (torch.arange(y.shape[1]) < lengths[:, None]).unsqueeze(-1)
    outputs = {"y": y, "conv": conv, "ssm": ssm}
    loss = sum((v * torch.linspace(-1, 1, v.numel(), dtype=v.dtype).view(v.shape)).sum() for v in outputs.values())
    leaves = {name: value for name, value in values.items() if value is not None}
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return outputs | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def assert_same(shape: MixerShape, values: dict, **kwargs) -> None:
    expected = everything(recurrence, values, shape, **kwargs)
    found = everything(mixer_core, values, shape, **kwargs)
    for name, value in expected.items():
        error = ((found[name] - value).abs().max() / value.abs().max().clamp(min=1e-3)).item()
        assert error <= EXACT, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 256])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 15])
def test_the_scan_is_the_recurrence(tokens, groups, chunk_size):
    shape = mixer_shape(chunk_size, groups)
    assert_same(shape, mixer_inputs(shape, 2, tokens))


@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_convolution_widths(width, tokens):
    shape = mixer_shape(width=width)
    assert_same(shape, mixer_inputs(shape, 1, tokens))


@pytest.mark.parametrize("tokens", [1, 9])
def test_step_limits_and_no_convolution_bias(tokens):
    shape = mixer_shape(time_step_limit=(0.2, 0.5))
    values = mixer_inputs(shape, 1, tokens) | {"conv_bias": None}
    assert_same(shape, values)


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_no_state_is_a_state_of_zeros(tokens):
    shape = mixer_shape()
    values = mixer_inputs(shape, 2, tokens)
    zeros = {name: torch.zeros_like(values[name]) for name in STATES}
    with torch.no_grad():
        expected = mixer_core(**(values | zeros), shape=shape)
        found = mixer_core(**(values | dict.fromkeys(STATES)), shape=shape)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("chunk_size", [1, 3, 256])
@pytest.mark.parametrize("lengths", [(0, 1), (2, 9), (9, 3), (0, 0), (5, 20)])
def test_padding_leaves_states_alone(lengths, chunk_size):
    """A length beyond the segment's end means that all of it is real."""
    shape = mixer_shape(chunk_size)
    values = mixer_inputs(shape, 2, 9)
    lengths = torch.tensor(lengths)
    assert_same(shape, values, lengths=lengths)
    if lengths[0] == 0:
        _, conv, ssm = mixer_core(**values, shape=shape, lengths=lengths)
        assert torch.equal(conv[0], values["conv_state"][0])
        assert torch.equal(ssm[0], values["ssm_state"][0])


@pytest.mark.parametrize("chunk_size", [1, 2, 4, 256])
@pytest.mark.parametrize(
    "ids",
    [
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],  # one sample, that of the state
        [0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 3],  # short samples
        [0, 0, 0, 5, 5, 5, 5, 5, 5, 5, 5],  # the state belongs to nothing here
        [-2, -1, 0, 0, 0, 0, 1, 1, 1, 2, 3],  # samples began inside the remembered rows
        [-1, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8],  # every token its own sample
        [-1, -1, -1, 0, 0, 0, 0, 0, 1, 1, 1],  # the state's rows are all of other samples
    ],
)
def test_packed_samples_restart(ids, chunk_size):
    shape = mixer_shape(chunk_size)
    values = mixer_inputs(shape, 2, 8)
    seq_idx = torch.tensor([ids, [0] * 11], dtype=torch.int32)
    assert_same(shape, values, seq_idx=seq_idx)
    lengths = torch.tensor([6, 2])
    padded = torch.where(torch.arange(11) < 3 + lengths[:, None], seq_idx, seq_idx.gather(1, 2 + lengths[:, None]))
    assert_same(shape, values, seq_idx=padded, lengths=lengths)


def test_one_packed_token():
    shape = mixer_shape()
    for ids in ([0, 0, 0, 0], [0, 0, 0, 1], [-1, 0, 0, 0]):
        assert_same(shape, mixer_inputs(shape, 1, 1), seq_idx=torch.tensor([ids], dtype=torch.int32))


@pytest.mark.parametrize("kind", ["plain", "padded", "packed", "one token"])
@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_are_finite_differences(groups, kind):
    shape = mixer_shape(2, groups, heads=2, width=3, head_dim=2, state_size=2)
    tokens = 1 if kind == "one token" else 5
    values = mixer_inputs(shape, 2, tokens)
    lengths = torch.tensor([3, 5]) if kind == "padded" else None
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [-1, 0, 0, 0, 0, 1, 1]]) if kind == "packed" else None
    names = list(values)

    def function(*tensors):
        return mixer_core_torch(
            **dict(zip(names, tensors, strict=True)), shape=shape, lengths=lengths, seq_idx=seq_idx
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, tuple(values.values()), atol=1e-7, rtol=1e-5)


def test_sixteen_bits_scan_in_fp32():
    """In bf16 only inputs and outputs are rounded: the state comes back in fp32 and close to exact."""
    shape = mixer_shape(chunk_size=16, head_dim=8, state_size=16)
    values = {name: value.detach().bfloat16() for name, value in mixer_inputs(shape, 1, 200).items()}
    exact = {name: value.double() for name, value in values.items()}
    y, conv, ssm = mixer_core(**(values | {"ssm_state": values["ssm_state"].float()}), shape=shape)
    y_exact, conv_exact, ssm_exact = mixer_core(**exact, shape=shape)
    assert (y.dtype, conv.dtype, ssm.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert torch.equal(conv.double(), conv_exact)
    assert (y - y_exact).norm() <= 0.02 * y_exact.norm()
    assert (ssm - ssm_exact).norm() <= 0.02 * ssm_exact.norm()


def test_long_decays_do_not_overflow():
    """Steps and decays as large as they get: exp of a sum over a chunk must neither overflow nor give NaN."""
    shape = mixer_shape(chunk_size=256)
    values = {name: value.detach().float() for name, value in mixer_inputs(shape, 1, 600, torch.float32).items()}
    values["dt_bias"] = torch.full_like(values["dt_bias"], 20.0)
    values["A_log"] = torch.full_like(values["A_log"], math.log(16))
    values = {name: value.requires_grad_() for name, value in values.items()}
    for name, value in everything(mixer_core, values, shape).items():
        assert torch.isfinite(value).all(), name


@pytest.mark.parametrize("groups", [1, 3])
def test_gated_norm(groups):
    y, z, weight = torch.randn(2, 4, 12), torch.randn(2, 4, 12), torch.randn(12)
    found = gated_rms_norm(y, z, weight, 1e-5, groups)
    gated = (y * z * torch.sigmoid(z)).view(2, 4, groups, -1)
    expected = torch.nn.functional.rms_norm(gated, gated.shape[-1:], eps=1e-5).view(2, 4, 12) * weight
    assert torch.allclose(found, expected, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.nbytes = max([self.nbytes, *sizes])
        return result


def test_memory_grows_linearly_with_length():
    shape = mixer_shape(chunk_size=32, head_dim=8, state_size=16)
    largest = {}
    for tokens in (512, 1024, 2048):
        values = mixer_inputs(shape, 1, tokens, torch.float32)
        with LargestTensor() as mode:
            y, _, _ = mixer_core(**values, shape=shape)
            y.sum().backward()
        largest[tokens] = mode.nbytes
    assert largest[1024] <= 2.05 * largest[512]
    assert largest[2048] <= 2.05 * largest[1024]
    # Far below the (S, S, H) and (S, H, P, N) tensors of a naive version.
    assert largest[2048] < 2048 * shape.num_heads * 4 * shape.head_dim * shape.state_size


def test_new_states_are_copies():
    shape = mixer_shape()
    with torch.no_grad():
        _, conv, ssm = mixer_core(**mixer_inputs(shape, 1, 300), shape=shape)
    assert conv.untyped_storage().nbytes() == conv.nbytes
    assert ssm.untyped_storage().nbytes() == ssm.nbytes


# ---------------------------------------------------------------------------------- choice of backend
def test_cpu_tensors_run_in_pytorch_whatever_is_installed(monkeypatch):
    monkeypatch.setattr(ops_ssd_mamba_ssm, "kernels_available", lambda: True)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert backend_for(torch.zeros(1, dtype=dtype)) == "torch"


def test_the_forced_backend_runs_and_is_forgotten(monkeypatch):
    shape = mixer_shape(head_dim=8, state_size=8)
    assert shape.fits_kernels
    values = mixer_inputs(shape, 1, 3)
    monkeypatch.setattr(ops_ssd_mamba_ssm, "mixer_core_kernels", lambda *args: "kernels ran")
    with force_backend("kernels"):
        assert mixer_core(**values, shape=shape) == "kernels ran"
        with force_backend("torch"):
            assert mixer_core(**values, shape=shape) != "kernels ran"
        assert backend_for(values["zxbcdt"]) == "kernels"
    assert backend_for(values["zxbcdt"]) == "torch"
    with pytest.raises(RuntimeError, match="inside"), force_backend("kernels"):
        raise RuntimeError("inside")
    assert ops_ssd._forced_backend is None


def test_sizes_that_the_kernels_refuse_run_in_pytorch(monkeypatch):
    monkeypatch.setattr(ops_ssd_mamba_ssm, "mixer_core_kernels", lambda *args: "kernels ran")
    for odd in (mixer_shape(head_dim=8, state_size=5), mixer_shape(head_dim=3, state_size=6)):
        assert not odd.fits_kernels
        with force_backend("kernels"):
            y, _, _ = mixer_core(**mixer_inputs(odd, 1, 3), shape=odd)
        assert y.shape == (1, 3, odd.inner)


def test_an_unknown_backend_is_refused():
    with (
        pytest.raises(ValueError, match="backend='magic' is not valid: use 'torch' or 'kernels'"),
        force_backend("magic"),
    ):
        pass
