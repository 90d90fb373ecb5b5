"""Which backend runs a call, and what is asked of backends."""

import importlib.metadata
import sys
import types

import pytest
import torch

from video_ma2mba.modeling_video_ma2mba import ops_mamba_ssm, ops_registry
from video_ma2mba.modeling_video_ma2mba.mixer_mamba2 import CoreBackends, MixerShape
from video_ma2mba.modeling_video_ma2mba.ops_conv import CAUSAL_CONV
from video_ma2mba.modeling_video_ma2mba.ops_norm import ADD_RMS_NORM, GATED_RMS_NORM
from video_ma2mba.modeling_video_ma2mba.ops_registry import Backend, Operation, force_backend, run
from video_ma2mba.modeling_video_ma2mba.ops_ssd import SSD, ssd_sizes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZES = ssd_sizes(4, 16, 16, 1, 256, (0.0, float("inf")))
SIXTEEN = (torch.bfloat16, torch.float16)


def shape(head_dim: int = 16, state_size: int = 16, limit: tuple[float, float] = (0.0, float("inf"))) -> MixerShape:
    return MixerShape(4, head_dim, state_size, 1, 4, 256, 1e-5, limit)


@pytest.fixture
def installed(monkeypatch):
    """As on an NVIDIA GPU, and where both kernel packages import."""
    for operation in (CAUSAL_CONV, SSD, ADD_RMS_NORM, GATED_RMS_NORM):
        backends = tuple(
            Backend(**{**vars(backend), "available": lambda: True}) for backend in operation.backends
        )  # fmt: skip
        monkeypatch.setattr(operation, "backends", backends)


@pytest.mark.parametrize("dtype", [*SIXTEEN, torch.float32, torch.float64])
def test_a_call_goes_where_it_is_served(installed, dtype):
    """CPU tensors run in PyTorch whatever is installed, and so do types that the kernels would round."""
    expected = "triton" if dtype in SIXTEEN else "torch"
    for operation, sizes in (
        (SSD, SIZES), (CAUSAL_CONV, {"channels": 32, "offset": 64, "width": 4}), (ADD_RMS_NORM, {"width": 3}),
        (GATED_RMS_NORM, {"width": 32, "groups": 1}),
    ):  # fmt: skip
        assert operation.pick(CPU, dtype, 10, **sizes).name == "torch"
        assert operation.pick(CUDA, dtype, 10, **sizes).name == expected
    assert CoreBackends.pick(shape(), CUDA, dtype, 10).fused == (dtype in SIXTEEN)


def test_sizes_that_our_kernels_do_not_serve_go_to_the_packages(installed):
    """A head width that is no power of two; a wide convolution."""
    sizes = ssd_sizes(4, 24, 16, 1, 256, (0.0, float("inf")))
    assert SSD.pick(CUDA, torch.bfloat16, 10, **sizes).name == "mamba_ssm"
    names = [b.name for b in CoreBackends.pick(shape(head_dim=24), CUDA, torch.bfloat16, 10)]
    assert names == ["triton", "mamba_ssm", "triton"]


def test_without_a_gpu_everything_runs_in_pytorch():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert SSD.pick(CUDA, torch.bfloat16, 10, **SIZES).name == "torch"
    assert not CoreBackends.pick(shape(), CUDA, torch.bfloat16, 10).fused


@pytest.mark.parametrize("forced", [None, "triton", "mamba_ssm"])
@pytest.mark.parametrize(
    ("own", "tokens", "padded"),
    [
        (shape(), 1, False),  # a single token
        (shape(limit=(0.01, 0.1)), 10, True),  # padding would take steps of the least size
    ],
)
def test_what_no_kernels_can_compute_runs_in_pytorch(installed, own, tokens, padded, forced):
    with force_backend(forced):
        assert CoreBackends.pick(shape(), CUDA, torch.bfloat16, 10, padded=padded).fused
        picked = CoreBackends.pick(own, CUDA, torch.bfloat16, tokens, padded=padded)
    assert [backend.name for backend in picked] == ["torch"] * 3


@pytest.mark.parametrize(
    "own",
    [
        shape(head_dim=3, state_size=6),  # gate and convolution input are not aligned
        shape(state_size=5),  # channels are no multiple of 8
    ],
)
@pytest.mark.parametrize("forced", ["triton", "mamba_ssm"])
def test_what_some_kernels_cannot_compute_runs_in_pytorch_when_they_are_asked_for(installed, own, forced):
    """Ours want powers of two in the scan, the packages' alignment in the convolution."""
    with force_backend(forced):
        picked = CoreBackends.pick(own, CUDA, torch.bfloat16, 10)
    assert [backend.name for backend in picked] == ["torch"] * 3
    assert CoreBackends.pick(own, CUDA, torch.bfloat16, 10).fused  # each where it can


def test_the_forced_backend_runs_and_is_forgotten():
    def names() -> set[str]:
        return {ADD_RMS_NORM.pick(CPU, torch.float32, 3, width=3).name}

    with force_backend("mamba_ssm"):
        assert names() == {"mamba_ssm"}
        with force_backend("torch"):
            assert names() == {"torch"}
        with force_backend(None):
            assert names() == {"torch"}
        assert names() == {"mamba_ssm"}
    assert names() == {"torch"}
    with pytest.raises(RuntimeError, match="inside"), force_backend("mamba_ssm"):
        raise RuntimeError("inside")
    assert ops_registry._forced is None


def test_an_unknown_backend_is_refused():
    with (
        pytest.raises(ValueError, match=r"backend='magic' is not valid: use .*'torch' or .*'mamba_ssm'"),
        force_backend("magic"),
    ):
        pass
    with pytest.raises(ValueError, match="ssd has no backend 'magic'"):
        SSD.named("magic")


def test_preference_is_the_order_of_the_list_and_a_missing_name_means_pytorch():
    """What a new backend needs: an entry in a list."""
    slow = Backend("torch", lambda x: 2 * x)
    quick = Backend("quick", lambda x: 2 * x, dtypes=(torch.float32,), fits=lambda call: call.tokens > 2)
    double = Operation("double", (quick, slow))
    assert double.pick(CPU, torch.float32, 3).name == "quick"
    assert double.pick(CPU, torch.float32, 2).name == "torch"
    assert double.pick(CPU, torch.float64, 3).name == "torch"
    with force_backend("quick"):
        assert double.pick(CPU, torch.float64, 3).name == "quick"
        assert SSD.pick(CPU, torch.float64, 3, **SIZES).name == "torch"
    assert run(slow, torch.ones(1)).item() == 2


def test_a_pair_of_functions_is_differentiable():
    """Backward gets the tensors it needs, what forward kept, None for results nobody used, and the options."""
    seen = []

    def forward(x, y, *, power):
        return (x**power, x * y), (x + 1,)

    def backward(tensors, kept, gradients, into=None, *, power):
        seen.append((tensors, kept, gradients))
        first, second = gradients
        x, y = kept[0] - 1, tensors[1]
        dx = 0 if first is None else first * power * x ** (power - 1)
        dy = None if second is None else second * x
        return dx if second is None else dx + second * y, dy

    backend = Backend("pair", forward, backward, needs=(1,))
    x, y = torch.tensor(3.0, requires_grad=True), torch.tensor(5.0, requires_grad=True)
    cube, product = run(backend, x, y, power=3)
    assert (cube.item(), product.item()) == (27, 15)
    assert torch.autograd.grad(cube, [x, y], retain_graph=True, allow_unused=True) == (27, None)
    assert seen[0][0][0] is None
    assert seen[0][1][0].item() == 4
    assert seen[0][2][1] is None
    assert torch.autograd.grad(cube + product, [x, y]) == (32, 3)


# ------------------------------------------------------------------------------------------------ foreign packages
@pytest.fixture
def pretended(monkeypatch):
    """The kernel packages as modules without contents, in versions to be set."""
    versions = {"mamba-ssm": "2.3.2.post1", "causal-conv1d": "1.7.0"}
    for name in (
        *("causal_conv1d", "causal_conv1d.cpp_functions", "mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"),
        *("mamba_ssm.ops.triton.layer_norm", "mamba_ssm.ops.triton.ssd_combined"),
    ):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    ops_mamba_ssm.kernels_available.cache_clear()
    yield versions
    ops_mamba_ssm.kernels_available.cache_clear()


def test_tested_versions_are_used(pretended, recwarn):
    assert ops_mamba_ssm.kernels_available()
    assert not recwarn.list


@pytest.mark.parametrize(
    ("package", "version"), [("mamba-ssm", "2.2.6"), ("mamba-ssm", "3.0"), ("causal-conv1d", "1.8.1")]
)
def test_other_versions_warn_once_and_are_not_used(pretended, package, version):
    pretended[package] = version
    with pytest.warns(UserWarning, match=rf"{package} {version} is installed.*using PyTorch instead"):
        assert not ops_mamba_ssm.kernels_available()
    assert not ops_mamba_ssm.kernels_available()  # warnings are errors here


def test_a_package_without_metadata_says_its_version_itself(pretended, monkeypatch):
    def unknown(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", unknown)
    sys.modules["mamba_ssm"].__version__, sys.modules["causal_conv1d"].__version__ = "2.3.0", "1.7.2"
    assert ops_mamba_ssm.kernels_available()
    ops_mamba_ssm.kernels_available.cache_clear()
    del sys.modules["causal_conv1d"].__version__
    with pytest.warns(UserWarning, match="causal-conv1d of unknown version"):
        assert not ops_mamba_ssm.kernels_available()
