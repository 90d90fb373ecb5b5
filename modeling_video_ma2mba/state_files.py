"""State files: one safetensors file, complete or not there at all, whole or refused; `state_header` has the format."""

import json
import os
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .state_header import FIRST_KIND, FORMAT_VERSION, KindInFiles, bytes_checksum, parse_header, refuse_unknown
from .state_layers import KINDS, LayerState, tensor_dtype
from .state_writing import whole_file

_STORED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class StateContents(NamedTuple):
    """What is in a state file: the kind of each layer, stacked tensors by kind, and the rest of a `VideoState`."""

    kinds: list[str]
    stacks: dict[str, LayerState]
    seen_tokens: int
    metadata: dict[str, str]
    format_version: int = FORMAT_VERSION


def write_state(path: str | os.PathLike[str], contents: StateContents, dtype: torch.dtype | None) -> None:
    """Write a file of the newest format; see `VideoState.save`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"there is no folder {folder!r} to save the state in")
    tensors: dict[str, Tensor] = {}
    for kind, stacked in contents.stacks.items():
        for field, tensor in zip(stacked._fields, stacked, strict=True):
            tensor = _rounded(tensor, dtype, field in stacked.wide)
            tensors[f"{kind}.{field}"] = tensor.detach().cpu().contiguous()
    metadata = dict(contents.metadata)
    if dtype in (torch.bfloat16, torch.float16):
        metadata["rounded_to"] = str(dtype).removeprefix("torch.")
    facts = {"format_version": str(FORMAT_VERSION), "seen_tokens": str(contents.seen_tokens)}
    facts["metadata"] = json.dumps(metadata)
    facts["layers"] = json.dumps(contents.kinds)
    facts["kinds"] = json.dumps({kind: KINDS[kind].version for kind in contents.stacks})
    facts["checksum"] = checksum(tensors, facts)
    with whole_file(path) as draft:
        try:
            save_file(tensors, draft, metadata=facts)
        except SafetensorError as error:
            raise OSError(f"{os.fspath(path)}: the state cannot be written: {error}") from error


def _rounded(tensor: Tensor, dtype: torch.dtype | None, wide: bool) -> Tensor:
    """A tensor as it is stored: wide ones, nearly all of the file, in `dtype`, no other in more bytes than that."""
    if dtype not in (None, torch.bfloat16, torch.float16, tensor.dtype) and wide:
        raise ValueError(f"a state is saved in bfloat16, float16 or as it is, not in {dtype}")
    if dtype not in (torch.bfloat16, torch.float16):
        return tensor
    if wide and not tensor.to(dtype).isfinite().all():
        raise ValueError(f"the state holds values too large for {dtype}: save it in bfloat16")
    return tensor.to(dtype) if wide or tensor.element_size() > dtype.itemsize else tensor


def read_state(path: str | os.PathLike[str]) -> StateContents:
    """Read a file of any format up to the newest; see `VideoState.load`."""
    from safetensors import SafetensorError, safe_open

    name = repr(os.fspath(path))
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no state file {name}")
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            # Copies: Windows replaces no file that is mapped into memory, and a state is saved where it came from.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{name} is not a readable state file: {error}") from error
    header = parse_header(facts, name)
    if any(tensor.dtype not in _STORED for tensor in tensors.values()):
        raise ValueError(f"{name} is not a video state: it holds tensors of types that no state has")
    known = {kind: KindInFiles(own.version, own._fields, own.wide) for kind, own in KINDS.items()}
    refuse_unknown(header, tensors, name, known)
    if facts.get("checksum") != checksum(tensors, facts):
        raise ValueError(f"{name} is damaged: its checksum does not match what it holds")
    stacks = {
        kind: KINDS[kind]._make(_as_computed(tensors[header.tensor_name(kind, field)], kind, field, name)
                                for field in KINDS[kind]._fields)
        for kind in header.versions
    }  # fmt: skip
    layers = header.layers or [FIRST_KIND] * (*tensors["conv"].shape, 0)[0]
    return StateContents(layers, stacks, header.seen_tokens, header.metadata, header.format_version)


def _as_computed(tensor: Tensor, kind: str, field: str, name: str) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} holds values that are not finite in {field!r}")
    return tensor.to(tensor_dtype(KINDS[kind], field, tensor.dtype))


def checksum(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    """`bytes_checksum` of tensors."""
    flat = {name: tensor.flatten().view(torch.uint8).numpy().data for name, tensor in tensors.items()}
    return bytes_checksum({name: (str(t.dtype), t.shape, flat[name]) for name, t in tensors.items()}, facts)
