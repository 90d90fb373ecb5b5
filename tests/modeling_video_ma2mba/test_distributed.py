"""Two gloo processes on the CPU give the gradients of one process, with checkpointing on in both of them.

The processes meet in a file, so there is no port to collide, and each has a deadline, so nothing can hang.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed

WORKER = Path(__file__).with_name("distributed_worker.py")
SECONDS = 500
SCENARIOS = ["ddp", "ddp_with_frozen_layers", "fsdp2", "fsdp2_layers", "fsdp2_whole_model"]
ZERO = ["zero_1", "zero_2"] if importlib.util.find_spec("deepspeed") else []

pytestmark = [
    pytest.mark.timeout(SECONDS + 50),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """The folder of all scenarios' logs and exit codes."""
    folder = tmp_path_factory.mktemp("distributed")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(WORKER), str(folder), *SCENARIOS, *ZERO]
    subprocess.run(command, env=environment, cwd=folder, timeout=SECONDS)
    return folder


def check(folder: Path, scenario: str) -> None:
    """Both ranks have ended well; else their last words."""
    logs = [folder / f"{scenario}.{rank}.log" for rank in range(2)]
    words = [f"--- rank {rank}\n{log.read_text()[-4000:] if log.exists() else ''}" for rank, log in enumerate(logs)]
    assert json.loads((folder / "codes.json").read_text()).get(scenario) == [0, 0], "\n".join(words)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_gradients_of_one_process(ran, scenario):
    check(ran, scenario)


@pytest.mark.skipif(not ZERO, reason="needs deepspeed")
@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_zero_makes_the_steps_of_one_process(ran, stage):
    check(ran, f"zero_{stage}")
