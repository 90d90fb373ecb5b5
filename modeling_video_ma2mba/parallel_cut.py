"""How the tokens of a batch are cut into segments that ranks share, and which frames each rank needs for its own.

Everything here follows from the batch and the number of ranks alone, so that all ranks, and the workers that decode
for them, come to the same cut without asking each other.

Legend: B batch, S tokens (columns of the batch), F frames of all videos of the batch, T tokens per frame.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from .recompute_schedule import SCHEDULES, CellOrder, shared_order

LONGEST_SEGMENT = 16384
"""Tokens of a segment that are worth a cell of their own: longer ones only take more memory."""
SHORTEST_SEGMENT = 4096
"""Shorter segments fill a GPU badly: ranks would rather wait a little longer while a wave fills and drains."""
FEWEST_TOKENS = 64
"""A segment of fewer tokens is not worth a rank of its own."""


@dataclass(frozen=True)
class SequenceCut:
    """Segments of all columns of a batch, shared out among the ranks of a group.

    Attributes:
        borders: first column of each segment, and the number of columns at the end.
        ranks: size of the group. With fewer segments than ranks the last ranks have nothing to do.
        schedule: one of `recompute_schedule.SCHEDULES`.
        cell: most columns of a cell: longer segments are run in several equal parts. None: each in one. By heads the
            cells are one segment of every rank together, whatever this says.

    Raises:
        ValueError: borders that do not rise, or an unknown schedule.
    """

    borders: tuple[int, ...]
    ranks: int
    schedule: str = "round_robin"
    cell: int | None = None

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in pairwise(self.borders))
        if len(self.borders) < 2 or self.borders[0] != 0 or not rising:
            raise ValueError(f"borders {self.borders} of segments must rise from 0")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r} is not valid: use one of {', '.join(SCHEDULES)}")
        if self.ranks < 1:
            raise ValueError(f"ranks={self.ranks} is not valid: it must be at least 1")

    @property
    def tokens(self) -> int:
        """Columns in all, S."""
        return self.borders[-1]

    @cached_property
    def segments(self) -> list[tuple[int, int]]:
        """First and past-the-last column of each segment."""
        return list(pairwise(self.borders))

    @cached_property
    def parts(self) -> tuple[int, ...]:
        """Cells of each segment in every block."""
        if self.schedule == "heads":
            return (1,) * len(self.segments)
        return tuple(-(-(stop - start) // (self.cell or stop - start)) for start, stop in self.segments)

    @cached_property
    def cells(self) -> list[tuple[int, int]]:
        """First and past-the-last column of each cell: `segments`, or parts of them."""
        found = []
        for (start, stop), count in zip(self.segments, self.parts, strict=True):
            edges = [start + n * (stop - start) // count for n in range(count + 1)]
            found += list(pairwise(edges))
        return found

    @property
    def longest(self) -> int:
        """Columns of the longest segment."""
        return max(stop - start for start, stop in self.segments)

    @property
    def active(self) -> int:
        """Ranks that have segments."""
        return min(self.ranks, len(self.segments))

    def order(self, blocks: int, band: int = 0) -> CellOrder:
        """The order in which ranks run the cells of `blocks` blocks; its segments are `cells`."""
        return shared_order(self.schedule, blocks, len(self.segments), self.ranks, band, self.parts)

    def own(self, rank: int) -> list[int]:
        """Numbers of the segments of a rank, in order."""
        order = shared_order(self.schedule, 1, len(self.segments), self.ranks)
        return [n for n in range(len(self.segments)) if order.owner(n) == rank]

    def places(self, rank: int) -> dict[int, tuple[int, int]]:
        """Where each of a rank's `cells` lies in what `take` makes: first and past-the-last column."""
        found, at, order = {}, 0, self.order(1)
        for n, (start, stop) in enumerate(self.cells):
            if order.owner(n) != rank:
                continue
            found[n] = (at, at + stop - start)
            at += stop - start
        return found

    def take(self, columns: Tensor, rank: int) -> Tensor:
        """A rank's columns of (B, S, …): its segments one behind the other."""
        parts = [columns[:, slice(*self.segments[n])] for n in self.own(rank)]
        return torch.cat(parts, dim=1) if parts else columns[:, :0]

    def mask(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """(S,) bool, which columns are a rank's."""
        found = torch.zeros(self.tokens, dtype=torch.bool, device=device)
        for n in self.own(rank):
            found[slice(*self.segments[n])] = True
        return found

    def frames(self, is_video: Tensor, rank: int, per_frame: int, clips: Tensor | None = None) -> Tensor:
        """Numbers of the frames (in the order of the batch) that a rank has to encode: those of which it has a row.

        Args:
            is_video: (B, S) bool, T placeholders for each frame in the order of the batch. per_frame: T.
            clips: (F,) number of the clip of each frame, for towers that look at clips: these are encoded whole.

        Raises:
            ValueError: the batch has not the columns that were cut.
        """
        if is_video.shape[1] != self.tokens:
            raise ValueError(f"the batch has {is_video.shape[1]} columns, but {self.tokens} were cut")
        own = is_video & self.mask(rank, is_video.device)
        rows = (is_video.flatten().cumsum(0) - 1).view_as(is_video)[own]
        frames = (rows // per_frame).unique().cpu()
        if clips is None or not len(frames):
            return frames
        return torch.isin(clips, clips[frames]).nonzero()[:, 0]


def clip_numbers(num_frames: Sequence[int], clip: int) -> Tensor | None:
    """(F,) number of every frame's clip, where a tower looks at `clip` frames together; None for single frames."""
    if clip <= 1:
        return None
    sizes = [min(clip, count - at) for count in num_frames for at in range(0, count, clip)]
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.int64))


def cut_sequence(
    is_video: Tensor,
    ranks: int,
    per_frame: int,
    clips: Tensor | None = None,
    segment_length: int | None = None,
    schedule: str = "round_robin",
) -> SequenceCut:
    """Equal segments, as many for every rank, cut between frames where the batch has a single row.

    Rows of a batch have their frames in different places: with several rows a cut may go through a frame, which then
    both neighbours encode.

    Args:
        is_video, per_frame, clips: as in `SequenceCut.frames`.
        segment_length: tokens of a segment, about; None: as many as make efficient cells.
    """
    tokens = is_video.shape[1]
    if segment_length is None:
        rounds = max(1, -(-tokens // (ranks * LONGEST_SEGMENT)))
        while rounds < 4 and tokens // (2 * rounds * ranks) >= SHORTEST_SEGMENT:
            rounds *= 2  # more waves, and less waiting for the first and the last
        count = min(rounds * ranks, max(1, tokens // FEWEST_TOKENS))
    else:
        count = max(1, -(-tokens // segment_length))
    edges = sorted({n * tokens // count for n in range(count + 1)})
    if len(is_video) == 1 and bool(is_video.any()):
        row = is_video[0].cpu()
        units = (row.cumsum(0) - 1) // per_frame
        if clips is not None:
            units = clips[units.clamp(min=0)]
        joined = torch.zeros(tokens + 1, dtype=torch.bool)  # whether a column goes on with the unit of the one before
        joined[1:tokens] = row[1:] & row[:-1] & (units[1:] == units[:-1])
        free = (~joined).nonzero()[:, 0]
        wanted = torch.tensor(edges)
        after = torch.searchsorted(free, wanted).clamp(max=len(free) - 1)
        before = (after - 1).clamp(min=0)
        nearer = torch.where(free[after] - wanted < wanted - free[before], after, before)
        nearer = torch.where(free[after] == wanted, after, nearer)
        edges = sorted(set(free[nearer].tolist()))
    return SequenceCut(tuple(edges), ranks, schedule)
