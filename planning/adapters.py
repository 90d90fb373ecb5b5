"""What LoRA and QLoRA put beside a frozen model, in numbers and bytes, as recipe `lora` does it (with `four_bit`).

An adapter of rank r on a linear layer of `a` inputs and `b` outputs has r (a + b) parameters. The projector trains
whole, as a copy beside the frozen one. PEFT keeps adapters in fp32, TRL makes them bf16 where the model is quantised.
"""

from collections.abc import Sequence
from dataclasses import dataclass

# A weight in NF4 takes half a byte; with double quantisation its scale takes a byte for 64 weights and, again, four
# bytes for 256 scales (Dettmers et al., arXiv 2305.14314, section 3).
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Adapters:
    """Adapters in every projection of the language model.

    Attributes:
        rank: of each. vision: in the tower's linear layers, too. four_bit: the projections that they are beside are
            kept in 4 bits (NF4).
    """

    rank: int
    vision: bool = False
    four_bit: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes of one of their parameters."""
        return 2 if self.four_bit else 4

    def beside(self, layers: Sequence[tuple[int, int]]) -> int:
        """Parameters of the adapters beside linear layers of so many inputs and outputs."""
        return self.rank * sum(inputs + outputs for inputs, outputs in layers)

    def saved_weights(self, projections: Sequence[tuple[int, int]], layers: int, weight_bytes: int) -> float:
        """Bytes that 4 bits save of the projections, inputs and outputs, of `layers` layers whose weights take
        `weight_bytes` otherwise."""
        if not self.four_bit:
            return 0.0
        return layers * sum(inputs * outputs for inputs, outputs in projections) * (weight_bytes - NF4_BYTES)
