"""The Triton kernels of a decoding step beside their PyTorch twins without a GPU, by Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton, which needs no GPU to be interpreted")

# In float16, because the interpreter multiplies the bits of bfloat16 numbers.
ODD = {"head_dim": 24, "hidden_size": 48, "state_size": 40, "conv_kernel": 3, "use_conv_bias": False}
CASES = [
    {"batch": 1, "slots": 1, "sizes": {}},
    {"batch": 1, "slots": 3, "sizes": ODD},
    {"batch": 3, "slots": 1, "sizes": {"n_groups": 2}},
    {"batch": 2, "slots": 3, "sizes": ODD},
    {"batch": 2, "slots": 3, "sizes": {"head_dim": 64, "state_size": 16}, "many": True},
    {"batch": 2, "slots": 1, "sizes": ODD | {"n_groups": 4}, "many": True},
    {"batch": 5, "slots": 2, "sizes": {"hidden_size": 64, "state_size": 16}, "dtype": "float16"},
]


def test_kernels_equal_their_twins():
    cases = [{"dtype": "float32", "many": False} | case for case in CASES]
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("interpreted_decoding.py"))],
        input="\n".join(map(json.dumps, cases)),
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    for case, differences in zip(cases, found, strict=True):
        exact = case["dtype"] == "float32"
        for name, value in differences.items():
            assert value < (1e-5 if exact else 3e-2), (case, name, value)
