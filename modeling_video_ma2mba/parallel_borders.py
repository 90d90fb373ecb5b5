"""What neighbouring cells of a block hand each other: the state at a segment's end, and back its gradient.

Every state that a segment starts from is kept, so recomputation reads what forward received: it never communicates.
States are lists of all tensors of a block's layers, layer after layer (`state_layers.flatten`); an empty list stands
for the start of a sequence, or for no gradients.
"""

from collections.abc import Sequence

from torch import Tensor

from .recompute_store import DeviceStore, HostStore

States = list[Tensor]
Gradients = list[Tensor | None]


class LocalBorders:
    """The borders of cells that all run here: a neighbour's state is the one that was handed in before.

    Where ranks share the segments, `state_before` and `gradient_after` receive, `state_after` and `gradient_before`
    send, whenever the neighbouring segment has another owner; nothing else changes.

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
