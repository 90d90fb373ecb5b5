"""A checkpoint to publish, and a Hub to publish it to."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests are imported by path, their helpers by name

from hub_server import HubServer


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may change, with a licence."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on this machine, which the real client talks to."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # the stand-in speaks LFS
    real = huggingface_hub.HfApi
    with HubServer() as server:
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: real(endpoint=server.endpoint, token="hf_test"))
        yield server


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pushes without the trial in a process of its own, for tests whose own process shows the same."""
    monkeypatch.setattr("video_ma2mba.hub_cards.preflight.ask_remote_code", lambda *_: "not asked")
