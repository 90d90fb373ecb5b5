"""The selective scan's Triton kernels beside their PyTorch twin: relative differences, on a GPU or interpreted.

As a script it interprets the kernels on a CPU, in a process of its own because Triton decides at import whether it
does: one line of JSON for each case on stdin.
"""

import json
import sys

import torch
from torch import Tensor

from video_ma2mba.modeling_video_ma2mba.configuration_videomamba import VideoMambaConfig
from video_ma2mba.modeling_video_ma2mba.modeling_videomamba import VideoMambaForVideoClassification
from video_ma2mba.modeling_video_ma2mba.ops_registry import force_backend
from video_ma2mba.modeling_video_ma2mba.ops_selective_scan import directional_conv, selective_scan


def relative(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of what is expected."""
    return float(((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).detach())


def turned(states: Tensor | None) -> Tensor | None:
    return None if states is None else states.transpose(-1, -2).contiguous()


def scan_differences(
    device: str = "cpu",
    dtype: str = "float32",
    batch: int = 2,
    tokens: int = 21,
    channels: int = 32,
    state: int = 4,
    width: int = 4,
    rank: int = 8,
    reverse: tuple[bool, ...] = (False, True),
    initial: bool = True,
    gated: bool = True,
    settings: dict | None = None,
) -> dict[str, float]:
    """Every result and gradient of convolution and scan, starting and final states included."""
    from video_ma2mba.modeling_video_ma2mba import ops_selective_scan_triton as kernels

    torch.manual_seed(0)
    kind, directions = getattr(torch, dtype), len(reverse)

    def random(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=device).to(of)

    kernels.force_settings(kernels.ScanSettings(**settings) if settings else None)
    x, z = random(batch, tokens, 2 * channels, of=kind).chunk(2, dim=-1)
    weight, bias = random(directions, channels, width), random(directions, channels)
    found = {"conv": kernels.conv_forward(x, weight, bias, reverse)}
    x_given, *conv_given = (t.clone().requires_grad_() for t in (x, weight, bias))
    expected = {"conv": directional_conv(x_given.float(), *conv_given, reverse)}
    u, du = found["conv"], random(*found["conv"].shape, of=kind)
    gradients = torch.autograd.grad(expected["conv"], (x_given, *conv_given), du.float())
    expected |= dict(zip(("dx", "dweight", "dbias"), gradients, strict=True))
    found["dx"] = torch.empty(batch, tokens, 2 * channels, dtype=kind, device=device)[..., :channels]
    found["dweight"], found["dbias"] = kernels.conv_backward(x, weight, bias, du, reverse, found["dx"])

    dt = random(directions, batch, tokens, channels, of=kind)
    bc = random(directions, batch, tokens, rank + 2 * state, of=kind)
    rates = -torch.rand(directions, channels, state, device=device) * 8
    skip, step_bias = random(directions, channels), random(directions, channels)
    start = random(directions, batch, channels, state) if initial else None
    dy = random(batch, tokens, channels, of=kind)
    dend = random(directions, batch, channels, state) if initial else None
    leaves = [t.detach().clone().requires_grad_() for t in (u, dt, bc, rates, skip, step_bias, z)]
    uu, dd, bb, aa, ss, bi, zz = leaves
    if initial:
        leaves.append(start.clone().requires_grad_())
    _, b, c = bb.split([rank, state, state], dim=-1)
    y, end = selective_scan(uu, dd, aa, b, c, ss, bi, zz if gated else None, leaves[7] if initial else None, reverse)
    loss = (y.sum(0, dtype=torch.float32) * dy.float()).sum() + ((end * dend).sum() if initial else 0)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    expected |= {"y": y, "end": end}
    expected |= dict(zip(("du", "ddt", "dbc", "dA", "dD", "ddt_bias", "dz", "dstart"), gradients, strict=False))
    expected["dbc"] = expected["dbc"][..., rank:]

    given = kernels.ScanInputs(
        u, dt, bc, rank, z if gated else None, kernels.decay_rates(rates), skip, step_bias, reverse
    )
    found["y"], last, kept = kernels.scan_forward(given, turned(start), keep=True)
    back = kernels.scan_backward(given, kept, dy, turned(dend))
    found |= {"end": turned(last), "du": back.du, "ddt": back.ddt, "dbc": back.dbc, "dA": back.dA, "dD": back.dskip}
    found |= {"ddt_bias": back.dbias, "dstart": turned(back.dinitial)}
    if gated:
        found["dz"] = back.dz.sum(0)
    result = {name: relative(value, expected[name]) for name, value in found.items() if expected.get(name) is not None}
    result["y again"] = relative(back.y, y)
    kernels.force_settings(None)
    return result


def model_differences(
    device: str = "cpu", dtype: str = "float32", autocast: bool = False, settings: dict | None = None, **sizes
) -> dict[str, float]:
    """Logits and gradients of a small classifier, whole blocks and mixers between other modules, beside PyTorch's
    without autocast; under autocast PyTorch's own differences, too."""
    from video_ma2mba.modeling_video_ma2mba import ops_selective_scan_triton as kernels

    kernels.force_settings(kernels.ScanSettings(**settings) if settings else None)
    torch.manual_seed(0)
    fields = dict(hidden_size=16, num_hidden_layers=2, state_size=4, image_size=32, num_frames=2, num_labels=5)
    model = VideoMambaForVideoClassification(VideoMambaConfig(**fields | sizes)).to(device, getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    clip = torch.randn(2, model.config.num_frames, 3, 32, 32, device=device, dtype=getattr(torch, dtype))
    runs = {}
    names = ("whole blocks", "mixers") if not autocast else ("torch under autocast", "whole blocks", "mixers")
    for name in ("torch", *names):
        mixed = autocast and name != "torch"
        hook = (lambda *_: None) if name == "mixers" else None  # a hook on a projection calls for modules
        handles = [block.mixer.in_proj.register_forward_hook(hook) for block in model.videomamba.layers if hook]
        with force_backend("torch" if name.startswith("torch") else "triton"):
            with torch.autocast(device, torch.bfloat16, enabled=mixed):
                logits = model(clip).logits
            gradients = torch.autograd.grad(logits.float().square().sum(), list(model.parameters()))
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=mixed):
                without = model(clip).logits
        runs[name] = (logits, without, torch.cat([g.float().flatten() for g in gradients]))
        for handle in handles:
            handle.remove()
    return {
        f"{name} {what}": relative(runs[name][i], runs["torch"][i])
        for name in names
        for i, what in enumerate(("logits", "logits without gradients", "gradients"))
    }


if __name__ == "__main__":
    for line in sys.stdin:
        case = json.loads(line)
        print(json.dumps((model_differences if case.pop("model", False) else scan_differences)(**case)), flush=True)
