"""A mixer's inside against the recurrence it stands for, written out token by token, in PyTorch and as one node."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from video_ma2mba.modeling_video_ma2mba import mixer_mamba2
from video_ma2mba.modeling_video_ma2mba.mixer_mamba2 import CoreWeights, MixerShape
from video_ma2mba.modeling_video_ma2mba.ops_conv import CAUSAL_CONV, causal_conv_torch
from video_ma2mba.modeling_video_ma2mba.ops_norm import GATED_RMS_NORM, gated_rms_norm_torch
from video_ma2mba.modeling_video_ma2mba.ops_ssd import SSD, ssd_torch
from video_ma2mba.modeling_video_ma2mba.state_layers import Mamba2State

from .stand_in_kernels import pair_of, standing_in

EXACT = 1e-10
STATES = ("conv_state", "ssm_state")
WEIGHTS = {"conv_weight": "conv", "conv_bias": "conv_bias", "dt_bias": "dt_bias", "A_log": "A_log", "D": "D",
           "norm_weight": "norm"}  # fmt: skip


def mixer_core(**values):
    """`mixer_mamba2.mixer_core` with its weights given one by one."""
    weights = CoreWeights(**{field: values.pop(name) for name, field in WEIGHTS.items()})
    conv, ssm = (values.pop(name) for name in STATES)
    state = None if ssm is None else Mamba2State(conv, ssm)
    y, state = mixer_mamba2.mixer_core(weights=weights, state=state, **values)
    return y, *state


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
        return mixer_core(
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


# ------------------------------------------------------------------------------------------------ as one node
def conv_alone(x, weight, bias, state, seq_idx):
    return causal_conv_torch(x, weight, bias, state, None, seq_idx)[0]


def scan_alone(x, dt, a, b, c, D, dt_bias, state, seq_idx, chunk_size, dt_limit):
    if state is None:  # in backward, which must not look at it
        state = torch.zeros(len(x), *x.shape[2:], b.shape[3], dtype=x.dtype)
    return ssd_torch(x, dt, a, b, c, D, dt_bias, state, chunk_size, dt_limit, None, seq_idx)


@pytest.fixture
def kernels():
    """Kernels' interface and PyTorch's arithmetic: what is tested is the function around them."""
    state_kept = pair_of(scan_alone, into=(0, 1, 3, 4), keeps=(7,))
    with standing_in(
        {CAUSAL_CONV: pair_of(conv_alone, into=(0,)), SSD: state_kept,
         GATED_RMS_NORM: pair_of(gated_rms_norm_torch, into=(1,))}
    ):  # fmt: skip
        yield


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("tokens", [2, 3, 9])
def test_one_node_is_the_recurrence(kernels, tokens, groups):
    shape = mixer_shape(4, groups)
    assert mixer_mamba2.CoreBackends.pick(shape, torch.device("cpu"), torch.float64, tokens).fused
    assert_same(shape, mixer_inputs(shape, 2, tokens))
    assert_same(shape, mixer_inputs(shape, 2, tokens) | {"conv_bias": None})


@pytest.mark.parametrize("lengths", [(0, 1), (2, 9), (9, 3), (0, 0), (5, 20)])
def test_one_node_with_padding(kernels, lengths):
    shape = mixer_shape(4)
    assert_same(shape, mixer_inputs(shape, 2, 9), lengths=torch.tensor(lengths))


def test_one_node_with_packed_samples(kernels):
    shape = mixer_shape(4)
    ids = torch.tensor([[-2, -1, 0, 0, 0, 0, 1, 1, 1, 2, 3], [0, 0, 0, 5, 5, 5, 5, 5, 5, 5, 5]], dtype=torch.int32)
    assert_same(shape, mixer_inputs(shape, 2, 8), seq_idx=ids)


@pytest.mark.parametrize("used", ["y", "conv", "ssm"])
def test_one_node_of_which_one_result_is_used(kernels, used):
    shape = mixer_shape(4)
    values = mixer_inputs(shape, 2, 6)
    found = []
    for function in (recurrence, mixer_core):
        result = dict(zip(("y", "conv", "ssm"), function(**values, shape=shape), strict=True))[used]
        found.append(torch.autograd.grad(result.pow(2).sum(), list(values.values()), materialize_grads=True))
    for expected, own in zip(*found, strict=True):
        assert torch.allclose(own, expected, atol=1e-9)


def test_one_node_keeps_what_is_counted(kernels):
    """The projection's output, the scan's, the states given, and the weights: all else is recomputed."""
    shape = mixer_shape(4)
    values = mixer_inputs(shape, 2, 8)
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = mixer_core(**values, shape=shape)
    small = sum(values[name].nbytes for name in values if name not in ("zxbcdt", *STATES))
    state = values["ssm_state"].nbytes + values["conv_state"].nbytes
    assert sum(kept.values()) <= values["zxbcdt"].nbytes + results[0].nbytes + state + 2 * small
