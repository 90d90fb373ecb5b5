"""Several rows in one: samples packed to a length, so that short ones do not wait for long ones and nothing is padded.

A pack holds whole samples. The model's state restarts at each of them (`seq_idx`), and what it learns is what it would
learn from each alone.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice, pairwise
from typing import Any

from torch.utils.data import Dataset, IterableDataset

PACK = "pack"
"""Of a row that holds others: a list of them."""
_SPARE = 16  # tokens of a pack that a piece of a text leaves free: by itself it may be tokenised in another way
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


def cut_texts(rows: Any, tokenizer: Any, room: int) -> Any:
    """Canonical rows in which plain texts of more tokens than a pack are cut into pieces, each a row of its own.

    Args:
        rows: a data set of `datasets`, in files or streaming. tokenizer: a fast one. room: tokens of a pack.
    """
    columns = {"features": rows.features} if rows.features else {}
    return rows.map(partial(_cut_batch, tokenizer=tokenizer, room=room), batched=True, batch_size=_TOGETHER, **columns)


def _cut_batch(batch: dict[str, list[Any]], tokenizer: Any, room: int) -> dict[str, list[Any]]:
    names = list(batch)
    found = []
    for values in zip(*batch.values(), strict=True):
        row = dict(zip(names, values, strict=True))
        pieces = _pieces(row, tokenizer, max(room - _SPARE, 1))
        found += [row] if pieces is None else pieces
    return {name: [row[name] for row in found] for name in names}


def _pieces(row: dict[str, Any], tokenizer: Any, most: int) -> list[dict[str, Any]] | None:
    """A row that is a plain text of more than `most` tokens, cut; None for any other."""
    (message, *others) = row.get("messages") or [{}]
    parts = message.get("content") or []
    if others or message.get("role") != "assistant" or len(parts) != 1 or isinstance(parts, str):
        return None
    text = parts[0].get("text")
    if not text or len(text.encode()) <= most:  # no token is less than a byte
        return None
    places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    if len(places) <= most:
        return None
    # A character that is several tokens stays whole: a piece begins where its first token does.
    begins = [places[number][0] for number in range(0, len(places), most)] + [len(text)]
    return [
        row | {"id": f"{row['id']}, part {number}", "messages": [message | {"content": [parts[0] | {"text": piece}]}]}
        for number, piece in enumerate((text[a:b] for a, b in pairwise(begins)), 1)
        if piece.strip()
    ]


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
