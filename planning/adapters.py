"""What LoRA and QLoRA put beside a frozen model, in numbers and bytes, as recipe `lora` does it (with `four_bit`).

An adapter of rank r on a linear layer of `a` inputs and `b` outputs has r (a + b) parameters. The projector trains
whole, as a copy beside the frozen one. PEFT keeps adapters in fp32, TRL makes them bf16 where the model is quantised.
"""

from dataclasses import dataclass
from typing import Any

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

    def in_language_model(self, stack: Any) -> int:
        """Parameters of the adapters of one layer of a `Ma2mbaTextModel`."""
        mixer = stack.layers[0].mixer
        return sum(self._beside(layer) for layer in (mixer.in_proj, mixer.out_proj))

    def in_tower(self, tower: Any, names: tuple[str, ...]) -> int:
        """Parameters of the adapters of all linear layers of these names; 0 where the tower gets none."""
        found = (module for name, module in tower.named_modules() if name.rsplit(".", 1)[-1] in names)
        return sum(self._beside(module) for module in found) if self.vision else 0

    def saved_weights(self, stack: Any, weight_bytes: int) -> float:
        """Bytes that 4 bits save, of a `Ma2mbaTextModel` whose weights take `weight_bytes` otherwise."""
        if not self.four_bit:
            return 0.0
        numbers = sum(p.weight.numel() for layer in stack.layers for p in (layer.mixer.in_proj, layer.mixer.out_proj))
        return numbers * (weight_bytes - NF4_BYTES)

    def _beside(self, layer: Any) -> int:
        return self.rank * (layer.in_features + layer.out_features)
