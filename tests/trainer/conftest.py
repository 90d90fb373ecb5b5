"""Makes `tensor_chats.py`, the material that tests and the processes they start share, importable."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if find_spec("trl") is None:  # TRL 1.16 needs Python 3.11; all but training works on 3.10
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, str]]:
    """Runs scenarios of `training_ranks.py`: the folder with what rank 0 of each saved, and the words of all."""

    def run(*scenarios: str) -> tuple[Path, str]:
        folder = tmp_path_factory.mktemp("ranks")
        command = [sys.executable, str(Path(__file__).with_name("training_ranks.py")), str(folder), *scenarios]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
        return folder, done.stdout + done.stderr

    return run
