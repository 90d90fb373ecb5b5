"""What calls of the operations of a Mamba-2 mixer take in bytes, by backend; needs neither torch nor a GPU.

`ops_conv`, `ops_ssd` and `ops_norm` build their backends with these numbers, plans are made with them alone. All are
bytes a token. Legend: H heads, P head width, N state size, G groups, Q chunk length.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypedDict


def _unlimited(row: int) -> int:
    return 2**62


def _kernels_longest_call(row: int) -> int:
    """Offsets of mamba-ssm's kernels are 32-bit numbers: beyond them results are wrong without any error."""
    return 2**31 // row


@dataclass(frozen=True, kw_only=True)
class CallCost:
    """What a backend's calls take.

    Attributes:
        kept_bytes, forward_bytes, backward_bytes: bytes a token, from the operation's sizes and `itemsize`, the bytes
            of a number. What a call keeps for its backward beside inputs and results; what it holds at its worst
            moment in forward (what it keeps and its results included) and in backward (beside what was kept, and the
            gradients that go in and out). 0: nothing worth counting.
        longest_call: most tokens (rows of a batch together) that one call can address, from how many numbers lie
            between two tokens of the widest input.
    """

    kept_bytes: Callable[..., float] = lambda **sizes: 0
    forward_bytes: Callable[..., float] = lambda **sizes: 0
    backward_bytes: Callable[..., float] = lambda **sizes: 0
    longest_call: Callable[[int], int] = _unlimited


@dataclass(frozen=True)
class MixerShape:
    """The sizes of one mixer that its tensors do not tell by themselves."""

    num_heads: int
    head_dim: int
    state_size: int
    n_groups: int
    conv_kernel: int
    chunk_size: int
    eps: float
    time_step_limit: tuple[float, float]

    @cached_property
    def inner(self) -> int:
        """Channels between the projections: heads times their width, H * P."""
        return self.num_heads * self.head_dim

    @cached_property
    def conv_dim(self) -> int:
        """Channels of the convolution: x, B and C together, H * P + 2 * G * N."""
        return self.inner + 2 * self.n_groups * self.state_size

    @cached_property
    def projected(self) -> int:
        """What in_proj writes per token: gate, convolution input, step sizes."""
        return self.inner + self.conv_dim + self.num_heads

    @cached_property
    def parts(self) -> list[int]:
        """The widths of gate, convolution input and step sizes."""
        return [self.inner, self.conv_dim, self.num_heads]

    @cached_property
    def scan(self) -> "SSDSizes":
        """The sizes of its scan."""
        sizes = (self.num_heads, self.head_dim, self.state_size, self.n_groups, self.chunk_size)
        return ssd_sizes(*sizes, self.time_step_limit)


class SSDSizes(TypedDict):
    """See `ops_ssd.SSD`."""

    heads: int
    head_dim: int
    state_size: int
    groups: int
    chunk: int
    dt_min: float


def ssd_sizes(
    heads: int, head_dim: int, state_size: int, groups: int, chunk: int, dt_limit: tuple[float, float]
) -> SSDSizes:
    """The sizes by which backends of `ops_ssd.SSD` are picked."""
    return {
        "heads": heads, "head_dim": head_dim, "state_size": state_size, "groups": groups, "chunk": chunk,
        "dt_min": dt_limit[0],
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------- SSD scan
def _ssd_kept(itemsize: int, heads: int, head_dim: int, state_size: int, chunk: int, **sizes: float) -> float:
    """Step sizes and decays; chunk states."""
    return 8 * heads + itemsize * heads * head_dim * state_size / chunk


def _mamba_ssm_forward(
    itemsize: int, heads: int, head_dim: int, state_size: int, groups: int, chunk: int, **sizes: float
) -> float:
    """What is kept, and the larger of: chunk states in fp32; the output with the C.B scores."""
    inner = heads * head_dim
    kept = _ssd_kept(itemsize, heads, head_dim, state_size, chunk)
    return kept + max(4 * inner * state_size / chunk, itemsize * inner + 4 * chunk * groups)


def _mamba_ssm_backward(
    itemsize: int, heads: int, head_dim: int, state_size: int, groups: int, chunk: int, **sizes: float
) -> float:
    """C.B scores, and the larger of: two sets of fp32 gradients of chunk states (state passing); one set, with
    gradients of decays, step sizes, B, C and the scores."""
    states = 4 * heads * head_dim * state_size / chunk
    products = 40 * heads + 8 * groups * state_size + 8 * chunk * groups
    return 4 * chunk * groups + states + max(states, products)


def _triton_forward(
    itemsize: int, heads: int, head_dim: int, state_size: int, groups: int, chunk: int, **sizes: float
) -> float:
    """What is kept, the C.B scores, and the larger of: chunk states in fp32; the output."""
    inner = heads * head_dim
    kept = _ssd_kept(itemsize, heads, head_dim, state_size, chunk) + 4 * chunk * groups
    return kept + max(4 * inner * state_size / chunk, itemsize * inner)


def _triton_backward(
    itemsize: int, heads: int, head_dim: int, state_size: int, groups: int, chunk: int, **sizes: float
) -> float:
    """Gradients of the chunk states, in fp32 while they pass; then those of the C.B scores (and they themselves), of
    steps and decays in tiles of 64 tokens, and the parts of B's or C's. Short calls take more: heads are dealt to more
    programs there."""
    states = heads * head_dim * state_size / chunk
    later = 8 * chunk * groups + 4 * heads * (5 + 2 * max(1, chunk // 64)) + 8 * groups * state_size
    return itemsize * states + max(4 * states, later)


def _torch_kept(
    itemsize: int, heads: int, head_dim: int, state_size: int, groups: int, chunk: int, dt_min: float = 0
) -> float:
    """Everything autograd records in `ssd_torch`, mostly the (Q, Q) decays of every head; counted in a test."""
    inner = heads * head_dim
    masks = 2 * heads * chunk + groups * chunk
    states = 2 * inner * state_size / chunk
    grouped = 0 if groups == 1 else inner  # heads of several groups are flattened into a copy
    return itemsize * (4 * inner + grouped + masks + states + 5 * heads)


def _torch_masks(itemsize: int, heads: int, chunk: int, **sizes: float) -> float:
    """The (Q, Q) decays of every head, once."""
    return itemsize * heads * chunk


SSD_COSTS = {
    "triton": CallCost(kept_bytes=_ssd_kept, forward_bytes=_triton_forward, backward_bytes=_triton_backward),
    "mamba_ssm": CallCost(
        kept_bytes=_ssd_kept,
        forward_bytes=_mamba_ssm_forward,
        backward_bytes=_mamba_ssm_backward,
        longest_call=_kernels_longest_call,
    ),
    "torch": CallCost(
        kept_bytes=_torch_kept,
        forward_bytes=_torch_masks,
        backward_bytes=lambda **sizes: 3 * _torch_masks(**sizes),
    ),
}

# ------------------------------------------------------------------------------------------- convolution and norms
CONV_COSTS = {
    "triton": CallCost(),
    "mamba_ssm": CallCost(longest_call=_kernels_longest_call),
    # Autograd keeps what the taps read and what SiLU reads; the output belongs to whoever uses it.
    "torch": CallCost(kept_bytes=lambda itemsize, channels: 2 * itemsize * channels),
}


def _add_norm_kept(itemsize: int, width: int) -> float:
    """The sum, and 1 / rms."""
    return itemsize * width + 4


def _gated_norm_kept(itemsize: int, width: int, groups: int) -> float:
    """1 / rms of every group."""
    return 4 * groups


ADD_NORM_COSTS = {
    "triton": CallCost(kept_bytes=_add_norm_kept),
    "mamba_ssm": CallCost(kept_bytes=_add_norm_kept, longest_call=_kernels_longest_call),
    "torch": CallCost(kept_bytes=lambda itemsize, width: 2 * itemsize * width),
}
GATED_NORM_COSTS = {
    "triton": CallCost(kept_bytes=_gated_norm_kept),
    "mamba_ssm": CallCost(kept_bytes=_gated_norm_kept, longest_call=_kernels_longest_call),
    "torch": CallCost(kept_bytes=lambda itemsize, width, groups: 3 * itemsize * width),
}


# ------------------------------------------------------------------------------------------------- the whole mixer
@dataclass(frozen=True)
class CoreCosts:
    """What the operations between a mixer's projections take: on kernels (`fused`), or in PyTorch all of them.

    `itemsize` is that of the inputs, from which PyTorch makes at least fp32.
    """

    conv: CallCost
    ssd: CallCost
    norm: CallCost
    fused: bool

    @classmethod
    def named(cls, name: str) -> "CoreCosts":
        """Of the backends of one name: "triton", "mamba_ssm" or "torch"."""
        return cls(CONV_COSTS[name], SSD_COSTS[name], GATED_NORM_COSTS[name], name != "torch")

    @classmethod
    def preferred(cls) -> "CoreCosts":
        """Of those that run where everything is served and installed."""
        return cls.named("triton")

    def kept_bytes(self, shape: MixerShape, itemsize: int) -> float:
        """Between forward and backward: the projection's output, the scan's, and what the operations keep. The
        convolution's output is recomputed by kernels, and kept by PyTorch."""
        norm = {"width": shape.inner, "groups": shape.n_groups}
        itemsize = itemsize if self.fused else max(4, itemsize)
        own = shape.projected + shape.inner + (0 if self.fused else shape.conv_dim)
        kept = self.conv.kept_bytes(itemsize=itemsize, channels=shape.conv_dim)
        kept += self.ssd.kept_bytes(itemsize=itemsize, **shape.scan)
        return itemsize * own + kept + self.norm.kept_bytes(itemsize=itemsize, **norm)

    def forward_bytes(self, shape: MixerShape, itemsize: int) -> float:
        """At the worst moment of a forward that keeps nothing: in the scan, or in the norm behind it."""
        itemsize = itemsize if self.fused else max(4, itemsize)
        scan, norm = self.ssd.forward_bytes(itemsize=itemsize, **shape.scan), 2.0 * itemsize * shape.inner
        if not self.fused:  # PyTorch frees nothing before the end that it would have kept
            return self.kept_bytes(shape, itemsize) + scan + norm
        norm += self.ssd.kept_bytes(itemsize=itemsize, **shape.scan)
        return itemsize * (shape.projected + shape.conv_dim) + max(scan, norm)

    def backward_bytes(self, shape: MixerShape, itemsize: int) -> float:
        """At the worst moment of backward beside what was kept: the gradients of the projection's output, of the
        convolution's (and it, computed again), of the gated norm's and of the scan's, and what the scan holds."""
        itemsize = itemsize if self.fused else max(4, itemsize)
        own = shape.projected + 2 * shape.conv_dim + 2 * shape.inner
        own += 0 if self.fused else shape.projected + shape.conv_dim + 4 * shape.inner
        return itemsize * own + self.ssd.backward_bytes(itemsize=itemsize, **shape.scan)

    def longest_call(self, shape: MixerShape) -> int:
        """Most tokens (times rows) that one call can address."""
        return min(cost.longest_call(shape.projected) for cost in (self.conv, self.ssd, self.norm))
