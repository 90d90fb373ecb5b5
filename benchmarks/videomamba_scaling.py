"""Figure 1 of VideoMamba's paper on one GPU: speed and memory against the number of frames, beside its rivals.

    python benchmarks/videomamba_scaling.py --out videomamba_scaling.csv --plot videomamba_scaling.png

Size Ti (24 blocks, width 192) on frames of 224 x 224 pixels, weights in bf16, batch 16, beyond 64 frames as many
videos as have 1,024 frames, or the largest power of two that fits. `forward` runs without gradients, `training` is a
forward and a backward. Speed is the median of several runs after two to warm up; memory is the peak above weights,
gradients and pixels, for one video. The rivals see the same tokens:

- `attention, materialised`: joint space-time attention whose matrix is stored, the paper's rival;
- `attention, fused`: the same by `scaled_dot_product_attention`, which the paper did not compare;
- `attention, fused, 12 blocks`: the same at the depth of DeiT-Ti, half of ours;
- `mamba-ssm`: two directions of its selective scan and of causal-conv1d, in autograd.

`PREDICTED` was written down before the first run of this script: ours from a count of the kernels' instructions (75 ns
a token and block), the rivals' from an earlier measurement on an H200. Rows are written as they are
measured, those of training first.
"""

import argparse
import csv
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from result_tables import hardware, row_writer
from torch import Tensor, nn
from torch.nn import functional as F

from video_ma2mba.modeling_video_ma2mba.configuration_videomamba import VideoMambaConfig
from video_ma2mba.modeling_video_ma2mba.modeling_videomamba import VideoMambaForVideoClassification

LENGTHS = (8, 16, 32, 64, 128, 256)
MOST_FRAMES = 1024  # of a batch
OURS = "ours"
# Of training: videos/s and GB a video at the lengths above; None: out of memory, or nothing known.
PREDICTED: dict[str, tuple[tuple[float, float] | None, ...]] = {
    OURS: ((350, 0.06), (177, 0.11), (88, 0.23), (44, 0.45), (22, 0.9), (11, 1.8)),
    "mamba-ssm": ((127, 0.43), (65.8, 0.86), (33.8, 1.71), (17.9, 3.41), (9.3, 6.82), (4.7, 13.6)),
    "attention, fused": ((438, 0.25), (235, 0.48), (102, 0.96), (32.5, 1.9), (9.2, 3.79), (2.5, 7.56)),
    "attention, fused, 12 blocks": ((876, 0.13), (470, 0.24), (204, 0.48), (65, 0.95), (18.4, 1.9), (5, 3.8)),
    "attention, materialised": ((187, 0.63), (55.5, 2.05), (15.2, 7.29), (4.1, 27.3), (1.1, 106), None),
}
COLOURS = dict(zip(PREDICTED, ("#1b7a4b", "#c98a1b", "#4a5fb5", "#9fb0e6", "#b5484a"), strict=True))
_MEASURED = ("batch", "videos_per_s", "gb_per_video", "ns_per_token_and_block")
_EXPECTED = ("predicted_videos_per_s", "predicted_gb_per_video", "note")
FIELDS = ("hardware", "torch", "implementation", "frames", "tokens", "step", *_MEASURED, *_EXPECTED)


class AttentionBlock(nn.Module):
    """A ViT's block; `fused` or with the matrix of attention stored."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1) @ v
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.between(x))


class MambaSsmBlock(nn.Module):
    """A block of VideoMamba on the kernels of mamba-ssm and causal-conv1d."""

    def __init__(self, width: int, state: int = 16) -> None:
        super().__init__()
        inner, self.rank, self.state = 2 * width, math.ceil(width / 16), state
        self.norm = nn.RMSNorm(width)
        self.in_proj, self.out_proj = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)
        self.convs = nn.ModuleList(nn.Conv1d(inner, inner, 4, groups=inner) for _ in range(2))
        self.x_projs = nn.ModuleList(nn.Linear(inner, self.rank + 2 * state, bias=False) for _ in range(2))
        self.dt_projs = nn.ModuleList(nn.Linear(self.rank, inner) for _ in range(2))
        rates = torch.arange(1, state + 1).float().log().expand(2, inner, state)
        self.A_log, self.D = nn.Parameter(rates.clone()), nn.Parameter(torch.ones(2, inner))

    def forward(self, stream: Tensor) -> Tensor:
        from causal_conv1d import causal_conv1d_fn
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        total = None
        projected = self.in_proj(self.norm(stream)).transpose(1, 2).contiguous()
        for k in range(2):
            x, z = (projected.flip(-1) if k else projected).chunk(2, dim=1)
            conv, step = self.convs[k], self.dt_projs[k]
            u = causal_conv1d_fn(x, conv.weight.squeeze(1), conv.bias, activation="silu")
            low, B, C = self.x_projs[k](u.transpose(1, 2)).split([self.rank, self.state, self.state], dim=-1)
            dt = (low @ step.weight.T).transpose(1, 2)
            B, C = B.transpose(1, 2).contiguous(), C.transpose(1, 2).contiguous()
            A, D, bias = -torch.exp(self.A_log[k].float()), self.D[k].float(), step.bias.float()
            y = selective_scan_fn(u, dt, A, B, C, D, z=z, delta_bias=bias, delta_softplus=True)
            total = y if total is None else total + y.flip(-1)
        return stream + self.out_proj(total.transpose(1, 2))


class Stack(nn.Module):
    """Patches, positions, blocks, a norm, and 400 classes from the first token."""

    def __init__(self, block: Callable[[], nn.Module], blocks: int, frames: int, width: int = 192) -> None:
        super().__init__()
        self.patches = nn.Linear(3 * 16 * 16, width)
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, frames * 196, width) * 0.02)
        self.blocks = nn.Sequential(*(block() for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 400)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = pixels.unflatten(-1, (14, 16)).unflatten(-3, (14, 16)).permute(0, 1, 3, 5, 2, 4, 6).flatten(4)
        tokens = self.patches(patches.flatten(1, 3)) + self.positions
        return self.head(self.norm(self.blocks(torch.cat([self.first.expand(len(tokens), 1, -1), tokens], 1))[:, 0]))


class Ours(nn.Module):
    """The package's classifier, pixels to logits."""

    def __init__(self, frames: int) -> None:
        super().__init__()
        self.model = VideoMambaForVideoClassification(VideoMambaConfig(num_frames=frames, num_labels=400))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels).logits


def build(name: str, frames: int) -> nn.Module:
    torch.manual_seed(0)
    if name == OURS:
        model: nn.Module = Ours(frames)
    elif name == "mamba-ssm":
        model = Stack(lambda: MambaSsmBlock(192), 24, frames)
    else:
        fused, blocks = "fused" in name, 12 if "12" in name else 24
        model = Stack(lambda: AttentionBlock(192, 3, fused), blocks, frames)
    return model.to("cuda", torch.bfloat16)


def measure(model: nn.Module, step: str, batch: int, frames: int) -> tuple[float, float]:
    """Seconds of a step of `batch` videos and bytes a video."""
    pixels = torch.randn(batch, frames, 3, 224, 224, device="cuda", dtype=torch.bfloat16)

    def run() -> None:
        if step == "forward":
            with torch.no_grad():
                model(pixels)
        else:
            model(pixels).float().logsumexp(-1).sum().backward()

    times: list[float] = []
    for number in range(12):
        if number == 2:  # compiled, and gradients are there
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if number >= 2:
            times.append(begin.elapsed_time(end) / 1000)
        if number >= 3 and sum(times) > 1.5:
            break
    return statistics.median(times), (torch.cuda.max_memory_allocated() - before) / batch


def point(name: str, step: str, frames: int, most: int) -> dict:
    """A row: `most` videos, or as many as fit."""
    tokens = 1 + frames * 196
    row = {"implementation": name, "frames": frames, "tokens": tokens, "step": step}
    guess = PREDICTED[name][LENGTHS.index(frames)] if step == "training" and frames in LENGTHS else None
    if guess:
        row |= {"predicted_videos_per_s": guess[0], "predicted_gb_per_video": guess[1]}
    batch = most = min(most, max(MOST_FRAMES // frames, 1))
    if "materialised" in name:  # do not try what cannot fit: one matrix, or all of them
        matrices = 2 * 3 * tokens**2 * (24 if step == "training" else 3)
        fits = 0.9 * torch.cuda.get_device_properties(0).total_memory // matrices
        batch = min(most, 1 << int(math.log2(fits))) if fits >= 1 else 0
    model = build(name, frames)
    while batch:
        try:
            seconds, peak = measure(model, step, batch, frames)
            break
        except torch.cuda.OutOfMemoryError:
            batch //= 2
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    if not batch:
        return {**row, "note": "out of memory"}
    blocks = 12 if "12" in name else 24
    nanoseconds = seconds * 1e9 / (batch * tokens * blocks)
    row |= {"batch": batch, "videos_per_s": f"{batch / seconds:.4g}", "gb_per_video": f"{peak / 1e9:.4g}"}
    return row | {"ns_per_token_and_block": f"{nanoseconds:.4g}"}


def draw(table: Path, picture: Path) -> None:
    """Training: speed and memory against frames, both axes logarithmic; crosses are the predictions for ours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with table.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["step"] == "training" and row["videos_per_s"]]
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), dpi=120)
    for axes, column, title in zip(
        panels, ("videos_per_s", "gb_per_video"), ("videos per second", "GB a video"), strict=True
    ):
        for name, colour in COLOURS.items():
            own = [row for row in rows if row["implementation"] == name]
            points = [(int(row["frames"]), row) for row in sorted(own, key=lambda row: int(row["frames"]))]
            axes.plot(
                [x for x, _ in points], [float(row[column]) for _, row in points], "o-", color=colour, label=name
            )
            if name == OURS:
                guesses = [float(row[f"predicted_{column}"] or "nan") for _, row in points]
                axes.plot([x for x, _ in points], guesses, "x", color=colour, label="ours, predicted")
        axes.set(xscale="log", yscale="log", xlabel="frames", title=title)
        axes.set_xticks(LENGTHS, [str(frames) for frames in LENGTHS])
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"A training step of VideoMamba-Ti, 224 x 224, bf16, {rows[0]['hardware']}", fontsize=11)
    figure.tight_layout()
    figure.savefig(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV to write, row by row")
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    parser.add_argument("--frames", default=",".join(map(str, LENGTHS)), help="lengths, separated by commas")
    parser.add_argument("--only", default=";".join(PREDICTED), help="implementations, separated by semicolons")
    parser.add_argument("--batch", type=int, default=16, help="largest batch")
    parser.add_argument("--max-seconds", type=float, default=440, help="begin no measurement after this time")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: needs a CUDA device")
    names = arguments.only.split(";")
    if unknown := set(names) - set(PREDICTED):
        sys.exit(f"error: there is no {sorted(unknown)[0]!r}; --only takes {'; '.join(PREDICTED)}")
    lengths = [int(frames) for frames in arguments.frames.split(",")]
    begun = time.monotonic()
    write = row_writer(arguments.out, FIELDS, hardware=hardware("cuda"), torch=torch.__version__)
    for step, frames, name in itertools.product(("training", "forward"), lengths, names):
        if time.monotonic() - begun > arguments.max_seconds:
            write({"implementation": name, "frames": frames, "step": step, "note": "no time left"})
            continue
        try:
            row = point(name, step, frames, arguments.batch)
        except (RuntimeError, ImportError) as error:  # a rival that is not there or fails is a result, too
            row = {"implementation": name, "frames": frames, "step": step, "note": str(error)[:200]}
        write(row)
        torch.cuda.empty_cache()
    if arguments.plot:
        draw(arguments.out, arguments.plot)


if __name__ == "__main__":
    main()
