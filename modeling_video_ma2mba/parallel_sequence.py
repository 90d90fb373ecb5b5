"""The ranks that work on one sample together, and how they hand each other border states.

Rank r of a group hands states to rank r + 1, the last one to the first; gradients take the same way back. Messages
are sent without waiting, and received into buffers that are asked for ahead: on GPUs through NCCL on streams of its
own, on CPUs through gloo. What a message holds is known on both sides, so nothing but values is sent.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from .parallel_dims import ParallelDims

Like = Sequence[tuple[tuple[int, ...], torch.dtype]]
"""Shapes and types of the tensors in a message."""

_ALIGNMENT = 16
_MOST_SENDING = 256  # messages on their way before the sender waits for the oldest


class Arrival:
    """A message that is being received."""

    def __init__(self, work: Any, buffer: Tensor, like: Like) -> None:
        self._work, self._buffer, self._like = work, buffer, like

    def wait(self) -> list[Tensor]:
        """The tensors: on a GPU the current stream waits for them, not the host."""
        self._work.wait()
        return _pieces(self._buffer, self._like)


class SequenceGroup:
    """The ranks that share one sample; every one of them uses it in the same order as its neighbours do.

    Args:
        group, down: two process groups of the same ranks. Messages from a lower to a higher rank take the first one,
            others the second: NCCL runs all messages of a pair in one order, and two ranks send each other states at
            the same time.

    Attributes:
        rank, size: this rank within the group, from 0, and their number. device: where messages live.
    """

    def __init__(self, group: Any, down: Any, device: torch.device | str) -> None:
        self.group, self._down, self.device = group, down, torch.device(device)
        self._ranks = distributed.get_process_group_ranks(group)
        self.rank, self.size = distributed.get_rank(group), len(self._ranks)
        self._sending: deque[tuple[Any, Tensor]] = deque()
        self._meet()

    def _meet(self) -> None:
        """Exchange a byte with both neighbours, in one order on all ranks.

        NCCL connects a pair of ranks when they first talk, and the host waits until both do. In a step, one rank
        begins by receiving from the other, which does the same on the way back: they would wait for ever.
        """
        for first in range(self.size if self.size > 1 else 0):
            second = (first + 1) % self.size
            for source, to in ((first, second), (second, first)):
                byte = torch.zeros(1, dtype=torch.uint8, device=self.device)
                if self.rank == source:
                    self._way(source, to, distributed.isend, byte).wait()
                elif self.rank == to:
                    self._way(source, source, distributed.irecv, byte).wait()
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
        if self.device.type == "cuda":  # and what all of them use together
            distributed.all_reduce(torch.zeros(1, device=self.device), group=self.group)
            torch.cuda.synchronize(self.device)

    @classmethod
    def of_mesh(cls, mesh: Any, dimension: str = "sequence") -> "SequenceGroup":
        """This process's row of a `DeviceMesh` of all processes, along one dimension; all processes call this."""
        kind = mesh.device_type
        place = list(mesh.mesh_dim_names).index(dimension)
        rows = mesh.mesh.movedim(place, -1).flatten(0, -2).tolist() if mesh.ndim > 1 else [mesh.mesh.tolist()]
        down, _ = distributed.new_subgroups_by_enumeration(rows)
        return cls(
            mesh.get_group(place), down, torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else kind
        )

    @classmethod
    def of_run(cls, size: int, device_type: str) -> "SequenceGroup":
        """Of all processes of this run (`torch.distributed` is initialised), each `size` neighbours as one group.

        Raises:
            ValueError: `size` does not divide the number of processes.
        """
        from torch.distributed.device_mesh import init_device_mesh

        dims = ParallelDims.of_run(sequence=size)
        return cls.of_mesh(init_device_mesh(device_type, (dims.batches, size), mesh_dim_names=("data", "sequence")))

    def __deepcopy__(self, memo: dict[int, Any]) -> "SequenceGroup":
        return self

    # --------------------------------------------------------------------------------------- between neighbours
    def send(self, tensors: Sequence[Tensor | None], like: Like, to: int) -> None:
        """Send tensors (None: zeros) to a rank of the group, without waiting."""
        buffer = torch.empty(_message_bytes(like), dtype=torch.uint8, device=self.device)
        for slot, tensor in zip(_pieces(buffer, like), tensors, strict=True):
            slot.zero_() if tensor is None else slot.copy_(tensor)
        if not buffer.numel():
            return
        self._sending.append((self._way(self.rank, to, distributed.isend, buffer), buffer))
        while self._sending and (len(self._sending) > _MOST_SENDING or self._sending[0][0].is_completed()):
            self._sending.popleft()[0].wait()

    def receive(self, like: Like, source: int) -> Arrival:
        """Begin to receive what a rank of the group sends next to this one."""
        buffer = torch.empty(_message_bytes(like), dtype=torch.uint8, device=self.device)
        if not buffer.numel():
            return Arrival(_Done(), buffer, like)
        return Arrival(self._way(source, source, distributed.irecv, buffer), buffer, like)

    def _way(self, source: int, other: int, call: Any, buffer: Tensor) -> Any:
        to = self.rank if call is distributed.irecv else other
        return call(buffer, self._ranks[other], group=self.group if source < to else self._down)

    def finish(self) -> None:
        """Wait, on the device, until everything sent has arrived."""
        while self._sending:
            self._sending.popleft()[0].wait()

    def forget(self) -> None:
        """After an error: let go of what may never arrive."""
        self._sending.clear()

    # --------------------------------------------------------------------------------------------- all together
    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's tensor, added up in at least fp32 and in the same order on all ranks."""
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        wide = wide.clone() if wide is tensor else wide
        distributed.all_reduce(wide, group=self.group)
        return wide.to(tensor.dtype)

    def broadcast(self, tensors: Sequence[Tensor | None], like: Like, source: int) -> list[Tensor]:
        """The tensors of one rank, on all."""
        buffer = torch.zeros(_message_bytes(like), dtype=torch.uint8, device=self.device)
        if self.rank == source:
            for slot, tensor in zip(_pieces(buffer, like), tensors, strict=True):
                if tensor is not None:
                    slot.copy_(tensor)
        distributed.broadcast(buffer, self._ranks[source], group=self.group)
        return _pieces(buffer, like)

    def exchange(self, tensors: Sequence[Tensor], into: Sequence[Tensor]) -> None:
        """Give each rank one of `tensors`, and receive one of each in `into`: contiguous, any of them may be empty."""
        sent = torch.cat([t.reshape(-1).view(torch.uint8) for t in tensors])
        sizes = [t.numel() * t.element_size() for t in into]
        found = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
        own = [t.numel() * t.element_size() for t in tensors]
        distributed.all_to_all_single(found, sent, sizes, own, group=self.group)
        for slot, part in zip(into, found.split(sizes), strict=True):
            slot.view(-1).view(torch.uint8).copy_(part)

    def smallest(self, *values: float) -> list[float]:
        """The smallest of each value among the ranks; waits for the device."""
        found = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(found, distributed.ReduceOp.MIN, group=self.group)
        return found.tolist()

    def same(self, *values: float) -> bool:
        """Whether all ranks name the same values; waits for the device."""
        least = self.smallest(*values, *(-value for value in values))
        return least[: len(values)] == [-value for value in least[len(values) :]]


class _Done:
    @staticmethod
    def wait() -> None:
        pass


def _places(like: Like) -> list[tuple[int, int]]:
    """First and past-the-last byte of each tensor in a message."""
    places, at = [], 0
    for shape, dtype in like:
        size = dtype.itemsize
        for side in shape:
            size *= side
        places.append((at, at + size))
        at += -(-size // _ALIGNMENT) * _ALIGNMENT
    return places


def _message_bytes(like: Like) -> int:
    return -(-_places(like)[-1][1] // _ALIGNMENT) * _ALIGNMENT if like else 0


def _pieces(buffer: Tensor, like: Like) -> list[Tensor]:
    """The tensors of a message, as views."""
    return [
        buffer[first:last].view(dtype).view(shape)
        for (first, last), (shape, dtype) in zip(_places(like), like, strict=True)
    ]
