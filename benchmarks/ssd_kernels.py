"""Times of the kernels of one Mamba-2 layer, ours beside mamba-ssm's: nanoseconds a token and layer.

    python benchmarks/ssd_kernels.py --out ssd_kernels.csv

Sizes of 2.7B (80 heads of 64, state 128, width 2560) in bf16; norms, convolution and scan, forward and backward, and
the inside of a mixer as a whole, at several lengths. `first_s` is what the first call of a fresh process took:
compilation, and tuning where a package tunes. `--sweep` times our kernels with other settings instead, each for
itself; the table in `ops_triton_settings` comes from there.
"""

import argparse
import datetime
import time
from pathlib import Path

import torch
from result_tables import hardware, row_writer

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


TILES = [(64, 4, 1), (64, 4, 2), (64, 4, 3), (64, 8, 1)]
TRIED = {  # field of the settings -> operation, what to try
    "chunk_scan": ("ssd", [(64, 4, 1), (64, 4, 1, 160), (64, 4, 2, 128), (64, 8, 1)]),
    "dx": ("ssd", [(64, 4, 1, 168), (64, 4, 1, 128), (64, 4, 2, 168), (32, 4, 1), (128, 8, 1, 128)]),
    "dscores": ("ssd", [(64, 4, 1), (64, 4, 1, 128), (64, 4, 2, 168)]),
    "chunk_state": ("ssd", [(64, 4, 1), (64, 4, 2)]),
    "rows_by_states": ("ssd", [(64, 4, 1), (64, 4, 2), (64, 4, 1, 168), (64, 4, 2, 168), (128, 8, 2)]),
    "conv_forward": ("causal_conv", [(32, 256, 1), (128, 256, 1), (64, 128, 1), (128, 128, 1), (64, 512, 2)]),
    "conv_backward": ("causal_conv", [(64, 64, 1), (256, 64, 1), (128, 128, 1), (128, 128, 2)]),
    "gated_norm": ("gated_rms_norm", [(4, 8, 1), (4, 8, 2), (4, 8, 3), (4, 16, 2), (4, 32, 1)]),
    "add_norm": ("add_rms_norm", [(4, 2, 8, 1), (4, 4, 4, 1), (2, 2, 4, 1)]),
    "state_passing": ("ssd", [(256, 2), (1024, 4)]),
    "programs": ("ssd", [512, 2048]),
    "scores": ("ssd", TILES[:1]),
    "finish": ("ssd", TILES[:3]),
}  # fmt: skip


def sweep(tokens: int, fields: list[str], write) -> None:
    """Our kernels with other settings, one field at a time; the time of every kernel that ran, largest first, and by
    how much the results differ, at most, from those of the table's own setting."""
    from video_ma2mba.modeling_video_ma2mba import ops_triton_settings

    table = ops_triton_settings.settings_for(torch.device("cuda"))
    cases = operations(tokens)
    for field in fields:
        name, tried = TRIED[field]
        operation, tensors, options, gradients, into = cases[name]
        backend, usual = operation.named("triton"), None
        for value in [getattr(table, field), *tried]:
            if isinstance(getattr(table, field), ops_triton_settings.Tiles):
                value = ops_triton_settings.Tiles(*value)
            ops_triton_settings.force_settings(table._replace(**{field: value}))
            row = {"tokens": tokens, "field": field, "value": str(tuple(value) if isinstance(value, tuple) else value)}

            def run(backend=backend, tensors=tensors, options=options, gradients=gradients, into=into) -> list:
                results, kept = backend.forward(*tensors, **options)
                return [*results, *backend.backward(tensors, kept, gradients, into, **options)]

            try:
                results = [t.float().clone() for t in run() if t is not None]
                usual = usual or results
                differs = [((a - b).norm() / b.norm()).item() for a, b in zip(results, usual, strict=True)]
                row["differs"] = f"{max(differs):.1e}"
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                    for _ in range(3):
                        run()
                    torch.cuda.synchronize()
            except Exception as error:  # too much shared memory for this card
                write(row | {"note": type(error).__name__})
                continue
            found = [e for e in profile.key_averages() if e.self_device_time_total]
            for event in sorted(found, key=lambda e: -e.self_device_time_total):
                ns = event.self_device_time_total * 1e3 / 3 / tokens
                write(row | {"kernel": event.key[:60], "ns_per_token": f"{ns:.4g}"})
    ops_triton_settings.force_settings(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV to write, row by row")
    parser.add_argument("--kernels", default="triton,mamba_ssm", help="backends, separated by commas")
    parser.add_argument("--lengths", default="4096,8192,16384,65536", help="tokens, separated by commas")
    parser.add_argument("--sweep", nargs="?", const=",".join(TRIED), help="fields of the settings to try others of")
    args = parser.parse_args()
    lengths = [int(n) for n in args.lengths.split(",")]
    names = ["what", "kernels", "tokens", "ns_per_token", "predicted_ns", "first_s"]
    if args.sweep:
        names = ["tokens", "field", "value", "kernel", "ns_per_token", "differs", "note"]
    about = {"hardware": hardware("cuda"), "date": datetime.date.today().isoformat(), "torch": torch.__version__}
    write = row_writer(args.out, [*names, *about], **about)
    if args.sweep:
        sweep(lengths[0], args.sweep.split(","), write)
    else:
        measure(args.kernels.split(","), lengths, write)


if __name__ == "__main__":
    main()
