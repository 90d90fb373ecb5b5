"""What a state file says of itself before its tensors are looked at; needs neither torch nor transformers.

Format 2 holds, for every kind of layer state, its tensors with a leading layer axis as "KIND.FIELD", and in the header
"layers" (the kind of each layer, in order), "kinds" (kind -> version of its tensors' meaning), "seen_tokens",
"metadata" (both JSON) and "checksum". Format 1, of the first release, knew one kind: its tensors are "conv" and "ssm".
"""

import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

FORMAT_VERSION = 2
FIRST_KIND = "mamba2"
"""The only kind of layer that format 1 knew."""
_STORED = {"F16": ("torch.float16", 2), "BF16": ("torch.bfloat16", 2), "F32": ("torch.float32", 4),
           "F64": ("torch.float64", 8)}  # fmt: skip
_LONGEST_HEADER = 100_000_000  # as in safetensors


class KindInFiles(NamedTuple):
    """What a file must know of a kind of layer: the same as its class in `state_layers` says."""

    version: int
    fields: tuple[str, ...]
    wide: tuple[str, ...]


KINDS_IN_FILES = {FIRST_KIND: KindInFiles(1, ("conv", "ssm"), ("ssm",))}


class StateHeader(NamedTuple):
    """What a header says: `layers` is None in format 1, where the tensors tell how many there are."""

    format_version: int
    seen_tokens: int
    metadata: dict[str, str]
    versions: dict[str, int]
    layers: list[str] | None

    def tensor_name(self, kind: str, field: str) -> str:
        """What a field of a kind's stacked tensors is called in the file."""
        return field if self.format_version == 1 else f"{kind}.{field}"


class StateSummary(NamedTuple):
    """What `summarise` found: the kind of every layer; bytes that the state takes in memory."""

    header: StateHeader
    kinds: list[str]
    nbytes: int


def is_state_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins like a state (as safetensors: the length of a header, then the header).

    No video, image or text begins so. Damage further inside is for `VideoState.load` to name.
    """
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        head = file.read(9)
    return len(head) == 9 and int.from_bytes(head[:8], "little") < 2**27 and head[8:] == b"{"


def parse_header(facts: Mapping[str, str], name: str) -> StateHeader:
    """The header's fields from its texts; ValueError, naming the file as `name`, where they make no sense."""
    version = _version_of(facts, name)
    try:
        seen, metadata = int(facts["seen_tokens"]), dict(json.loads(facts["metadata"]))
        if not 0 <= seen < 2**63:
            raise ValueError(f"seen_tokens={seen}")
        if not all(isinstance(text, str) for entry in metadata.items() for text in entry):
            raise ValueError("its metadata are not all text")
        versions = {FIRST_KIND: 1} if version == 1 else dict(json.loads(facts["kinds"]))
        layers = None if version == 1 else list(json.loads(facts["layers"]))
        if not all(isinstance(kind, str) and type(number) is int for kind, number in versions.items()):
            raise ValueError("its kinds of layers have no names and versions")
        if layers is not None and (not layers or {*map(str, layers)} != versions.keys()):
            raise ValueError("its layers are of other kinds than it says")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} has a damaged header: {error}") from error
    return StateHeader(version, seen, metadata, versions, layers)


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


def refuse_unknown(
    header: StateHeader, tensors: Iterable[str], name: str, kinds: Mapping[str, KindInFiles] = KINDS_IN_FILES
) -> None:
    """ValueError unless all kinds of layers are among `kinds`, and the file holds their tensors and no others."""
    found, expected = set(tensors), set()
    for kind, number in header.versions.items():
        known = kinds.get(kind)
        if known is None or number > known.version:
            knows = "none" if known is None else f"up to {known.version}"
            raise ValueError(
                f"{name} holds layers of kind {kind!r} in version {number}, of which this version of the package "
                f"knows {knows}: upgrade video-ma2mba"
            )
        expected |= {header.tensor_name(kind, field) for field in known.fields}
    if found != expected:
        raise ValueError(f"{name} is not a video state: it holds {sorted(found)}, not {sorted(expected)}")


def bytes_checksum(tensors: Mapping[str, tuple[str, Sequence[int], Any]], facts: Mapping[str, str]) -> str:
    """CRC-32 of the tensors' bytes, sizes and types and of the header's other fields, as hexadecimal text.

    Args:
        tensors: by name the type (as PyTorch writes it), the sizes and the bytes.
    """
    described = [[name, dtype, list(shape)] for name, (dtype, shape, _) in sorted(tensors.items())]
    rest: Sequence[Any] = [facts["seen_tokens"], facts["metadata"]]
    rest = [*rest, *(facts[name] for name in ("layers", "kinds") if name in facts)]
    crc = zlib.crc32(json.dumps([described, *rest]).encode())
    for _, (_, _, content) in sorted(tensors.items()):
        crc = zlib.crc32(content, crc)
    return f"{crc:08x}"


def summarise(path: str | os.PathLike[str]) -> StateSummary:
    """What a state file has seen, in milliseconds: its header, held against the checksum of all that it holds.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is damaged, not a state, or of a newer release.
    """
    name = repr(os.fspath(path))
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no state file {name}")
    with open(path, "rb") as file:
        content = memoryview(file.read())
    length = int.from_bytes(content[:8], "little")
    try:
        if not 2 <= length <= min(_LONGEST_HEADER, len(content) - 8):
            raise ValueError("its header is cut off or none")
        entries = dict(json.loads(bytes(content[8 : 8 + length])))
        facts = dict(entries.pop("__metadata__", {}))
        if not all(isinstance(text, str) for text in facts.values()):
            raise ValueError("its header is no text")
        tensors = {key: _stored(entry, content[8 + length :]) for key, entry in entries.items()}
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
        raise ValueError(f"{name} is not a readable state file: {error}") from error
    header = parse_header(facts, name)
    refuse_unknown(header, tensors, name)
    if facts.get("checksum") != bytes_checksum(tensors, facts):
        raise ValueError(f"{name} is damaged: its checksum does not match what it holds")
    kinds = {kind: KINDS_IN_FILES[kind] for kind in header.versions}
    wide = {header.tensor_name(kind, field) for kind, known in kinds.items() for field in known.wide}
    nbytes = sum(max(len(data), 4 * math.prod(shape) if key in wide else 0)
                 for key, (_, shape, data) in tensors.items())  # fmt: skip
    layers = header.layers or [FIRST_KIND] * next(iter(tensors.values()))[1][0]
    return StateSummary(header, layers, nbytes)


def _stored(entry: Mapping[str, Any], content: memoryview) -> tuple[str, list[int], memoryview]:
    """One entry of a safetensors header: type, sizes and bytes; ValueError where they do not fit."""
    dtype, size = _STORED[entry["dtype"]]
    shape, (begin, end) = [int(n) for n in entry["shape"]], entry["data_offsets"]
    if not shape or not 0 <= begin <= end <= len(content) or end - begin != size * math.prod(shape):
        raise ValueError("a tensor is cut off")
    return dtype, shape, content[begin:end]
