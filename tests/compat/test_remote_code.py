"""A saved checkpoint works in a process that does not know this package, on the newest and the oldest transformers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from remote_checkpoint import write_checkpoint

SCRIPT = Path(__file__).with_name("load_without_package.py")
# Path of a Python with another transformers; `make compat` installs the oldest supported one and sets it.
OTHER_PYTHON = os.environ.get("VIDEO_MA2MBA_COMPAT_PYTHON")


def load_elsewhere(python: str, folders: list[Path], home: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, str(SCRIPT), *map(str, folders)], capture_output=True, text=True, env=environment, cwd=home
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def checkpoints(make_model, tmp_path_factory) -> list[Path]:
    folders = []
    for kind in ("clip_vision_model", "siglip_vision_model"):
        folder = tmp_path_factory.mktemp("remote") / kind
        write_checkpoint(folder, make_model(vision={"model_type": kind}))
        folders.append(folder)
    return folders


def test_without_the_package(checkpoints, tmp_path):
    assert "all as expected" in load_elsewhere(sys.executable, checkpoints, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(OTHER_PYTHON is None, reason="needs VIDEO_MA2MBA_COMPAT_PYTHON (see `make compat`)")
def test_with_another_transformers(checkpoints, tmp_path):
    said = load_elsewhere(OTHER_PYTHON, checkpoints, tmp_path)
    assert "all as expected" in said
    import transformers

    assert f"transformers {transformers.__version__}" not in said, "the other Python must have another transformers"
