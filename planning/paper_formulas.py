"""The memory formulas of Multi-Axis Gradient Checkpointing as published (arXiv 2411.19460), for comparison with ours.

Nothing plans with them: they leave out terms that the engine has (see `cost_memory`, and docs/ma_gc.md for the list
of differences). Legend: L layers, S tokens, l layers per block, s tokens per segment; constants count 16-bit numbers.
"""

import math
from dataclasses import dataclass
from typing import Any

# Table 7: constants of the cost model (App. C) for the three language models, in 16-bit numbers.
TABLE_7 = {
    "370m": {"layer": 1024, "sequence": 269056, "grid": 6432, "state": 264448},
    "1.3b": {"layer": 2048, "sequence": 537344, "grid": 12608, "state": 528640},
    "2.7b": {"layer": 2560, "sequence": 671488, "grid": 15696, "state": 660736},
}

# Table 3, rows of the 2.7B model: GB above weights and gradients on an A100 at 2**10, 2**11, ... tokens.
TABLE_3 = {
    "off": (2.7, 5.4, 10.7, 21.4, 42.6),
    "per_layer": (1.1, 2.2, 4.4, 8.7, 17.4, 34.7, 69.3),
    "sqrt": (0.6, 1.1, 2.2, 4.4, 8.7, 17.3, 34.6, 69.3),
    "multi_axis": (0.7, 1.1, 1.8, 2.7, 4.2, 6.9, 10.5, 17.2, 25.9, 42.2),
}


@dataclass(frozen=True)
class PaperConstants:
    """C_L, C_S, C_grid and C_state of Eq. 12-16: numbers per checkpointed token, border state, cell token, token."""

    layer: int
    sequence: int
    grid: int
    state: int

    @classmethod
    def of(cls, config: Any) -> "PaperConstants":
        """As printed in Table 7, from a `Ma2mbaTextConfig`."""
        inner, conv, heads = config.inner_size, config.conv_dim, config.num_heads
        return cls(
            layer=config.hidden_size,
            sequence=conv * (config.conv_kernel - 1) + inner * config.state_size,
            grid=(inner + conv + heads) + inner,
            state=conv + inner * config.state_size,
        )

    @classmethod
    def of_reference_code(cls, config: Any) -> "PaperConstants":
        """As the authors' code computes them in bf16: it stores the fp32 residual beside the hidden states, counts the
        fp32 state twice, and has one chunk state per chunk where Table 7 charges one per token.
        """
        inner, conv, heads = config.inner_size, config.conv_dim, config.num_heads
        chunk_states = 3 * inner * config.state_size // config.chunk_size
        return cls(
            layer=3 * config.hidden_size,
            sequence=conv * (config.conv_kernel - 1) + 2 * inner * config.state_size,
            grid=(inner + conv + heads) + inner,
            state=conv + 4 * heads + chunk_states + 2 * config.chunk_size,
        )


def unit_cost(layers: int, tokens: int, block: float, segment: float) -> float:
    """Eq. 4: M = LS/l + LS/s + ls."""
    plane = layers * tokens
    return plane / block + plane / segment + block * segment


def unit_optimum(layers: int, tokens: int) -> tuple[float, float, float]:
    """Eq. 5-10: the best l, s and cost. Inside, l = s = (LS)^(1/3) costs 3 (LS)^(2/3); at the border l = L (long
    sequences) s = sqrt(S) costs S + 2 L sqrt(S), at the border s = S (deep stacks) l = sqrt(L) costs L + 2 S sqrt(L).
    """
    if layers**2 <= tokens:
        block, segment = float(layers), math.sqrt(tokens)
    elif tokens**2 <= layers:
        block, segment = math.sqrt(layers), float(tokens)
    else:
        block = segment = (layers * tokens) ** (1 / 3)
    return block, segment, unit_cost(layers, tokens, block, segment)


def full_cost(constants: PaperConstants, layers: int, tokens: int, block: float, segment: float) -> float:
    """Eq. 12: M = (LS/l) C_L + (LS/s) C_S + l s C_grid + s C_state, in 16-bit numbers."""
    plane = layers * tokens
    return (
        plane / block * constants.layer
        + plane / segment * constants.sequence
        + block * segment * constants.grid
        + segment * constants.state
    )


def full_optimum(constants: PaperConstants, layers: int, tokens: int) -> tuple[float, float, float]:
    """Eq. 13-16: the l and s that minimise Eq. 12 without its last term, which the paper calls negligible, within
    1 <= l <= L and 1 <= s <= S, and what Eq. 12 without that term then costs in 16-bit numbers.

    Inside: l = (LS C_L^2 / (C_S C_grid))^(1/3), s = (LS C_S^2 / (C_L C_grid))^(1/3), M = 3 (LS)^(2/3)
    (C_L C_S C_grid)^(1/3).
    """
    plane, c = layers * tokens, constants
    block = (plane * c.layer**2 / (c.sequence * c.grid)) ** (1 / 3)
    segment = (plane * c.sequence**2 / (c.layer * c.grid)) ** (1 / 3)
    if block > layers or block < 1:  # at a border of l the best s follows from (LS/s) C_S + l s C_grid
        block = min(max(block, 1.0), float(layers))
        segment = math.sqrt(plane * c.sequence / (block * c.grid))
    if segment > tokens:
        segment = float(tokens)
        block = min(max(math.sqrt(plane * c.layer / (segment * c.grid)), 1.0), float(layers))
    cost = plane / block * c.layer + plane / segment * c.sequence + block * segment * c.grid
    return block, segment, cost


def reference_code_cost(constants: PaperConstants, layers: int, tokens: int, block: int, segment: int) -> int:
    """The integer form in the authors' code, which a single block or segment costs no checkpoint:
    M = L ((S-1) // s) C_S + ((L-1) // l) S C_L + l s C_grid + s C_state.
    """
    return (
        layers * ((tokens - 1) // segment) * constants.sequence
        + ((layers - 1) // block) * tokens * constants.layer
        + block * segment * constants.grid
        + segment * constants.state
    )


def reference_code_optimum(constants: PaperConstants, layers: int, tokens: int) -> tuple[int, int, int]:
    """The l, s (a multiple of 256) and cost that the authors' code finds by trying all of them."""
    choices = (
        (reference_code_cost(constants, layers, tokens, block, segment), block, segment)
        for segment in range(256, tokens + 1, 256)
        for block in range(1, layers + 1)
    )
    cost, block, segment = min(choices, default=(0, layers, tokens))
    if not cost:  # shorter than 256 tokens: one cell
        cost = reference_code_cost(constants, layers, tokens, layers, tokens)
    return block, segment, cost
