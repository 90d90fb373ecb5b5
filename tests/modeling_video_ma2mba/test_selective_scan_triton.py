"""The selective scan's Triton kernels equal their PyTorch twin: interpreted in fp32, and on a GPU in every type."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import selective_scan_cases as cases

TINY = {"channels": 32, "backward_channels": 32, "chunk": 8}
INTERPRETED = [
    {"batch": 1, "tokens": 13, "settings": TINY | {"programs": 1}},
    {"settings": TINY | {"programs": 12, "backward_channels": 16}},  # in segments, blocks of two sizes
    {"tokens": 8, "reverse": [True], "initial": False, "gated": False, "width": 3, "settings": TINY},
    {"tokens": 1, "reverse": [False, True, False], "initial": False, "settings": TINY},
    {"batch": 1, "tokens": 19, "state": 16, "channels": 64, "settings": TINY | {"programs": 8}},
    {"model": True, "settings": TINY},
    {"model": True, "settings": TINY, "scan_order": "spatiotemporal_v2"},
]


def test_interpreted_kernels_equal_their_twin():
    pytest.importorskip("triton", reason="needs triton, which needs no GPU to be interpreted")
    run = subprocess.run(
        [sys.executable, str(Path(cases.__file__))],
        input="\n".join(map(json.dumps, INTERPRETED)),
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    for case, differences in zip(INTERPRETED, found, strict=True):
        assert len(differences) >= 6
        for name, value in differences.items():
            assert value < 5e-6, (case, name, value)


@pytest.mark.parametrize("rows", [100, 4096, 6150])
def test_products_over_all_tokens_are_the_same_in_parts(rows):
    pytest.importorskip("triton", reason="its file needs triton")
    from video_ma2mba.modeling_video_ma2mba.ops_mamba1_triton import _over_rows

    a, b = torch.randn(2, rows, 6, dtype=torch.float64), torch.randn(2, rows, 5, dtype=torch.float64)
    assert cases.relative(_over_rows(a, b), a.transpose(1, 2) @ b) < 1e-6  # parts are summed in fp32


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3, 127, 128, 129, 1569, 5000])
@pytest.mark.parametrize("channels", [384, 1536])
def test_kernels_equal_their_twin_in_fp32(tokens, channels):
    found = cases.scan_differences("cuda", tokens=tokens, channels=channels, state=16, rank=16)
    assert all(value < 5e-5 for value in found.values()), found


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("programs", [1, 100_000], ids=["whole", "in segments"])
def test_kernels_equal_their_twin_in_16_bits(dtype, programs):
    settings = {"programs": programs}
    found = cases.scan_differences("cuda", dtype, 2, 3000, 384, 16, rank=16, settings=settings)
    assert found["y"] < 1e-3 and found["end"] < 1e-3 and found["conv"] < 3e-3, found  # conv: the twin's is in fp32
    assert all(value < 1e-2 for value in found.values()), found


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_models_equal_their_twin_on_a_gpu(autocast):
    sizes = {"hidden_size": 192, "state_size": 16, "image_size": 32}
    found = cases.model_differences("cuda", autocast=autocast, **sizes)
    for name, value in found.items():
        if autocast:  # what bf16 costs depends on the model: no more than it costs plain PyTorch
            what = name.removeprefix("whole blocks ").removeprefix("mixers ").removeprefix("torch under autocast ")
            assert value < max(1e-2, 1.5 * found[f"torch under autocast {what}"]), found
        else:
            assert value < 1e-4, found


@pytest.mark.gpu
def test_two_runs_are_identical_and_fifty_thousand_tokens_run():
    from video_ma2mba.modeling_video_ma2mba.configuration_videomamba import VideoMambaConfig
    from video_ma2mba.modeling_video_ma2mba.mixer_mamba1 import VideoMambaMixer

    torch.manual_seed(0)
    config = VideoMambaConfig()
    mixer = VideoMambaMixer(config, 0).cuda().bfloat16()
    for parameter in mixer.parameters():
        parameter.data = torch.randn_like(parameter) * 0.05
    hidden = torch.randn(1, 50_177, 192, device="cuda", dtype=torch.bfloat16)
    runs = []
    for _ in range(2):
        out = mixer(hidden)
        runs.append([out, *torch.autograd.grad(out.float().square().sum(), list(mixer.parameters()))])
    assert all(torch.equal(a, b) and torch.isfinite(a).all() for a, b in zip(*runs, strict=True))
