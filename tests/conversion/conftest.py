"""Checkpoints to convert. Tests import the factories in `conversion_models.py`, which this makes importable."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from conversion_models import clip_tower, language_model, official_tensors, projector, write_checkpoint


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """A whole checkpoint in the released layout."""
    return official_tensors(language_model(), clip_tower(), projector())


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable:
    """Factory of folders: `checkpoint(tensors, config=..., shards=...)`."""
    made = []

    def make(tensors: dict[str, Tensor], config: dict | None = None, shards: int = 1) -> Path:
        made.append(tmp_path / f"source{len(made)}")
        return write_checkpoint(made[-1], tensors, config, shards)

    return make
