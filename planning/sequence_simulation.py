"""A training step of 8 to 256 GPUs that share one video, played through cell by cell: predicted, not measured.

    python -m video_ma2mba.planning.sequence_simulation --preset 2.7b --tokens 1048576 --gpus 1 2 4 8 16 32 64

How long a cell takes comes from constants measured on one GPU (`cost_time`), how long a message takes from `Links`.
Each rank runs its cells in the order of the real schedule (`recompute_schedule`), as soon as what they start from is
there.
Beyond 64 GPUs (as many as the largest model has layers) copies of the group read videos of their own.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..modeling_video_ma2mba.cost_memory import StackShape, Workload, kept_bytes, saved_per_token
from ..modeling_video_ma2mba.cost_search import block_sizes, segment_lengths
from ..modeling_video_ma2mba.cost_step import layer_parameter_count
from ..modeling_video_ma2mba.cost_time import H200, MeasuredCosts, cell_seconds
from ..modeling_video_ma2mba.recompute_plan import RecomputePlan
from ..modeling_video_ma2mba.recompute_schedule import CellOrder, shared_order


@dataclass(frozen=True)
class Links:
    """What lies between GPUs.

    Attributes:
        link, network: bytes per second from one GPU to the next, within a machine and between machines.
        latency, network_latency: seconds before the first byte arrives.
        all_reduce: bytes per second at which each GPU of a machine takes part in a sum of gradients, casts to fp32 and
            back included (fitted: 69 ms for the 2.7B model's on two H200s, 2026-11-28; the others are assumed).
        gpus_per_node: GPUs of one machine.
    """

    link: float = 150e9
    network: float = 45e9
    latency: float = 3e-5
    network_latency: float = 6e-5
    all_reduce: float = 156e9
    gpus_per_node: int = 8

    def message(self, source: int, to: int, nbytes: float) -> float:
        """Seconds that `nbytes` take from one rank to another."""
        if source // self.gpus_per_node == to // self.gpus_per_node:
            return self.latency + nbytes / self.link
        return self.network_latency + nbytes / self.network

    def sum(self, nbytes: float, gpus: int) -> float:
        """Seconds of an all-reduce of `nbytes` over `gpus`; between machines every GPU has a network card."""
        if gpus == 1:
            return 0.0
        speed = self.all_reduce if gpus <= self.gpus_per_node else min(self.all_reduce, self.network)
        return 2 * (gpus - 1) / gpus * nbytes / speed


@dataclass(frozen=True)
class Walk:
    """One pass over all cells: seconds until the last rank has finished, and seconds that each rank computed."""

    seconds: float
    busy: tuple[float, ...]

    @property
    def idle_share(self) -> float:
        """The part of all ranks' time that none of their cells took."""
        return 1 - sum(self.busy) / (self.seconds * len(self.busy))


def walk(
    order: CellOrder,
    cell: float,
    message: Callable[[int, int], float] = lambda source, to: 0.0,
    backward: bool = False,
) -> Walk:
    """Play one pass through: every rank runs its cells in the order of the schedule, as soon as it can.

    Args:
        order: the schedule. cell: seconds of one cell. message: seconds from one rank to another.
    """
    sign = 1 if backward else -1
    ended: dict[tuple[int, int], float] = {}
    free, busy = [0.0] * order.ranks, [0.0] * order.ranks
    for block, segment in order.cells[::-1] if backward else order.cells:
        rank, begin = order.owner(segment), ended.get((block + sign, segment), 0.0)
        if 0 <= segment + sign < order.segments:
            other = order.owner(segment + sign)
            begin = max(begin, ended[block, segment + sign] + (message(other, rank) if other != rank else 0.0))
        ended[block, segment] = free[rank] = max(begin, free[rank]) + cell
        busy[rank] += cell
    return Walk(max(free), tuple(busy))


def wave_seconds(blocks: int, segments: int, ranks: int, cell: float, message: float = 0.0) -> float:
    """Seconds of one pass of the round-robin schedule in closed form, for equal cells and links.

    Rank r begins r cells and messages late; a wave of `ranks` segments begins when the first rank has taken its last
    segment through all blocks, or when the last rank's state has come round, whichever is later.
    """
    ranks = min(ranks, segments)
    waves, rest = divmod(segments - 1, ranks)
    period = max(blocks * cell, ranks * (cell + message)) if ranks > 1 else blocks * cell
    return period * waves + rest * (cell + message) + blocks * cell


@dataclass(frozen=True)
class SimulatedStep:
    """A step of `gpus`: `sequence` of them share each video, and `copies` such groups read one each.

    `idle_share` is waiting for neighbours alone; `efficiency` counts everything, against one GPU whose step of the
    same plan would fit its memory.
    """

    gpus: int
    sequence: int
    copies: int
    tokens: int
    layers_per_block: int
    segment_length: int
    seconds: float
    all_reduce_seconds: float
    message_megabytes: float
    idle_share: float
    efficiency: float
    tokens_per_second: float
    host_gb_per_node: float


def simulate_step(
    config: Any,
    tokens: int,
    gpus: int,
    plan: RecomputePlan,
    *,
    schedule: str = "round_robin",
    costs: MeasuredCosts = H200,
    links: Links | None = None,
) -> SimulatedStep:
    """One training step of a language model in bf16, every parameter trained, on one video for each group.

    Args:
        config: a `Ma2mbaTextConfig`. tokens: of one video. plan: its cells.
        schedule: one of `recompute_schedule.SCHEDULES`. costs, links: constants.
    """
    links = links or Links()
    shape = StackShape.of(config)
    parameters = layer_parameter_count(shape)
    work = Workload(tokens, layer_parameters=parameters, kept=512)
    blocks, segments = len(plan.blocks(shape.layers)), len(plan.segments(tokens))
    sequence = max(n for n in range(1, min(gpus, blocks, segments) + 1) if gpus % n == 0)
    first, second = cell_seconds(shape, work, plan, min(plan.segment_length, tokens), segments > 1, costs)
    nbytes = shape.layers / blocks * shape.state_bytes

    def message(source: int, to: int) -> float:
        return links.message(source, to, nbytes)

    order = shared_order(schedule, blocks, segments, sequence)
    passes = [walk(order, first, message), walk(order, second, message, backward=True)]
    summed = links.sum(4 * parameters * shape.layers + 4 * shape.vocabulary * shape.width, gpus)
    alone = blocks * segments * (first + second)
    seconds = sum(p.seconds for p in passes) + summed
    kept = sum(kept_bytes(shape, work, plan))
    per_node = min(links.gpus_per_node, gpus)
    return SimulatedStep(
        gpus, sequence, gpus // sequence, tokens, plan.layers_per_block, plan.segment_length, seconds, summed,
        nbytes / 1e6, max(0.0, 1 - alone / sequence / sum(p.seconds for p in passes)), alone / sequence / seconds,
        gpus // sequence * tokens / seconds, kept / sequence * per_node / 1e9 if plan.offload else 0.0,
    )  # fmt: skip


def fastest_step(
    config: Any,
    tokens: int,
    gpus: int,
    host_gb_per_node: float = 2000.0,
    cell_gb: float = 40.0,
    costs: MeasuredCosts = H200,
    links: Links | None = None,
) -> SimulatedStep | None:
    """The plan that takes one video the least time, found in closed form and then played through; None if none fits.

    Args:
        host_gb_per_node: for kept activations. cell_gb: of a GPU, for what one cell keeps while it is differentiated.
    """
    links = links or Links()
    shape = StackShape.of(config)
    work = Workload(tokens, layer_parameters=layer_parameter_count(shape), kept=512)
    best: tuple[float, RecomputePlan] | None = None
    for size in block_sizes(shape.layers):
        blocks = -(-shape.layers // size)
        ranks = max(n for n in range(1, min(gpus, blocks) + 1) if gpus % n == 0)
        message = links.message(0, links.gpus_per_node if ranks > links.gpus_per_node else 1, size * shape.state_bytes)
        for length in segment_lengths(-(-tokens // ranks), shape.longest_segment):
            plan = RecomputePlan(size, length, offload=True)
            segments = -(-tokens // length)
            sequence = min(ranks, segments)
            kept = sum(kept_bytes(shape, work, plan)) / sequence * min(links.gpus_per_node, gpus)
            if kept > host_gb_per_node * 1e9 or size * length * saved_per_token(shape) > cell_gb * 1e9:
                continue
            cells = cell_seconds(shape, work, plan, length, segments > 1, costs)
            seconds = sum(wave_seconds(blocks, segments, sequence, cell, message) for cell in cells)
            if best is None or seconds < best[0]:
                best = seconds, plan
    return best and simulate_step(config, tokens, gpus, best[1], costs=costs, links=links)


def table(steps: Sequence[SimulatedStep]) -> str:
    """Simulated steps as a Markdown table."""
    lines = [
        "| GPUs | tokens of a video | layers x tokens a cell | step | tokens/s in all | waiting | efficiency | "
        "host GB a machine |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for s in steps:
        gpus = f"{s.gpus}" if s.copies == 1 else f"{s.gpus} ({s.copies} x {s.sequence})"
        lines.append(
            f"| {gpus} | {s.tokens:,} | {s.layers_per_block} x {s.segment_length:,} | {s.seconds:.1f} s | "
            f"{s.tokens_per_second:,.0f} | {s.idle_share:.1%} | {s.efficiency:.1%} | {s.host_gb_per_node:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table of simulated steps."""
    from ..conversion.presets import PRESETS
    from ..modeling_video_ma2mba.configuration_sizes import Ma2mbaTextSizes

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="2.7b", choices=PRESETS)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1 << 20, 1 << 23])
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--host-gb", type=float, default=2000.0, help="host memory of one machine for activations")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    arguments = parser.parse_args()
    width, layers = PRESETS[arguments.preset]
    config = Ma2mbaTextSizes(hidden_size=width, num_hidden_layers=layers)
    found = [fastest_step(config, tokens, n, arguments.host_gb) for tokens in arguments.tokens for n in arguments.gpus]
    steps = [step for step in found if step is not None]
    if arguments.json:
        import json

        print("\n".join(json.dumps(asdict(step)) for step in steps))
    else:
        print(f"Simulated, {arguments.preset}, cells as measured on {H200.hardware} ({H200.date}):\n\n{table(steps)}")


if __name__ == "__main__":
    main()
