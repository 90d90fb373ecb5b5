"""Where a module's weights compute, and whether a checkpoint brought all of them."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn


def execution_device(module: nn.Module) -> torch.device:
    """Device of `module`'s computation. With offloading (accelerate's hooks) its weights may be on the meta device."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    tensors = chain(module.parameters(), module.buffers())
    # Linear layers that `torch.ao.quantization` has replaced hold neither, and compute on the CPU.
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`, without waiting where that is CUDA: other devices may copy when the source is gone."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def in_fp64(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in fp64, on the CPU where its device has no such type (MPS)."""
    try:
        return tensor.double()
    except TypeError:
        return tensor.cpu().double()


def quantised_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of linear layers' weights that are no parameters, because something has put its own layers
    there: `torch.ao.quantization.quantize_dynamic` some with a `weight()` to call, others some with buffers."""
    for name, module in model.named_modules():
        if not hasattr(module, "out_features") or isinstance(getattr(module, "weight", None), nn.Parameter):
            continue
        if any(True for _ in module.parameters()):
            continue  # a wrapper around the layer (an adapter): the layer itself comes, too
        if callable(getattr(module, "weight", None)):
            weight = module.weight()
            yield f"{name}.weight()", weight.dequantize() if weight.is_quantized else weight
        else:
            yield from ((f"{name}.{part}", buffer) for part, buffer in module.named_buffers())


def refuse_incomplete(name: Any, report: dict[str, Any], accept_other_sizes: bool = False) -> None:
    """Raise unless transformers' loading report says that every parameter came from the checkpoint.

    transformers only warns about tensors that a checkpoint lacks, and old versions of it name the tensors of vision
    towers differently: without this check a model with a random tower would answer, fluently and wrongly.

    Args:
        name: directory or Hub id, for the message.
        report: what `from_pretrained(..., output_loading_info=True)` returns beside the model.
        accept_other_sizes: the caller asked for `ignore_mismatched_sizes`.

    Raises:
        ValueError: tensors are missing or have other sizes than the configuration says; names the first of them.
    """
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"checkpoint {name} lacks {len(missing)} of the model's tensors: {_first(missing)}; it is incomplete, or "
            "was saved for another architecture or by a transformers version older than 5.6"
        )
    other = sorted(report["mismatched_keys"], key=lambda entry: entry[0])
    if other and not accept_other_sizes:
        shapes = [f"{key} is {list(found)} instead of {list(wanted)}" for key, found, wanted in other]
        raise ValueError(f"checkpoint {name} does not fit its config.json: {_first(shapes)}")


def _first(items: list[str], count: int = 3) -> str:
    return ", ".join(items[:count]) + (f" and {len(items) - count} more" if len(items) > count else "")
