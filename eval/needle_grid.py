"""What `niah` is asked to measure, and whether it can; needs no model, and neither torch nor transformers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..processing.video_source_names import is_address, local_path, shown_name
from ..world.questions import FORMS, check_kinds
from ..world.world import CARD_SYMBOLS

SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class NeedleGrid:
    """What is measured: lengths in haystack frames (a video has one more, the needle), depths 0 (needle before all
    frames) to 1 (behind all), so many needles a cell, and the forms of question, `open` or `choice`, asked of each.
    So many of the haystack's frames are `distractors`, which look like needles but show no sign."""

    frames: Sequence[int]
    depths: Sequence[float]
    needles: int = 5
    forms: Sequence[str] = field(default=("open",))
    seed: int = 0
    distractors: int = 0

    def __post_init__(self) -> None:
        if self.needles < 1:
            raise ValueError(f"--needles {self.needles}: must be at least 1")
        if self.needles > len(CARD_SYMBOLS):
            raise ValueError(f"--needles {self.needles}: at most {len(CARD_SYMBOLS)}, each shows a sign of its own")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed}: must be at least 0")
        if not 0 <= 2 * self.distractors <= min(self.frames):
            raise ValueError(
                f"--distractors {self.distractors}: at most half of a video may be distractors, and --frames asks for "
                f"{min(self.frames)}"
            )
        check_kinds(self.forms, FORMS, "form")


def check_haystack(source: str) -> None:
    """FileNotFoundError unless a haystack is `SYNTHETIC`, an address, or a file or folder that is there."""
    if source == SYNTHETIC or is_address(source) or os.path.exists(local_path(source)):
        return
    raise FileNotFoundError(
        f"--haystack {shown_name(source)}: no such video file (or write {SYNTHETIC} for rendered videos)"
    )
