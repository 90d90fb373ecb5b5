"""VideoMamba written down from the paper's equations, one token at a time: the tests' independent reference.

Works on a dictionary of tensors under the names of the released checkpoints, in whatever type they have.
"""

import math

import torch


def softplus(x):
    return torch.where(x > 30, x, torch.log1p(torch.exp(x.clamp(max=30))))


def silu(x):
    return x / (1 + torch.exp(-x))


def scan_one_way(x, z, w, suffix, rank, state_size):
    """One direction for one clip: x, z (L, E) in the direction's order -> gated y (L, E)."""
    taps, bias = w[f"conv1d{suffix}.weight"][:, 0], w[f"conv1d{suffix}.bias"]
    a = -torch.exp(w[f"A{suffix}_log"])
    state = torch.zeros_like(a)
    out = []
    for t in range(len(x)):
        mixed = bias
        for k in range(taps.shape[1]):
            at = t - (taps.shape[1] - 1) + k
            if at >= 0:
                mixed = mixed + taps[:, k] * x[at]
        u = silu(mixed)
        low = w[f"x_proj{suffix}.weight"] @ u
        b, c = low[rank : rank + state_size], low[rank + state_size :]
        dt = softplus(w[f"dt_proj{suffix}.weight"] @ low[:rank] + w[f"dt_proj{suffix}.bias"])
        state = torch.exp(dt[:, None] * a) * state + (dt * u)[:, None] * b[None]
        out.append((state @ c + w[f"D{suffix}"] * u) * silu(z[t]))
    return torch.stack(out)


def mixer(hidden, w, rank, state_size, orders=("spatial", "spatial"), temporal=None):
    """hidden (L, C) -> (L, C); `orders` are those of the forward and the backward scan."""
    x, z = (hidden @ w["in_proj.weight"].T).chunk(2, dim=-1)
    total = 0
    for suffix, order in zip(("", "_b"), orders, strict=True):
        index = torch.arange(len(x)) if order == "spatial" else temporal
        if suffix == "_b":
            index = index.flip(0)
        y = scan_one_way(x[index], z[index], w, suffix, rank, state_size)
        back = torch.empty_like(index)
        back[index] = torch.arange(len(index))
        total = total + y[back]
    return total @ w["out_proj.weight"].T


def rms_norm(x, weight, eps=1e-5):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def embed(clip, tensors):
    """clip (T, 3, H, W) -> tokens (1 + t P, C), the class token first."""
    kernel = tensors["patch_embed.proj.weight"]
    if kernel.ndim == 4:
        kernel = kernel[:, :, None]
    tubelet, side = kernel.shape[2], kernel.shape[3]
    rows, columns = clip.shape[2] // side, clip.shape[3] // side
    tokens = [tensors["cls_token"][0, 0] + tensors["pos_embed"][0, 0]]
    for t in range(clip.shape[0] // tubelet):
        for i in range(rows):
            for j in range(columns):
                patch = clip[t * tubelet :][:tubelet, :, i * side :, j * side :][:, :, :side, :side].transpose(0, 1)
                token = (kernel * patch).sum(dim=(1, 2, 3, 4)) + tensors["patch_embed.proj.bias"]
                token = token + tensors["pos_embed"][0, 1 + i * columns + j]
                if "temporal_pos_embedding" in tensors:
                    token = token + tensors["temporal_pos_embedding"][0, t]
                tokens.append(token)
    return torch.stack(tokens)


def logits(clip, tensors, orders_of_layer=None):
    """Class scores of one clip (T, 3, H, W), already normalised."""
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("layers."))
    stream = embed(clip, tensors)
    width = stream.shape[1]
    frames = clip.shape[0] // (
        tensors["patch_embed.proj.weight"].shape[2] if "temporal_pos_embedding" in tensors else 1
    )
    patches = (len(stream) - 1) // frames
    temporal = torch.tensor([0, *(1 + f * patches + p for p in range(patches) for f in range(frames))])
    for layer in range(depth):
        start = f"layers.{layer}."
        w = {name.removeprefix(start + "mixer."): value for name, value in tensors.items() if name.startswith(start)}
        rank, state_size = math.ceil(width / 16), w["A_log"].shape[1]
        orders = orders_of_layer(layer) if orders_of_layer else ("spatial", "spatial")
        normed = rms_norm(stream, tensors[start + "norm.weight"])
        stream = stream + mixer(normed, w, rank, state_size, orders, temporal)
    pooled = rms_norm(stream, tensors["norm_f.weight"])[0]
    return tensors["head.weight"] @ pooled + tensors["head.bias"]
