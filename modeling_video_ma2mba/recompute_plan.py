"""What Multi-Axis Gradient Checkpointing is asked to do (settings) and what it will do (a plan), as plain values."""

import math
from dataclasses import dataclass, replace

from .recompute_schedule import ORDERS

# Logits of one chunk: 2**25 numbers, 128 MB in fp32.
LOGITS_PER_CHUNK = 2**25
# Copies to the host in flight before the computation waits for the oldest: bounds the device memory that they hold.
COPIES_IN_FLIGHT = 3
METHODS = ("multi_axis", "per_layer", "sqrt")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

MOST_REPLAYED_NUMBERS = 1 << 24
"""Numbers of a cell's input, B s D, up to which cells are captured."""
FEWEST_REPLAYED_SEGMENTS = 4


@dataclass(frozen=True)
class RecomputePlan:
    """A cut of the (layer x time) plane into cells.

    Attributes:
        layers_per_block: layers of one cell (l in the paper).
        segment_length: tokens of one cell (s in the paper); at least the sequence length means one segment.
        offload: whether what is kept (block inputs, border states) lives in pinned host memory, not on the GPU.
        forward_order, backward_order: in which order cells run, by name (`recompute_schedule.ORDERS`; backward runs
            it in reverse). All give the same gradients.
        band: where ranks share a step, which follows an order of their own, gradients of parameters are summed up for
            about so many blocks at a time (`recompute_schedule.wavefront`); 0: for all of them.
    """

    layers_per_block: int
    segment_length: int
    offload: bool = False
    forward_order: str = "segment_major"
    backward_order: str = "block_major"
    band: int = 0

    def __post_init__(self) -> None:
        for field in ("layers_per_block", "segment_length"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field}={value!r} is not valid: it must be an integer of at least 1")
        for field in ("forward_order", "backward_order"):
            if getattr(self, field) not in ORDERS:
                raise ValueError(f"{field}={getattr(self, field)!r} is not valid: use one of {sorted(ORDERS)}")

    def blocks(self, layers: int) -> list[range]:
        """Layer indices of each block, bottom to top."""
        step = self.layers_per_block
        return [range(i, min(i + step, layers)) for i in range(0, layers, step)]

    def segments(self, tokens: int) -> list[tuple[int, int]]:
        """First and past-the-last token of each segment, in time order."""
        step = self.segment_length
        return [(i, min(i + step, tokens)) for i in range(0, tokens, step)]

    def replayed(self, rows: int, tokens: int, width: int) -> bool:
        """Whether full-length cells are CUDA graphs, on a GPU (`recompute_graph`): small ones, whose kernels would not
        outlast their launch, and enough of them to be worth the capture.

        Args:
            rows, tokens, width: B, S and D of the stack's input.
        """
        enough = tokens >= FEWEST_REPLAYED_SEGMENTS * self.segment_length
        return enough and rows * self.segment_length * width <= MOST_REPLAYED_NUMBERS

    def __str__(self) -> str:
        place = "in host memory" if self.offload else "on the GPU"
        cells = f"{self.layers_per_block} layers x {self.segment_length} tokens a cell, kept {place}"
        cells += f", gradients of {self.band} blocks at a time" if self.band else ""
        orders = (self.forward_order, self.backward_order)
        usual = orders == (RecomputePlan.forward_order, RecomputePlan.backward_order)
        return cells if usual else f"{cells}, forward {orders[0]}, backward {orders[1]}"


@dataclass(frozen=True)
class RecomputeSettings:
    """What the user asked for; anything left at None is chosen per batch.

    Attributes:
        method: "multi_axis"; "per_layer" and "sqrt" are the classical plans (whole sequence, every layer or every
            square root of the number of layers) run by the same engine.
        segment_length, layers_per_block, offload, forward_order, backward_order: fix parts of the plan.
        memory_budget: GPU bytes the step may use above weights, gradients and optimizer state (a number of bytes, or
            a text such as "8GB"). None takes what is free when the step starts.
        host_memory_budget: host bytes for kept activations there. None takes half of what is free.
        detect_anomaly: stop at the first value that is not finite and name its segment and layer (slower).
    """

    method: str = "multi_axis"
    segment_length: int | None = None
    layers_per_block: int | None = None
    offload: bool | None = None
    forward_order: str | None = None
    backward_order: str | None = None
    memory_budget: int | float | str | None = None
    host_memory_budget: int | float | str | None = None
    detect_anomaly: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is not valid: use one of {METHODS}")
        # The plan checks its own fields: a wrong value fails here, not in the first training step.
        self._with_orders(RecomputePlan(self.layers_per_block or 1, self.segment_length or 1))
        for field in ("segment_length", "layers_per_block"):
            if getattr(self, field) == 0:
                raise ValueError(f"{field}=0 is not valid: it must be an integer of at least 1")
        for field in ("memory_budget", "host_memory_budget"):
            parse_bytes(getattr(self, field), field)

    def _with_orders(self, plan: RecomputePlan) -> RecomputePlan:
        forward = plan.forward_order if self.forward_order is None else self.forward_order
        backward = plan.backward_order if self.backward_order is None else self.backward_order
        return replace(plan, forward_order=forward, backward_order=backward)

    def fixed_plan(self, layers: int, tokens: int) -> RecomputePlan | None:
        """The plan when the settings leave nothing to choose, else None."""
        if self.method == "per_layer":
            return self._with_orders(RecomputePlan(1, tokens, bool(self.offload)))
        if self.method == "sqrt":
            return self._with_orders(RecomputePlan(max(1, round(math.sqrt(layers))), tokens, bool(self.offload)))
        if self.segment_length is not None and self.layers_per_block is not None and self.offload is not None:
            layers = min(self.layers_per_block, layers)
            return self._with_orders(RecomputePlan(layers, self.segment_length, self.offload))
        return None


def parse_bytes(value: int | float | str | None, field: str) -> int | None:
    """Bytes from a number (of bytes) or a text such as "80GB" or "8 GiB".

    Raises:
        ValueError: no size; a text without a unit, which could mean bytes or gigabytes.
    """
    if value is None:
        return None
    number, unit = value, ""
    if isinstance(value, str):
        text = value.strip().upper().replace(" ", "")
        number = text.rstrip("KMGTIB")
        unit = text[len(number) :]
        if not unit and number.replace(".", "", 1).isdigit():
            raise ValueError(f"{field}={value!r} has no unit: write {number}GB (10**9 bytes) or {number}GiB (2**30)")
    try:
        result = float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        raise ValueError(f"{field}={value!r} is not a size: write bytes or a text such as '80GB'") from None
    if not math.isfinite(result) or result <= 0:
        raise ValueError(f"{field}={value!r} is not valid: it must be a positive size")
    return int(result)
