"""What neighbouring cells of a block hand each other: the state at a segment's end, and back its gradient.

Every state that a segment starts from is kept, so recomputation reads what forward received: it never communicates.
States are lists of all tensors of a block's layers, layer after layer (`state_layers.flatten`); an empty list stands
for the start of a sequence, or for no gradients.
"""

from collections import deque
from collections.abc import Sequence

from torch import Tensor

from .parallel_sequence import Arrival, Like, SequenceGroup
from .recompute_schedule import Cell, CellOrder
from .recompute_store import DeviceStore, HostStore

States = list[Tensor]
Gradients = list[Tensor | None]


class LocalBorders:
    """The borders of cells that all run here: a neighbour's state is the one that was handed in before.

    Args:
        store: keeps border states between forward and backward (`recompute_store`).
        start: states before the first token, by block.
    """

    def __init__(self, store: DeviceStore | HostStore, start: Sequence[States]) -> None:
        self._store, self._start = store, list(start)
        self._states: list[States] = list(start)
        self._gradients: list[Gradients] = []

    # --------------------------------------------------------------------------------------------- forward
    def state_before(self, block: int, segment: int) -> States:
        """The state that a cell starts from, kept for its recomputation."""
        states = self._states[block]
        if segment > 0:
            self._store.put(("state", block, segment), states)
        return states

    def state_after(self, block: int, segment: int, states: States) -> None:
        """Hand on the state at a cell's end."""
        self._states[block] = states

    def end(self) -> list[States]:
        """The states after the last token, by block."""
        ends, self._states = self._states, []
        return ends

    # -------------------------------------------------------------------------------------------- backward
    def start_backward(self, gradients: Sequence[Gradients]) -> None:
        """Take the gradients of the states after the last token, by block."""
        self._gradients = list(gradients)

    def kept_state(self, block: int, segment: int) -> States:
        """The state that a cell started from; handed out once."""
        return self._store.take(("state", block, segment)) if segment > 0 else self._start[block]

    def gradient_after(self, block: int, segment: int) -> Gradients:
        """The gradient of the state at a cell's end."""
        return self._gradients[block]

    def gradient_before(self, block: int, segment: int, gradients: Gradients) -> None:
        """Hand back the gradient of the state that a cell started from."""
        self._gradients[block] = gradients

    def start_gradients(self) -> list[Gradients]:
        """Gradients of the states before the first token, by block."""
        return self._gradients


class RankBorders(LocalBorders):
    """The borders of cells that several ranks share: where the neighbouring segment has another owner, `state_before`
    and `gradient_after` receive, `state_after` and `gradient_before` send. Nothing else changes.

    Receiving begins as soon as the other rank has sent (`CellOrder.programme`), sending never waits, and no rank skips
    a message: one that cannot go on calls `drain_forward` or `drain_backward`, so that the others come to the end of
    the pass, where all can agree on what to do.

    Args:
        store, start: as in `LocalBorders`; `start` counts on the rank of the first segment.
        group: the ranks. forward, backward: the orders of cells in either pass (`backward` in its forward form).
        like: shapes and types of a block's border state, by block.
    """

    def __init__(
        self,
        store: DeviceStore | HostStore,
        start: Sequence[States],
        group: SequenceGroup,
        forward: CellOrder,
        backward: CellOrder,
        like: Sequence[Like],
    ) -> None:
        super().__init__(store, start)
        self._group, self._order, self._like = group, forward, like
        self._forward = deque(forward.programme(group.rank))
        self._backward = deque(backward.programme(group.rank, backward=True))
        self._coming: dict[Cell, Arrival] = {}
        self._ended = False
        self._open: Cell | None = None  # the cell that runs: its border has not been handed on
        self.lowest = 0  # blocks below have nothing to differentiate: backward leaves them out, on all ranks

    def start(self, states: Sequence[States]) -> None:
        """Take the states before the first token, by block."""
        self._start = list(states)
        self._states = list(states)

    # --------------------------------------------------------------------------------------------- forward
    def state_before(self, block: int, segment: int) -> States:
        """The state that a cell starts from, received where the segment before has another owner."""
        self._begin(self._forward, backward=False)
        arrival = self._coming.pop((block, segment), None)
        if arrival is not None:
            self._states[block] = arrival.wait()
        return super().state_before(block, segment)

    def state_after(self, block: int, segment: int, states: States) -> None:
        """Hand on the state at a cell's end, to another rank where the next segment is another's."""
        super().state_after(block, segment, states)
        self._send(block, segment, segment + 1, states)

    def end(self) -> list[States]:
        """The states after the last token, by block, on all ranks."""
        last = self._order.owner(self._order.segments - 1)
        own, self._states = self._states or [[] for _ in self._like], []
        self._ended = True
        return [
            self._group.broadcast(states or [None] * len(like), like, last)
            for states, like in zip(own, self._like, strict=True)
        ]

    # -------------------------------------------------------------------------------------------- backward
    def start_backward(self, gradients: Sequence[Gradients]) -> None:
        """Take the gradients of the states after the last token, by block; those of its own rank count."""
        last = self._order.owner(self._order.segments - 1) == self._group.rank
        super().start_backward(gradients if last else [[] for _ in gradients])

    def gradient_after(self, block: int, segment: int) -> Gradients:
        """The gradient of the state at a cell's end, received where the next segment has another owner."""
        self._begin(self._backward, backward=True)
        arrival = self._coming.pop((block, segment), None)
        if arrival is not None:
            self._gradients[block] = list(arrival.wait())
        return super().gradient_after(block, segment)

    def gradient_before(self, block: int, segment: int, gradients: Gradients) -> None:
        """Hand back the gradient of the state that a cell started from, to another rank where it came from there."""
        super().gradient_before(block, segment, gradients)
        self._send(block, segment, segment - 1, gradients)

    def start_gradients(self) -> list[Gradients]:
        """Gradients of the states before the first token, by block; none but on the first segment's rank."""
        if self._order.owner(0) != self._group.rank:
            return [[None] * len(start) for start in self._start]
        return super().start_gradients()

    # ---------------------------------------------------------------------------------------------- errors
    def drain_forward(self) -> None:
        """Take part in what is left of forward without computing: receive, and send zeros."""
        self._drain(self._forward, backward=False)
        if not self._ended:
            self.end()

    def drain_backward(self) -> None:
        """Take part in what is left of backward without computing: receive, and send zeros."""
        self._drain(self._backward, backward=True)

    def _drain(self, programme: deque[tuple[tuple[Cell, ...], Cell]], backward: bool) -> None:
        while self._open is not None or programme:
            if self._open is None:
                self._begin(programme, backward)
            if self._open is not None:
                block, segment = self._open
                if (arrival := self._coming.pop((block, segment), None)) is not None:
                    arrival.wait()
                self._send(block, segment, segment - 1 if backward else segment + 1, [])
        self._group.finish()

    # ------------------------------------------------------------------------------------------------ both
    def _begin(self, programme: deque[tuple[tuple[Cell, ...], Cell]], backward: bool) -> None:
        """Begin to receive what has been sent by now."""
        while programme:
            cells, own = programme.popleft()
            for cell in cells:
                if not backward or cell[0] >= self.lowest:
                    source = self._order.owner(cell[1] + (1 if backward else -1))
                    self._coming[cell] = self._group.receive(self._like[cell[0]], source)
            if not backward or own[0] >= self.lowest:
                self._open = own
                return

    def _send(self, block: int, segment: int, to: int, tensors: Sequence[Tensor | None]) -> None:
        """To the owner of segment `to`, unless that is this rank or there is no such segment."""
        self._open = None
        if 0 <= to < self._order.segments and self._order.owner(to) != self._order.owner(segment):
            like = self._like[block]
            self._group.send(tensors or [None] * len(like), like, self._order.owner(to))
