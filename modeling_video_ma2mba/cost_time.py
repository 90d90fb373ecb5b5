"""How long a training step takes: a few measured constants, scaled by the sizes of the model and the plan.

Every plan computes nearly the same (forward, one recomputation, backward); plans differ in how well a cell fills the
GPU, in the work per cell, and in copies to the host that computation cannot hide. Legend as in `cost_memory`.
"""

import time
from dataclasses import dataclass, replace
from typing import Any

from .cost_memory import StackShape, Workload
from .cost_vision import VisionLoad
from .recompute_plan import RecomputePlan


@dataclass(frozen=True)
class MeasuredCosts:
    """Constants measured on one kind of GPU: those of the language model by `benchmarks/planner_accuracy.py --fit` (of
    the scan and a layer with the kernels of 2026-11-28, from what docs/speed.md tells, others a week before), those
    of the tower and of the host by `benchmarks/host_speed.py --compare --fit`.

    Attributes:
        matmul: multiply-adds count two; operations per second in matrix products (16 bits).
        scan_forward, scan_backward: seconds per token and inner channel of all that is not a matrix product.
        launch_forward, launch_backward: seconds that the CPU needs to launch one layer; a layer is never faster.
        layer: seconds of one pass over a layer that do not depend on its tokens (kernels that start and drain).
        cell: seconds around every cell, in forward and again in backward.
        device_memory, host_copy: bytes per second of GPU memory, and to pinned host memory in one direction.
        tower, tower_backward: operations per second that a vision tower reaches, forward and in backward.
        tower_launch_forward, tower_launch_backward: as for the layers of the language model.
        launch: seconds that the host on which the language model was measured needed to launch one operation. It was
            not measured then, but fitted: with it the constants hold on a host whose launches were (host_speed.csv).
        page_lock: bytes per second that are page-locked when host memory is used for the first time. Hosts differ (2.0
            to 8.6 GB/s), and a first step does a part of it beside its own work.
        slack: part of the predicted peak that PyTorch's allocator loses to fragments.
        context: bytes that the CUDA context and loaded kernels take from every GPU.
    """

    hardware: str
    date: str
    matmul: float
    scan_forward: float
    scan_backward: float
    launch_forward: float
    launch_backward: float
    layer: float
    cell: float
    device_memory: float
    host_copy: float
    tower: float
    tower_backward: float
    tower_launch_forward: float
    tower_launch_backward: float
    launch: float
    page_lock: float
    slack: float
    context: int

    def on_host(self, launch: float, share: float = 1.0) -> "MeasuredCosts":
        """The same GPU in a machine whose CPU needs `launch` seconds to launch an operation.

        Args:
            share: part of its core that the process gets. While another has it the GPU runs dry, whatever it computes
                (host_speed.csv, half a core: parts of a step took 2.0 times as long, 1.4 to 2.6).

        Raises:
            ValueError: `launch` is not between a tenth of a microsecond and a tenth of a millisecond.
        """
        if not 1e-7 <= launch <= 1e-4:
            raise ValueError(f"launch_us={1e6 * launch:g} is not valid: a launch takes some microseconds")
        on_cpu = {name: getattr(self, name) * launch / self.launch for name in _ON_CPU}
        longer = {name: getattr(self, name) / share for name in _SECONDS} | {n: on_cpu[n] / share for n in _ON_CPU}
        slower = {name: getattr(self, name) * share for name in _PER_SECOND}
        return replace(self, launch=launch, **longer, **slower)


_ON_CPU = ("launch_forward", "launch_backward", "cell", "tower_launch_forward", "tower_launch_backward")
_SECONDS = ("scan_forward", "scan_backward", "layer")
_PER_SECOND = ("matmul", "device_memory", "host_copy", "tower", "tower_backward")
H200 = MeasuredCosts(
    hardware="NVIDIA H200",
    date="2026-11-28",
    matmul=757e12,
    scan_forward=1.59e-11,
    scan_backward=2.55e-11,
    launch_forward=2e-4,
    launch_backward=2.8e-3,
    layer=8.4e-5,
    cell=2e-4,
    device_memory=3.5e12,
    host_copy=45e9,
    tower=374e12,
    tower_backward=350e12,
    tower_launch_forward=3.75e-4,
    tower_launch_backward=1.5e-3,
    launch=6.66e-6,
    page_lock=4.0e9,
    slack=0.04,
    context=600 << 20,
)


@dataclass(frozen=True)
class HostPace:
    """What `measure_host` found: seconds of CPU time that launching one PyTorch operation takes, and the part of its
    core that the process got (about 1 where nobody else wants it)."""

    launch: float
    share: float


def measure_host(device: Any = "cuda", seconds: float = 1.0) -> HostPace:
    """How fast this host launches PyTorch operations, now: the mean over many tiny sums.

    Neither the fastest nor the usual: a host that others use as well stands still for some milliseconds at a time, and
    is as slow as it is on average.

    Args:
        seconds: to measure for.
    """
    import torch

    x, launches, runs, began, worked = torch.zeros(16, device=device), 1000, -1, 0.0, 0.0
    while runs < 1 or time.perf_counter() - began < seconds:
        if runs == 0:  # the first loads the kernel
            began, worked = time.perf_counter(), time.thread_time()
        for _ in range(launches):
            x.add_(1)
        if x.is_cuda:
            torch.cuda.synchronize(device)
        runs += 1
    passed, worked = time.perf_counter() - began, time.thread_time() - worked
    share = min(1.0, worked / passed) if worked > 0 else 1.0  # some systems' clocks of threads stand still
    return HostPace(passed * share / (runs * launches), share)


def measure_launch(device: Any = "cuda", seconds: float = 1.0) -> float:
    """Seconds that one launch takes on this host, now, with those in which others had its core (`measure_host`)."""
    pace = measure_host(device, seconds)
    return pace.launch / pace.share


def stack_seconds(shape: StackShape, work: Workload, plan: RecomputePlan | None, costs: MeasuredCosts = H200) -> float:
    """Seconds of forward and backward of the stack; `plan=None` recomputes nothing."""
    if plan is None:
        forward, backward = _layer_seconds(shape, work, work.batch * work.tokens, costs)
        return shape.layers * (forward + backward)
    blocks = -(-shape.layers // plan.layers_per_block)
    full, rest = divmod(work.tokens, plan.segment_length)
    lengths = [(full, plan.segment_length)] + ([(1, rest)] if rest else [])
    several = full + bool(rest) > 1
    seconds = 0.0
    for count, length in lengths:
        first, second = cell_seconds(shape, work, plan, length, several, costs)
        seconds += count * blocks * (first + second)
        if work.ranks > 1 and length == lengths[0][1]:  # cells that a rank waits for
            cells = full + bool(rest) if work.stretches else max(1, -(-work.segment // length))
            seconds += (work.ranks - 1) * cells * (first + second)
    return seconds


def cell_seconds(
    shape: StackShape, work: Workload, plan: RecomputePlan, length: int, several: bool, costs: MeasuredCosts = H200
) -> tuple[float, float]:
    """Seconds of an average cell over `length` tokens of each row: in forward, and in backward with recomputation.

    Args:
        several: there is more than one segment.
    """
    blocks = -(-shape.layers // plan.layers_per_block)
    rows = work.batch * length
    replayed = work.replays(shape, plan) and length == plan.segment_length
    if replayed:  # nothing waits for the host, but for what is around a cell
        costs = replace(costs, launch_forward=0.0, launch_backward=0.0)
    forward, backward = _layer_seconds(shape, work, rows, costs)
    layers = shape.layers / blocks  # of an average cell
    first = layers * forward + costs.cell
    second = layers * (forward + backward) + costs.cell
    # Recomputing a cell leaves the product of its last out_proj away (`mixer_mamba2._UnreadLinear`).
    second -= 2 * shape.width * shape.inner * rows / costs.matmul if shape.kernels else 0
    if several:  # read the sums and the new gradients, write the sums
        second += layers * work.layer_parameters * (8 + work.weight_bytes) / costs.device_memory
    if replayed:  # what graphs read and write is copied: x, the stream and what is added to it, and their gradients
        copied = 2 * rows * shape.width * (2 * shape.stream + shape.compute) / costs.device_memory
        first, second = first + copied, second + 2 * copied
    if plan.offload:
        stream = shape.stream * shape.width * rows if blocks > 1 else 0
        states = layers * work.batch * shape.state_bytes if several else 0
        first = max(first, (stream + states) / costs.host_copy)
        second = max(second, (2 * stream + states) / costs.host_copy)
    return first, second


def _layer_seconds(shape: StackShape, work: Workload, rows: int, costs: MeasuredCosts) -> tuple[float, float]:
    """Forward and backward of one layer over `rows` tokens."""
    products = 2 * shape.width * (shape.projected + shape.inner) * rows / costs.matmul
    forward = products + shape.inner * costs.scan_forward * rows
    backward = (2 if work.projections_train else 1) * products + shape.inner * costs.scan_backward * rows
    return max(forward + costs.layer, costs.launch_forward), max(backward + costs.layer, costs.launch_backward)


def vision_seconds(vision: VisionLoad, costs: MeasuredCosts = H200) -> float:
    """Seconds of the tower: once forward; again, and backward, when it trains."""
    chunks, rest = divmod(vision.frames, vision.together)
    seconds = 0.0
    for count, frames in ((chunks, vision.together), (1, rest)):
        layer = frames * vision.tower.operations / vision.tower.layers / costs.tower
        forward = max(layer, costs.tower_launch_forward) if frames else 0.0
        backward = max(2 * layer * costs.tower / costs.tower_backward, costs.tower_launch_backward) if frames else 0.0
        seconds += count * vision.tower.layers * (2 * forward + backward if vision.tower_trains else forward)
    return seconds
