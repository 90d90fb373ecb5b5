"""The order in which the cells of the (layer x time) plane run, as a value.

A cell is (block of layers, segment of tokens). In forward it needs the stream from the block below, `(block - 1,
segment)`, and the state at the end of the segment before, `(block, segment - 1)`; in backward it needs the gradients
of what it handed on. Any order that meets these dependencies computes the same numbers, bit by bit: the cells of one
block always come in the order of time (in backward against it), so gradients of parameters are always summed over
segments from the last to the first.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise

Cell = tuple[int, int]
"""Block (0 at the bottom) and segment (0 at the start)."""


@dataclass(frozen=True)
class CellOrder:
    """All cells of `blocks` x `segments`, in an order in which forward may run them; backward runs the reverse.

    Attributes:
        cells: every cell once, each after those it depends on.
        owners: for each segment the rank that runs its cells; empty: all of them run here.

    Raises:
        ValueError: a cell is missing, comes twice, or comes before one that it depends on.
    """

    blocks: int
    segments: int
    cells: tuple[Cell, ...]
    owners: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        done = [0] * self.blocks  # segments of each block so far: a block's cells come in the order of time
        for block, segment in self.cells:
            if not (0 <= block < self.blocks and 0 <= segment < self.segments):
                raise ValueError(f"cell {(block, segment)} lies outside of {self.blocks} x {self.segments} cells")
            if done[block] != segment or (block > 0 and done[block - 1] <= segment):
                raise ValueError(f"cell {(block, segment)} comes twice, or before a cell that it depends on")
            done[block] += 1
        if done != [self.segments] * self.blocks:
            raise ValueError(f"{len(self.cells)} cells do not make up {self.blocks} x {self.segments}")
        if self.owners and (len(self.owners) != self.segments or min(self.owners) < 0):
            raise ValueError(f"owners must name a rank for each of {self.segments} segments, not {self.owners}")

    def owner(self, segment: int) -> int:
        """The rank that runs the cells of a segment."""
        return self.owners[segment] if self.owners else 0

    def forward(self, rank: int = 0) -> tuple[Cell, ...]:
        """The cells that one rank runs in forward, in order."""
        return tuple(cell for cell in self.cells if self.owner(cell[1]) == rank) if self.owners else self.cells

    def backward(self, rank: int = 0) -> tuple[Cell, ...]:
        """The cells that one rank runs in backward, in order."""
        return self.forward(rank)[::-1]

    @property
    def ranks(self) -> int:
        """Ranks that have anything to run."""
        return max(self.owners, default=0) + 1

    def needs(self, cell: Cell, backward: bool = False) -> Cell | None:
        """The cell of another rank whose border state (in backward: its gradient) a cell starts from; None if it is
        one of its own rank's, or there is none."""
        block, segment = cell
        other = segment + 1 if backward else segment - 1
        elsewhere = 0 <= other < self.segments and self.owner(other) != self.owner(segment)
        return (block, other) if elsewhere else None

    def programme(self, rank: int, backward: bool = False) -> tuple[tuple[tuple[Cell, ...], Cell], ...]:
        """What one rank does, one entry for each cell that it runs: first the cells of its own for which it should
        begin to receive, because by then the other rank has sent; then the cell that it runs.

        Whatever comes from one rank is named in the order in which that rank sends it.
        """
        steps = self._backward_steps if backward else self._forward_steps
        own = self.backward(rank) if backward else self.forward(rank)
        needed = [(needs, cell) for cell in own if (needs := self.needs(cell, backward)) is not None]
        coming = sorted(((steps[needs], cell) for needs, cell in needed), reverse=True)
        entries = []
        for cell in own:
            arrived = []
            while coming and coming[-1][0] < steps[cell]:
                arrived.append(coming.pop()[1])
            entries.append((tuple(arrived), cell))
        return tuple(entries)

    def idle_share(self, backward: bool = False) -> float:
        """The part of a pass that a rank spends waiting, on average, where every cell takes as long as every other."""
        steps = self._backward_steps if backward else self._forward_steps
        return 1 - len(self.cells) / ((max(steps.values()) + 1) * self.ranks)

    @cached_property
    def _forward_steps(self) -> dict[Cell, int]:
        return self._steps(backward=False)

    @cached_property
    def _backward_steps(self) -> dict[Cell, int]:
        return self._steps(backward=True)

    def _steps(self, backward: bool) -> dict[Cell, int]:
        """When each cell runs, if all take one step and no rank waits without need."""
        sign = 1 if backward else -1
        steps: dict[Cell, int] = {}
        free = [0] * self.ranks
        for block, segment in self.cells[::-1] if backward else self.cells:
            before = (steps.get((block + sign, segment), -1), steps.get((block, segment + sign), -1))
            owner = self.owner(segment)
            steps[block, segment] = max(free[owner], *(step + 1 for step in before))
            free[owner] = steps[block, segment] + 1
        return steps


def block_major(blocks: int, segments: int) -> CellOrder:
    """One block after the other over the whole sequence: in backward, gradients of one block exist at a time."""
    return CellOrder(blocks, segments, tuple((k, i) for k in range(blocks) for i in range(segments)))


def wavefront(blocks: int, segments: int, ranks: int, band: int = 0) -> CellOrder:
    """Segments dealt to `ranks` like cards; every rank takes its segments one after the other through all blocks.

    In step `r + period * m + k` rank r runs block k of its m-th segment, `r + ranks * m`; its left neighbour ran the
    segment before one step earlier, so ranks wait for each other only while the wave fills and drains
    (`ranks - 1` steps). That needs at least as many blocks as ranks; with fewer, steps stay empty.

    Args:
        band: the waves run through so many blocks at a time (or a few more), over all segments, before they go on to
            the next ones; 0: through all. In backward, parameters' gradients are summed up for one band at a time.
    """
    if ranks < 1:
        raise ValueError(f"ranks={ranks} is not valid: it must be at least 1")
    bands = max(1, blocks // band) if band else 1
    edges = [n * blocks // bands for n in range(bands + 1)]
    cells: list[Cell] = []
    for first, last in pairwise(edges):
        period = max(last - first, min(ranks, segments))
        timed = sorted(
            (i % ranks + period * (i // ranks) + k - first, i, k) for i in range(segments) for k in range(first, last)
        )
        cells += [(k, i) for _, i, k in timed]
    return CellOrder(blocks, segments, tuple(cells), tuple(i % ranks for i in range(segments)) if ranks > 1 else ())


def stretches(blocks: int, segments: int, ranks: int) -> CellOrder:
    """One stretch of neighbouring segments for each rank, taken block after block: while a rank runs block k over its
    stretch, its right neighbour runs block k - 1. Ranks wait for `ranks - 1` blocks of a stretch in a whole pass, far
    longer than in a `wavefront`, but hand states on only once a block."""
    if ranks < 1:
        raise ValueError(f"ranks={ranks} is not valid: it must be at least 1")
    ranks = min(ranks, segments)
    owners = tuple(i * ranks // segments for i in range(segments))
    longest = -(-segments // ranks)
    timed = sorted(
        (longest * (owners[i] + k) + i - owners.index(owners[i]), i, k) for i in range(segments) for k in range(blocks)
    )
    return CellOrder(blocks, segments, tuple((k, i) for _, i, k in timed), owners if ranks > 1 else ())


def split_segments(order: CellOrder, parts: tuple[int, ...]) -> CellOrder:
    """The same order where each segment is run in so many parts, one behind the other in each block: smaller cells,
    nothing else; other ranks get what the last part of a segment ends with."""
    edges = list(accumulate(parts, initial=0))
    cells = tuple((k, n) for k, i in order.cells for n in range(edges[i], edges[i + 1]))
    owners = tuple(order.owner(i) for i, count in enumerate(parts) for _ in range(count)) if order.owners else ()
    return CellOrder(order.blocks, edges[-1], cells, owners)


SCHEDULES = ("round_robin", "stretches", "heads")
"""How segments are shared out among ranks: dealt like cards (`wavefront`), or one stretch each (`stretches`); or dealt
like cards for everything but the scans, which all ranks run together, each its heads (`parallel_heads`)."""


@lru_cache(maxsize=32)
def shared_order(
    schedule: str, blocks: int, segments: int, ranks: int, band: int = 0, parts: tuple[int, ...] = ()
) -> CellOrder:
    """The order of one of `SCHEDULES`; `band` as in `wavefront`, without meaning for stretches; `parts` as in
    `split_segments`, for segments of several."""
    order = stretches(blocks, segments, ranks) if schedule == "stretches" else wavefront(blocks, segments, ranks, band)
    return split_segments(order, parts) if parts else order


def segment_major(blocks: int, segments: int) -> CellOrder:
    """One segment after the other through all blocks: the stream exists for one segment at a time."""
    return CellOrder(blocks, segments, tuple((k, i) for i in range(segments) for k in range(blocks)))


def anti_diagonal(blocks: int, segments: int) -> CellOrder:
    """Along anti-diagonals, block + segment = 0, 1, 2, …: the cells of one could all run at the same time."""
    return replace(wavefront(blocks, segments, ranks=segments), owners=())


ORDERS: dict[str, Callable[[int, int], CellOrder]] = {
    "segment_major": segment_major,
    "block_major": block_major,
    "anti_diagonal": anti_diagonal,
}


@lru_cache(maxsize=32)
def named_order(name: str, blocks: int, segments: int) -> CellOrder:
    """One of `ORDERS`."""
    return ORDERS[name](blocks, segments)
