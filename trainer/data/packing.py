"""Several rows in one: samples packed to a length, so that short ones do not wait for long ones and nothing is padded.

A pack holds whole samples. The model's state restarts at each of them (`seq_idx`), and what it learns is what it would
learn from each alone.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from torch.utils.data import Dataset, IterableDataset

PACK = "pack"
"""Of a row that holds others: a list of them."""
_TOGETHER = 256  # rows of a stream among which those that fit together are looked for


def pack_places(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which samples go together: the longest first, each where it leaves the least room (best fit decreasing).

    Args:
        lengths: tokens of each sample; one that is longer than `room` has a pack of its own.
        room: tokens of a pack.

    Returns:
        Numbers of samples, ascending in each pack; packs in the order of their first samples.
    """
    packs: list[list[int]] = []
    of_room: dict[int, list[int]] = {}  # packs with so much room left
    rooms: list[int] = []  # sorted
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        found = bisect_left(rooms, lengths[place])
        if found < len(rooms):
            left = rooms[found]
            pack = of_room[left].pop()
            if not of_room[left]:
                del of_room[left], rooms[found]
        else:
            left, pack = room, len(packs)
            packs.append([])
        packs[pack].append(place)
        left = max(0, left - lengths[place])
        if left not in of_room:
            of_room[left] = []
            insort(rooms, left)
        of_room[left].append(pack)
    return sorted(sorted(pack) for pack in packs)


class PackedRows(Dataset):
    """Rows `{"pack": [row, row, …]}` of a data set.

    Args:
        rows: with a length and rows by their numbers. lengths: tokens of each. room: tokens of a pack.
    """

    def __init__(self, rows: Any, lengths: Sequence[int], room: int):
        self.rows, self.packs = rows, pack_places(lengths, room)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, number: int) -> dict[str, list[Any]]:
        return {PACK: [self.rows[place] for place in self.packs[number]]}


class PackedStream(IterableDataset):
    """The same of rows that stream; what fits together is looked for among a few hundred that follow one another.

    Args:
        length: tokens of a row, about.
    """

    def __init__(self, rows: Any, length: Callable[[dict[str, Any]], int], room: int):
        self.rows, self.length, self.room = rows, length, room

    def __iter__(self) -> Iterator[dict[str, list[Any]]]:
        rows = iter(self.rows)
        while some := list(islice(rows, _TOGETHER)):
            for pack in pack_places([self.length(row) for row in some], self.room):
                yield {PACK: [some[place] for place in pack]}

    def set_epoch(self, epoch: int) -> None:
        """Called when an epoch begins: streams that are shuffled then have another order."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)
