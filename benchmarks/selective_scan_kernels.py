"""Time of the selective scan's kernels in every setting of a small grid: where the fixed table comes from.

    python benchmarks/selective_scan_kernels.py --out selective_scan_kernels.csv

Needs a GPU. Every setting is checked against the default one before it is timed, since compilers go wrong in some.
Times are medians of device events over both directions, in nanoseconds a token (of one layer); `parts` times what else
a layer does. Rows are written as they are measured; the best settings of each shape are printed last.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from result_tables import hardware, write_rows

from video_ma2mba.modeling_video_ma2mba import ops_mamba1_triton as core
from video_ma2mba.modeling_video_ma2mba import ops_selective_scan_triton as kernels
from video_ma2mba.modeling_video_ma2mba.configuration_videomamba import VideoMambaConfig
from video_ma2mba.modeling_video_ma2mba.mixer_mamba1 import VideoMambaMixer, add_norm_mix
from video_ma2mba.modeling_video_ma2mba.modeling_videomamba import VideoMambaRMSNorm

SHAPES = {
    "8 frames x 64": (64, 1569),
    "64 frames x 16": (16, 12545),
    "64 frames x 2": (2, 12545),
    "256 x 1": (1, 50177),
}
REVERSE = (False, True)


def milliseconds(run, repeats: int = 5) -> float:
    """Median device time of `run`, after one run to compile and warm up."""
    run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def scan_inputs(batch: int, tokens: int, channels: int, state: int = 16, rank: int = 16):
    torch.manual_seed(0)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    xz = torch.randn(batch, tokens, 2 * channels, **options)
    u, dt = (torch.randn(2, batch, tokens, channels, **options) for _ in range(2))
    bc = torch.randn(2, batch, tokens, rank + 2 * state, **options)
    rates = -torch.rand(2, channels, state, device="cuda") * 16
    skip, bias = torch.randn(2, 2, channels, device="cuda")
    given = kernels.ScanInputs(u, dt, bc, rank, xz[..., channels:], kernels.decay_rates(rates), skip, bias, REVERSE)
    return given, torch.randn(batch, tokens, channels, **options)


FORWARD = [
    kernels.ScanSettings(channels=channels, warps=warps, tokens=tokens, chunk=chunk, programs=programs)
    for (channels, warps, tokens) in ((64, 1, 2), (64, 1, 4), (32, 1, 4), (128, 2, 2))
    for chunk in (64,)
    for programs in (1056, 2112, 4224)
]
BACKWARD = [
    kernels.ScanSettings(
        backward_channels=channels, backward_warps=warps, backward_tokens=tokens, short=short, programs=programs
    )
    for (channels, warps, tokens) in ((32, 1, 2), (32, 1, 4), (64, 2, 2), (64, 1, 2), (128, 4, 2))
    for short in (False, True)
    for programs in (2112, 4224, 8448)
]


def sweep(shape: str, batch: int, tokens: int, channels: int, small: bool) -> Iterator[dict]:
    """Every setting of both grids on one shape, a row each; `worst` is the largest difference from the default's."""
    given, dy = scan_inputs(batch, tokens, channels)
    kernels.force_settings(kernels.ScanSettings())
    expected_y, expected_end, kept = kernels.scan_forward(given, None, True)
    expected = kernels.scan_backward(given, kept, dy, None)
    scale = 1e6 / (batch * tokens)
    for direction, settings in [("forward", each) for each in FORWARD] + [("backward", each) for each in BACKWARD]:
        if small and settings.programs != kernels.ScanSettings().programs:
            continue
        kernels.force_settings(settings)
        row = {"shape": shape, "width": channels, "direction": direction, **dataclasses.asdict(settings)}
        begun = time.monotonic()
        try:
            if direction == "forward":
                y, end, _ = kernels.scan_forward(given, None, True)
                differences = [relative(y, expected_y), relative(end, expected_end)]
            else:
                back = kernels.scan_backward(given, kept, dy, None)
                names = ("y", "du", "ddt", "dz", "dbc", "dA", "dskip", "dbias", "dinitial")
                differences = [relative(getattr(back, name), getattr(expected, name)) for name in names]
            row["worst"], row["first_s"] = max(differences), time.monotonic() - begun
            forward = direction == "forward"
            run = (
                (lambda: kernels.scan_forward(given, None, True))
                if forward
                else (lambda: kernels.scan_backward(given, kept, dy, None))
            )
            row["ns"] = milliseconds(run) * scale
        except Exception as error:  # a setting that does not compile or launch is a result, too
            row["error"] = str(error).splitlines()[0][:200]
        kernels.force_settings(None)
        yield row


def parts(batch: int, tokens: int, width: int = 192) -> list[dict]:
    """Nanoseconds a token of everything a block does, by the settings of the table."""
    torch.manual_seed(0)
    config = VideoMambaConfig(hidden_size=width)
    mixer = VideoMambaMixer(config, 0).cuda().bfloat16()
    for parameter in mixer.parameters():
        parameter.data = torch.randn_like(parameter) * 0.05
    norm = VideoMambaRMSNorm(width, 1e-5).cuda().bfloat16()
    delta = torch.randn(batch, tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    residual = torch.randn(batch, tokens, width, device="cuda", requires_grad=True)
    weights = core.ScanWeights(*mixer.scan_weights(mixer.passes))
    prepared = core._Prepared.of(weights, torch.bfloat16)
    xz = torch.randn(batch, tokens, 4 * width, device="cuda", dtype=torch.bfloat16)
    given = core._inputs(xz, prepared, REVERSE)
    _, _, kept = kernels.scan_forward(given, None, True)
    dy = torch.randn(batch, tokens, 2 * width, device="cuda", dtype=torch.bfloat16)
    dx = torch.empty_like(xz)[..., : 2 * width]

    def block() -> None:
        out, stream = add_norm_mix(mixer, norm, delta, residual)
        torch.autograd.backward([out, stream], [out, stream])

    x = xz[..., : 2 * width]
    runs = {
        "conv forward": lambda: kernels.conv_forward(x, prepared.conv_weight, prepared.conv_bias, REVERSE),
        "conv backward": lambda: kernels.conv_backward(
            x, prepared.conv_weight, prepared.conv_bias, given.u, REVERSE, dx
        ),
        "conv, x_proj, dt_proj": lambda: core._inputs(xz, prepared, REVERSE),
        "scan forward": lambda: kernels.scan_forward(given, None, True),
        "scan backward": lambda: kernels.scan_backward(given, kept, dy, None),
        "core backward": lambda: core._scan_all_backward(xz, kept, prepared, weights, REVERSE, dy),
        "norm forward": lambda: core.add_norm_forward(delta.detach(), residual.detach(), norm.weight, 1e-5, xz.dtype),
        "norm backward": lambda: core.norm_backward(
            residual.detach(), norm.weight, 1e-5, delta.detach(), residual.detach()
        ),
        "in_proj": lambda: torch.nn.functional.linear(delta.detach(), mixer.in_proj.weight),
        "block forward": lambda: add_norm_mix(mixer, norm, delta, residual),
        "block forward and backward": block,
    }
    rows = []
    for name, run in runs.items():
        rows.append({"part": name, "ns": milliseconds(run) * 1e6 / (batch * tokens)})
        print(f"{name}: {rows[-1]['ns']:.2f} ns a token and layer", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV to write, row by row")
    parser.add_argument("--small", action="store_true", help="only a few settings")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: needs a CUDA device")
    print(hardware("cuda"), torch.__version__, flush=True)
    parts(16, 12545)
    shapes = (("64 frames x 16", 384), ("8 frames x 64", 384), ("64 frames x 2", 384), ("256 x 1", 384))
    settings = [field.name for field in dataclasses.fields(kernels.ScanSettings)]
    fields = ["shape", "width", "direction", *settings, "worst", "first_s", "ns", "error"]
    rows = []
    for number, (shape, width) in enumerate((*shapes, ("8 frames x 64", 1152))):
        for row in sweep(shape, *SHAPES[shape], width, arguments.small or number > 0):
            rows.append(row)
            write_rows(arguments.out, rows, fields)
            print({key: value for key, value in row.items() if value is not None}, flush=True)
    for direction in ("forward", "backward"):
        for shape, width in dict.fromkeys((row["shape"], row["width"]) for row in rows):
            timed = [r for r in rows if (r["shape"], r["width"], r["direction"]) == (shape, width, direction)]
            for row in sorted((row for row in timed if "ns" in row), key=lambda row: row["ns"])[:3]:
                print("best", {key: value for key, value in row.items() if value is not None})


if __name__ == "__main__":
    main()
