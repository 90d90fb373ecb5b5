"""The order in which the cells of the (layer x time) plane run, as a value.

A cell is (block of layers, segment of tokens). In forward it needs the stream from the block below, `(block - 1,
segment)`, and the state at the end of the segment before, `(block, segment - 1)`; in backward it needs the gradients
of what it handed on. Any order that meets these dependencies computes the same numbers, bit by bit: the cells of one
block always come in the order of time (in backward against it), so gradients of parameters are always summed over
segments from the last to the first.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

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


def block_major(blocks: int, segments: int) -> CellOrder:
    """One block after the other over the whole sequence: in backward, gradients of one block exist at a time."""
    return CellOrder(blocks, segments, tuple((k, i) for k in range(blocks) for i in range(segments)))


def wavefront(blocks: int, segments: int, ranks: int) -> CellOrder:
    """Segments dealt to `ranks` like cards; every rank takes its segments one after the other through all blocks.

    In step `r + period * m + k` rank r runs block k of its m-th segment, `r + ranks * m`; its left neighbour ran the
    segment before one step earlier, so ranks wait for each other only while the wave fills and drains
    (`ranks - 1` steps). That needs at least as many blocks as ranks; with fewer, steps stay empty.
    """
    if ranks < 1:
        raise ValueError(f"ranks={ranks} is not valid: it must be at least 1")
    period = max(blocks, min(ranks, segments))
    owners = tuple(i % ranks for i in range(segments))
    timed = sorted((i % ranks + period * (i // ranks) + k, i, k) for i in range(segments) for k in range(blocks))
    return CellOrder(blocks, segments, tuple((k, i) for _, i, k in timed), owners if ranks > 1 else ())


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
