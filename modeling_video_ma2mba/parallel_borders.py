"""What neighbouring cells of a block hand each other: the state at a segment's end, and back its gradient.

Every state that a segment starts from is kept, so recomputation reads what forward received: it never communicates.
States are lists: the conv states (B, C, W-1) of a block's layers, then their SSM states (B, H, P, N); None stands for
the start of a sequence, or for no gradient.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

States = list[Tensor | None]


class LocalBorders:
    """The borders of cells that all run here: a neighbour's state is the one that was handed in before.

    Where ranks share the segments, `state_before` and `gradient_after` receive, `state_after` and `gradient_before`
    send, whenever the neighbouring segment has another owner; nothing else changes.

    Args:
        store: keeps border states between forward and backward (`recompute_store`).
        blocks: layer indices of each block.
        conv, ssm: states before the first token, (L, B, C, W-1) and (L, B, H, P, N), or None.
    """

    def __init__(self, store: Any, blocks: Sequence[range], conv: Tensor | None, ssm: Tensor | None) -> None:
        self._store, self._blocks = store, blocks
        self._start = self._by_block(conv, ssm)
        self._states: list[States] = list(self._start)
        self._gradients: list[States] = []

    def _by_block(self, conv: Sequence[Tensor] | None, ssm: Sequence[Tensor] | None) -> list[States]:
        return [[None if t is None else t[n] for t in (conv, ssm) for n in block] for block in self._blocks]

    def _by_layer(self, states: list[States]) -> tuple[States, States]:
        half = [len(s) // 2 for s in states]
        conv = [c for s, n in zip(states, half, strict=True) for c in s[:n]]
        return conv, [c for s, n in zip(states, half, strict=True) for c in s[n:]]

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

    def end(self) -> tuple[States, States]:
        """Conv and SSM states of all layers after the last token."""
        ends, self._states = self._states, []
        return self._by_layer(ends)

    # -------------------------------------------------------------------------------------------- backward
    def start_backward(self, dconv: Sequence[Tensor] | None, dssm: Sequence[Tensor] | None) -> None:
        """Take the gradients of the states after the last token."""
        self._gradients = self._by_block(dconv, dssm)

    def kept_state(self, block: int, segment: int) -> States:
        """The state that a cell started from; handed out once."""
        return self._store.take(("state", block, segment)) if segment > 0 else self._start[block]

    def gradient_after(self, block: int, segment: int) -> States:
        """The gradient of the state at a cell's end."""
        return self._gradients[block]

    def gradient_before(self, block: int, segment: int, gradients: States) -> None:
        """Hand back the gradient of the state that a cell started from."""
        self._gradients[block] = gradients

    def start_gradients(self) -> tuple[States, States]:
        """Gradients of the conv and SSM states of all layers before the first token."""
        return self._by_layer(self._gradients)
