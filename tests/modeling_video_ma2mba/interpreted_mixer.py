"""Run by `test_ssd_triton` in a process of its own, in Triton's interpreter: the inside of a Mamba-2 mixer on our
kernels in fp32 against PyTorch in fp64. Reads cases as lines of JSON, writes the relative error of every result and
gradient.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_kernels_gpu import mixer_inputs, mixer_shape, relative_error, run_mixer

from video_ma2mba.modeling_video_ma2mba.mixer_mamba2 import CoreWeights, MixerShape, gated_core
from video_ma2mba.modeling_video_ma2mba.ops_norm import PendingDelta
from video_ma2mba.modeling_video_ma2mba.ops_registry import force_backend
from video_ma2mba.modeling_video_ma2mba.ops_triton_settings import KernelSettings, Tiles, force_settings
from video_ma2mba.modeling_video_ma2mba.state_layers import Mamba2State

WEIGHTS = ("conv_weight", "conv_bias", "dt_bias", "A_log", "D", "norm_weight")
TILED = ("scores", "chunk_state", "chunk_scan", "dx", "dscores", "rows_by_states", "finish")


def errors(batch: int, tokens: int, tile: int = 16, shape: dict | None = None, **given: list) -> dict[str, float]:
    settings = KernelSettings(conv_forward=(16, 32, 1), conv_backward=(16, 32, 1), programs=8)
    force_settings(settings._replace(**dict.fromkeys(TILED, Tiles(tile, 4, 1))))
    torch.manual_seed(0)
    sizes = mixer_shape(**{"heads": 4, "head_dim": 16, "state_size": 16, "chunk": 64} | (shape or {}))
    values = mixer_inputs(sizes, batch, tokens, torch.float32)
    numbers = {name: torch.tensor(value, dtype=torch.int32) for name, value in given.items()}
    exact = run_mixer(values, sizes, "cpu", torch.float64, "torch", **numbers)
    found = run_mixer(values, sizes, "cpu", torch.float32, "triton", **numbers)
    errors = {name: relative_error(found[name], value) for name, value in exact.items()}
    return errors | {
        f"read {name}": relative_error(value, exact[name]) for name, value in read(values, sizes, **numbers)
    }


def read(values: dict, sizes: MixerShape, lengths=None, seq_idx=None) -> list[tuple[str, torch.Tensor]]:
    """What `gated_core` finds, the norm's factor applied."""
    given = {name: value.float() for name, value in values.items()}
    weights = CoreWeights(*(given[name] for name in WEIGHTS))
    with torch.no_grad(), force_backend("triton"):
        state = Mamba2State(given["conv_state"], given["ssm_state"])
        y, squares, state = gated_core(given["zxbcdt"], weights, state, sizes, lengths, seq_idx)
    assert (squares is None) == (sizes.n_groups > 1)
    if squares is not None:
        y = PendingDelta(y, squares, sizes.inner, sizes.eps).settled()
    if lengths is not None:
        y = y * (torch.arange(y.shape[1]) < lengths[:, None]).unsqueeze(-1)
    return [("y", y.double()), ("conv", state.conv.double()), ("ssm", state.ssm.double())]


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(errors(**json.loads(line))), flush=True)
