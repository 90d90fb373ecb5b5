"""Where a module computes, which under `device_map` is not always where its weights are."""

import torch
from torch import nn


def execution_device(module: nn.Module) -> torch.device:
    """Device of `module`'s computation. With offloading (accelerate's hooks) its weights may be on the meta device."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return next(module.parameters()).device
