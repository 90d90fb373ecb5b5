"""Two gloo processes on the CPU give the gradients of one process, with checkpointing on in both of them.

The processes meet in a file, so there is no port to collide, and each has a deadline, so nothing can hang.
"""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed

WORKER = Path(__file__).with_name("distributed_worker.py")
SECONDS = 500

pytestmark = [
    pytest.mark.timeout(SECONDS + 50),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]


def launch(scenario: str, folder: Path) -> None:
    """Run both ranks of a scenario; fail with their last words when one fails or the deadline passes."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2",
        "LOCAL_SIZE": "2", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    logs = [folder / f"rank{rank}.log" for rank in range(2)]
    ranks: list[subprocess.Popen] = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as out:
                own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                command = [sys.executable, str(WORKER), scenario, str(rank), str(folder)]
                ranks.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=own, cwd=folder))
        deadline = time.monotonic() + SECONDS
        # One failed rank leaves the other waiting: stop at the first.
        while any(p.poll() is None for p in ranks) and not any(p.poll() for p in ranks):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        codes = [p.poll() for p in ranks]
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
            process.wait()
    words = "\n".join(f"--- rank {n} (exit {codes[n]})\n{log.read_text()[-4000:]}" for n, log in enumerate(logs))
    assert codes == [0, 0], words


@pytest.mark.parametrize("scenario", ["ddp", "ddp_with_frozen_layers", "fsdp2", "fsdp2_layers", "fsdp2_whole_model"])
def test_gradients_of_one_process(scenario, tmp_path):
    launch(scenario, tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_zero_makes_the_steps_of_one_process(stage, tmp_path):
    launch(f"zero_{stage}", tmp_path)
