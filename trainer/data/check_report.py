"""What a check of training data found, summed up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .checking import CheckedSample

PERCENTILES = {"shortest": 0, "median": 50, "95 %": 95, "longest": 100}


@dataclass(frozen=True)
class CheckReport:
    """Samples in the order of the data set."""

    samples: Sequence[CheckedSample]

    @property
    def usable(self) -> list[CheckedSample]:
        return [sample for sample in self.samples if sample.error is None]

    @property
    def broken(self) -> list[CheckedSample]:
        return [sample for sample in self.samples if sample.error is not None]

    @property
    def damaged(self) -> list[CheckedSample]:
        """Used in training, although parts of a video cannot be read."""
        return [sample for sample in self.usable if sample.notes]

    @property
    def shortened(self) -> list[CheckedSample]:
        """Whose last answers do not fit into max_length."""
        return [sample for sample in self.usable if sample.dropped_turns]

    @property
    def thinned(self) -> list[CheckedSample]:
        """Looked at in fewer frames than asked for, to fit into max_frames or max_length."""
        return [sample for sample in self.usable if sample.frames < sample.wanted_frames and not sample.notes]

    def distribution(self, name: str) -> dict[str, int]:
        """Percentiles of an attribute (tokens, learnt, frames) over the usable samples."""
        values = [getattr(sample, name) for sample in self.usable]
        if not values:
            return {}
        return {label: int(np.percentile(values, share, method="lower")) for label, share in PERCENTILES.items()}

    def of_length(self, label: str) -> CheckedSample | None:
        """The usable sample whose length in tokens is the named percentile."""
        ordered = sorted(self.usable, key=lambda sample: sample.tokens)
        return ordered[int((len(ordered) - 1) * PERCENTILES[label] / 100)] if ordered else None

    def duplicates(self, key: str) -> list[list[str]]:
        """Ids of samples of equal `row_key`, or sources of equal `video_key` under several names."""
        groups: dict[str, list[str]] = defaultdict(list)
        for sample in self.samples:
            name = sample.source if key == "video_key" else sample.id
            found = groups[getattr(sample, key)]
            if getattr(sample, key) and (key == "row_key" or name not in found):
                found.append(name)
        return [names for names in groups.values() if len(names) > 1]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "samples": len(self.samples),
            "usable": len(self.usable),
            "broken": [asdict(sample) for sample in self.broken],
            "damaged": [asdict(sample) for sample in self.damaged],
            "shortened": [asdict(sample) for sample in self.shortened],
            "thinned": len(self.thinned),
            "tokens": {**self.distribution("tokens"), "all": sum(sample.tokens for sample in self.usable)},
            "learnt_tokens": self.distribution("learnt"),
            "frames": self.distribution("frames"),
            "same_rows": self.duplicates("row_key"),
            "same_videos": self.duplicates("video_key"),
        }
