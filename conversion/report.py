"""What a conversion did with every tensor, and the error that refuses a checkpoint with the whole list."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

RECORD = "conversion.json"
"""File of a conversion that lists every tensor; written last."""
_SHOWN = 5


@dataclass(frozen=True)
class TensorRow:
    """One tensor of the source.

    Attributes:
        name: as stored in the source.
        action: "kept" (same name), "renamed", "tied" (equal to the embedding, stored once), "copied" (the embedding
            written again as the output layer), "recomputed" (position numbers that the model derives itself) or
            "left over" (belongs to no part of the model).
        became: name in the result; None where nothing is stored.
    """

    name: str
    action: str
    became: str | None
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        arrow = f" -> {self.became}" if self.became and self.became != self.name else ""
        return f"{self.action}: {self.name}{arrow} {self.dtype} {list(self.shape)}"


@dataclass
class ConversionReport:
    """Every tensor of the source and what became of it.

    Attributes:
        sources: directories or Hub ids, in the order given.
        layouts: for each source, what was recognised ("official: language model, vision tower, projector").
        rows: every tensor.
        parameters: numbers stored in the result.
        nbytes: their bytes.
    """

    sources: list[str]
    layouts: list[str]
    rows: list[TensorRow] = field(default_factory=list)
    parameters: int = 0
    nbytes: int = 0

    def counts(self) -> dict[str, int]:
        """Number of tensors by action."""
        return dict(Counter(row.action for row in self.rows))

    def to_dict(self) -> dict:
        """For JSON that travels with the result: directories are named without where they lie."""
        sources = [Path(source).name if Path(source).exists() else source for source in self.sources]
        return asdict(self) | {"sources": sources, "counts": self.counts()}

    def __str__(self) -> str:
        counts = ", ".join(f"{number} {action}" for action, number in self.counts().items())
        return (
            f"{len(self.rows)} tensors: {counts}; {self.parameters / 1e9:.3f}B parameters, {self.nbytes / 1e9:.2f} GB"
        )


class ConversionError(ValueError):
    """The tensors do not make up a whole model.

    Attributes:
        problems: every problem by kind ("missing", "unknown", "mis-shaped", "mistyped", "contradicting", ...),
            nothing shortened.
    """

    def __init__(self, name: str, problems: dict[str, Sequence[str]], remedy: str = "") -> None:
        self.problems = {kind: list(items) for kind, items in problems.items() if items}
        lists = "; ".join(f"{len(items)} {kind}: {_first(items)}" for kind, items in self.problems.items())
        super().__init__(f"{name} cannot be converted: {lists}{f' ({remedy})' if remedy else ''}")


def _first(items: Iterable[str]) -> str:
    items = list(items)
    return ", ".join(items[:_SHOWN]) + (f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")
