"""Times of the kernels of one Mamba-2 layer, ours beside mamba-ssm's: nanoseconds a token and layer.

    python benchmarks/ssd_kernels.py --out ssd_kernels.csv

Sizes of 2.7B (80 heads of 64, state 128, width 2560) in bf16; norms, convolution and scan, forward and backward, and
the inside of a mixer as a whole, at several lengths. `first_s` is what the first call of a fresh process took:
compilation, and tuning where a package tunes. `--sweep` times our scan's kernels with other settings instead, every
kernel for itself; the table in `ops_ssd_triton` comes from there.
"""

import argparse
import datetime
import itertools
import time
from dataclasses import replace
from pathlib import Path

import torch
from result_tables import hardware, row_writer

from video_ma2mba.modeling_video_ma2mba import ops_ssd_triton
from video_ma2mba.modeling_video_ma2mba.mixer_mamba2 import CoreWeights, MixerShape, mixer_core
from video_ma2mba.modeling_video_ma2mba.ops_conv import CAUSAL_CONV
from video_ma2mba.modeling_video_ma2mba.ops_norm import ADD_RMS_NORM, GATED_RMS_NORM
from video_ma2mba.modeling_video_ma2mba.ops_registry import force_backend
from video_ma2mba.modeling_video_ma2mba.ops_ssd import SSD
from video_ma2mba.modeling_video_ma2mba.state_layers import Mamba2State

SHAPE = MixerShape(80, 64, 128, 1, 4, 256, 1e-5, (0.0, float("inf")))
WIDTH = 2560
PREDICTED = {  # ns a token, before the first run: the bandwidth's limit on an H200 times two for products in between
    "add_rms_norm forward": 8, "add_rms_norm backward": 12, "gated_rms_norm forward": 9, "gated_rms_norm backward": 16,
    "causal_conv forward": 7, "causal_conv backward": 12, "ssd forward": 45, "ssd backward": 110,
}  # fmt: skip


def operations(tokens: int) -> dict:
    """For each operation: its registry entry, tensors, options, gradients of results, and buffers."""
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.float32).to(dtype)

    inner, fp32 = SHAPE.inner, torch.float32
    zxbcdt, grad = random(1, tokens, SHAPE.projected), random(1, tokens, SHAPE.projected)
    z, xbc, dt = zxbcdt.split(SHAPE.parts, dim=-1)
    dz, dxbc, ddt = grad.split(SHAPE.parts, dim=-1)
    conv = random(1, tokens, SHAPE.conv_dim)
    x, b, c = conv.split([inner, 128, 128], dim=-1)
    dconv = torch.empty_like(conv)
    dx, db, dc = dconv.split([inner, 128, 128], dim=-1)
    heads = (1, tokens, 80, 64)
    steps = torch.full((80,), -4.0, device="cuda")
    rates = -torch.arange(1.0, 81.0, device="cuda")
    ssd = (x.view(heads), dt, rates, b.unsqueeze(2), c.unsqueeze(2), torch.ones(80, device="cuda"), steps,
           random(1, 80, 64, 128, dtype=fp32), None)  # fmt: skip
    into = (dx.view(heads), ddt, db.unsqueeze(2), dc.unsqueeze(2))
    y, weight = random(1, tokens, inner), random(WIDTH)
    return {
        "add_rms_norm": (
            ADD_RMS_NORM, (random(1, tokens, WIDTH, dtype=fp32), random(1, tokens, WIDTH), weight),
            {"eps": 1e-5, "dtype": torch.bfloat16},
            (random(1, tokens, WIDTH), random(1, tokens, WIDTH, dtype=fp32)), None,
        ),
        "gated_rms_norm": (GATED_RMS_NORM, (y, z, random(inner)), {"eps": 1e-5, "groups": 1}, (y,), dz),
        "causal_conv": (
            CAUSAL_CONV, (xbc, random(SHAPE.conv_dim, 4), random(SHAPE.conv_dim), random(1, SHAPE.conv_dim, 3), None),
            {}, (conv,), dxbc,
        ),
        "ssd": (SSD, ssd, {"chunk_size": 256, "dt_limit": SHAPE.time_step_limit},
                (y.view(heads), random(1, 80, 64, 128, dtype=fp32)), into),
    }  # fmt: skip


def timed(run, repeats: int = 10) -> tuple[float, float]:
    """Seconds of the first call; milliseconds of one of the later ones, the GPU's cache emptied between them."""
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(repeats):
        flush.zero_()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda._sleep(2_000_000)  # so that launches are queued before the GPU comes to them
        events[0].record()
        run()
        events[1].record()
        torch.cuda.synchronize()
        times.append(events[0].elapsed_time(events[1]))
    return first, sorted(times)[len(times) // 2]


def measure(names: list[str], lengths: list[int], write) -> None:
    """Every operation, and the inside of a mixer."""
    for tokens in lengths:
        for name, (operation, tensors, options, gradients, into) in operations(tokens).items():
            for backend_name in names:
                backend = operation.named(backend_name)
                results, kept = backend.forward(*tensors, **options)
                del results
                runs = {
                    "forward": lambda b=backend, t=tensors, o=options: b.forward(*t, **o),
                    "backward": lambda b=backend, t=tensors, k=kept, g=gradients, i=into, o=options: b.backward(
                        t, k, g, i, **o
                    ),
                }
                for step, run in runs.items():
                    first, milliseconds = timed(run)
                    write({
                        "kernels": backend_name, "what": f"{name} {step}", "tokens": tokens,
                        "ns_per_token": f"{milliseconds * 1e6 / tokens:.4g}", "first_s": f"{first:.3g}",
                        "predicted_ns": PREDICTED[f"{name} {step}"] if backend_name == "triton" else "",
                    })  # fmt: skip
        for backend_name in names:
            zxbcdt = torch.randn(1, tokens, SHAPE.projected, device="cuda", dtype=torch.bfloat16)
            given = (zxbcdt, torch.randn(SHAPE.conv_dim, 1, 4, device="cuda", dtype=torch.bfloat16))
            ones = torch.ones(80, device="cuda")
            leaves = [t.requires_grad_() for t in (*given, -4 * ones, ones.clone())]
            weights = CoreWeights(leaves[1], None, leaves[2], leaves[3], ones, torch.ones(SHAPE.inner, device="cuda"))
            state = Mamba2State(
                torch.zeros(1, SHAPE.conv_dim, 3, device="cuda", dtype=torch.bfloat16),
                torch.zeros(1, 80, 64, 128, device="cuda"),
            )

            def run(name=backend_name, leaves=leaves, weights=weights, state=state) -> None:
                with force_backend(name):
                    y, _ = mixer_core(leaves[0], weights, state, SHAPE)
                torch.autograd.grad(y, leaves, y.detach())

            first, milliseconds = timed(run, 5)
            write({
                "kernels": backend_name, "what": "mixer without projections, both ways", "tokens": tokens,
                "ns_per_token": f"{milliseconds * 1e6 / tokens:.4g}", "first_s": f"{first:.3g}",
            })  # fmt: skip


KERNELS = {  # kernel of the profile -> field of the settings
    "scores_kernel": "scores", "chunk_state_kernel": "states", "chunk_scan_kernel": "scan", "dx_kernel": "dx",
    "dscores_kernel": "dscores", "rows_by_states_kernel": "rows", "finish_kernel": "finish",
    "state_passing_kernel": "passing", "state_passing_backward_kernel": "passing",
}  # fmt: skip


def sweep(tokens: int, write) -> None:
    """Our scan, forward and backward, with one setting for all kernels at a time; every kernel's own time."""
    operation, tensors, options, gradients, into = operations(tokens)["ssd"]
    backend = operation.named("triton")
    choices = [
        ops_ssd_triton.SSDSettings(tile, *[(warps, stages)] * 7)
        for tile, warps, stages in itertools.product((32, 64, 128), (2, 4, 8), (1, 2, 3, 4))
    ]
    choices += [replace(ops_ssd_triton.SSDSettings(), passing=block, programs=n)
                for block, n in ((256, 1024), (1024, 4096), (2048, 8192))]  # fmt: skip
    for choice in choices:
        ops_ssd_triton.force_settings(choice)
        row = {"tokens": tokens, "tile": choice.tile, "warps": choice.scan[0], "stages": choice.scan[1],
               "passing": choice.passing, "programs": choice.programs}  # fmt: skip
        try:
            _, kept = backend.forward(*tensors, **options)
            backend.backward(tensors, kept, gradients, into, **options)
            torch.cuda.synchronize()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                for _ in range(3):
                    _, kept = backend.forward(*tensors, **options)
                    backend.backward(tensors, kept, gradients, into, **options)
                torch.cuda.synchronize()
        except Exception as error:  # too much shared memory for this card
            write(row | {"kernel": "all", "note": type(error).__name__})
            continue
        for event in profile.key_averages():
            if event.self_device_time_total:
                ns = event.self_device_time_total * 1e3 / 3 / tokens
                write(row | {"kernel": event.key[:60], "ns_per_token": f"{ns:.4g}"})
    ops_ssd_triton.force_settings(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV to write, row by row")
    parser.add_argument("--kernels", default="triton,mamba_ssm", help="backends, separated by commas")
    parser.add_argument("--lengths", default="4096,8192,16384,65536", help="tokens, separated by commas")
    parser.add_argument("--sweep", action="store_true", help="time our scan with other settings, at the first length")
    args = parser.parse_args()
    lengths = [int(n) for n in args.lengths.split(",")]
    names = ["what", "kernels", "tokens", "ns_per_token", "predicted_ns", "first_s"]
    if args.sweep:
        names = ["tokens", "tile", "warps", "stages", "passing", "programs", "kernel", "ns_per_token", "note"]
    about = {"hardware": hardware("cuda"), "date": datetime.date.today().isoformat(), "torch": torch.__version__}
    write = row_writer(args.out, [*names, *about], **about)
    if args.sweep:
        sweep(lengths[0], write)
    else:
        measure(args.kernels.split(","), lengths, write)


if __name__ == "__main__":
    main()
