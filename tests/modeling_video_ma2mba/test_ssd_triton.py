"""Our Mamba-2 kernels (scan, convolution, gated norm) in Triton's interpreter, which needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = [
    {"batch": 1, "tokens": 70},
    {"batch": 1, "tokens": 2, "shape": {"width": 3}},
    {"batch": 1, "tokens": 66, "shape": {"groups": 2, "state_size": 32, "limit": [0.01, 0.05]}, "tile": 32},
    {"batch": 2, "tokens": 30, "lengths": [30, 17]},
    {"batch": 1, "tokens": 70, "seq_idx": [[0] * 13 + [1] * 40 + [2] * 20]},
]


def test_interpreted_kernels_equal_pytorch_in_fp64():
    pytest.importorskip("triton", reason="needs triton, which needs no GPU to be interpreted")
    run = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "interpreted_mixer.py")],
        input="\n".join(map(json.dumps, CASES)),
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    for case, errors in zip(CASES, found, strict=True):
        assert {"y", "conv", "ssm", "dzxbcdt", "dA_log", "ddt_bias", "dssm_state", "dconv_state"} <= set(errors)
        for name, error in errors.items():
            assert error < 2e-5, (case, name, error)
