"""State files: one safetensors file, complete or not there at all, whole or refused.

Format 2 holds, for every kind of layer state, its tensors with a leading layer axis as "KIND.FIELD", and in the header
"layers" (the kind of each layer, in order), "kinds" (kind -> version of its tensors' meaning), "seen_tokens",
"metadata" (both JSON) and "checksum". Format 1, of the first release, knew one kind: its tensors are "conv" and "ssm".
"""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .state_layers import KINDS, LayerState, Mamba2State, tensor_dtype
from .state_writing import whole_file

FORMAT_VERSION = 2
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
        save_file(tensors, draft, metadata=facts)


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
    version = _version_of(facts, name)
    if any(tensor.dtype not in _STORED for tensor in tensors.values()):
        raise ValueError(f"{name} is not a video state: it holds tensors of types that no state has")
    try:
        seen, metadata = int(facts["seen_tokens"]), dict(json.loads(facts["metadata"]))
        if not 0 <= seen < 2**63:
            raise ValueError(f"seen_tokens={seen}")
        if not all(isinstance(text, str) for entry in metadata.items() for text in entry):
            raise ValueError("its metadata are not all text")
        versions = {Mamba2State.kind: 1} if version == 1 else dict(json.loads(facts["kinds"]))
        layers = None if version == 1 else list(json.loads(facts["layers"]))
        if not all(isinstance(kind, str) and type(number) is int for kind, number in versions.items()):
            raise ValueError("its kinds of layers have no names and versions")
        if layers is not None and (not layers or {*map(str, layers)} != versions.keys()):
            raise ValueError("its layers are of other kinds than it says")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} has a damaged header: {error}") from error
    prefix = {kind: "" if version == 1 else f"{kind}." for kind in versions}
    expected = {f"{prefix[kind]}{field}" for kind in versions if kind in KINDS for field in KINDS[kind]._fields}
    if versions.keys() <= KINDS.keys() and tensors.keys() != expected:
        raise ValueError(f"{name} is not a video state: it holds {sorted(tensors)}, not {sorted(expected)}")
    if facts.get("checksum") != checksum(tensors, facts):
        raise ValueError(f"{name} is damaged: its checksum does not match what it holds")
    _refuse_unknown(versions, name)
    stacks = {
        kind: KINDS[kind]._make(_as_computed(tensors[f"{prefix[kind]}{field}"], kind, field, name)
                                for field in KINDS[kind]._fields)
        for kind in versions
    }  # fmt: skip
    if layers is None:
        layers = [Mamba2State.kind] * (*tensors["conv"].shape, 0)[0]
    return StateContents(layers, stacks, seen, metadata, version)


def _version_of(facts: Mapping[str, str], name: str) -> int:
    text = facts.get("format_version", "")
    if not text.isdecimal() or not text.isascii() or len(text) > 9 or int(text) < 1:
        raise ValueError(f"{name} is not a video state")
    if int(text) > FORMAT_VERSION:
        raise ValueError(
            f"{name} has format version {text}, and this version of the package reads up to {FORMAT_VERSION}: upgrade "
            "video-ma2mba"
        )
    return int(text)


def _refuse_unknown(versions: Mapping[str, int], name: str) -> None:
    for kind, number in versions.items():
        if kind not in KINDS or number > KINDS[kind].version:
            known = f"up to {KINDS[kind].version}" if kind in KINDS else "none"
            raise ValueError(
                f"{name} holds layers of kind {kind!r} in version {number}, of which this version of the package "
                f"knows {known}: upgrade video-ma2mba"
            )


def _as_computed(tensor: Tensor, kind: str, field: str, name: str) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} holds values that are not finite in {field!r}")
    return tensor.to(tensor_dtype(KINDS[kind], field, tensor.dtype))


def checksum(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    """CRC-32 of the tensors' bytes, sizes and types and of the header's other fields, as hexadecimal text."""
    described = [[name, str(tensor.dtype), list(tensor.shape)] for name, tensor in sorted(tensors.items())]
    rest: Sequence[Any] = [facts["seen_tokens"], facts["metadata"]]
    rest = [*rest, *(facts[name] for name in ("layers", "kinds") if name in facts)]
    crc = zlib.crc32(json.dumps([described, *rest]).encode())
    for _, tensor in sorted(tensors.items()):
        crc = zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def is_state_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins like a state (as safetensors: the length of a header, then the header).

    No video, image or text begins so. Damage further inside is for `VideoState.load` to name.
    """
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        head = file.read(9)
    return len(head) == 9 and int.from_bytes(head[:8], "little") < 2**27 and head[8:] == b"{"
