"""A saved checkpoint works in a process that does not know this package, on the newest and the oldest transformers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from video_ma2mba import BUNDLED_CHECKPOINT

sys.path.insert(0, str(Path(__file__).parent))
from remote_checkpoint import copy_bundled, write_checkpoint

SCRIPT = Path(__file__).with_name("load_without_package.py")
# Paths of Pythons with other versions of transformers, separated like those of PATH: the oldest supported one, the
# newest, one in between. `make compat` installs the oldest and sets it.
OTHER_PYTHONS = [path for path in os.environ.get("VIDEO_MA2MBA_COMPAT_PYTHON", "").split(os.pathsep) if path]


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
    if (BUNDLED_CHECKPOINT / "config.json").is_file():
        folders.append(tmp_path_factory.mktemp("remote") / "bundled")
        copy_bundled(folders[-1])
    return folders


def test_without_the_package(checkpoints, tmp_path):
    assert "all as expected" in load_elsewhere(sys.executable, checkpoints, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not OTHER_PYTHONS, reason="needs VIDEO_MA2MBA_COMPAT_PYTHON (see `make compat`)")
@pytest.mark.parametrize("python", OTHER_PYTHONS)
def test_with_another_transformers(checkpoints, tmp_path, python):
    said = load_elsewhere(python, checkpoints, tmp_path)
    assert "all as expected" in said
    import transformers

    assert f"transformers {transformers.__version__}" not in said, "the other Python must have another transformers"
