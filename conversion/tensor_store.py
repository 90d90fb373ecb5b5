"""Checkpoint files read and written one tensor at a time, so that memory does not grow with the checkpoint.

Reading never runs code from a file: safetensors hold none, and pickles are loaded with `weights_only`.
"""

import argparse
import json
import math
import pickle
import re
import struct
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# Names of the safetensors format.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """What a checkpoint's index says about a tensor: `dtype` as in `DTYPES`, and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the data, without any header."""
        return self.numel * DTYPES[self.dtype].itemsize


class TensorStore:
    """The tensors of one checkpoint: a folder (safetensors before pickles) or a single file.

    Only one file is open at a time, and reading in the order of `specs` opens each once: memory is that of the largest
    file at most.

    Attributes:
        specs: name -> `TensorSpec`, in the order of the files.

    Raises:
        FileNotFoundError: no weights, or fewer files than the index names. ValueError: a file that cannot be read
            safely, an index that names tensors the files lack or files elsewhere, or a tensor stored twice.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self.specs: dict[str, TensorSpec] = {}
        self._file_of: dict[str, Path] = {}
        self._open_path: Path | None = None
        self._open_file: Callable[[str], Tensor] | None = None
        self._stack = ExitStack()
        files, indexed = _files(path, name)
        for file in files:
            for key, spec in self._list(file).items():
                if key in self.specs:
                    raise ValueError(f"{name} holds the tensor {key} twice: in {self._file_of[key].name}, {file.name}")
                self.specs[key], self._file_of[key] = spec, file
        if absent := sorted(indexed - self.specs.keys()):
            raise ValueError(
                f"{name} is incomplete: its files lack {len(absent)} tensors of its index: {', '.join(absent[:5])}"
            )

    def read(self, key: str) -> Tensor:
        """The tensor of that name, bit for bit, on the CPU."""
        file = self._file_of[key]
        if file != self._open_path:
            self.close()
            self._open_path, self._open_file = file, self._open(file)
        return self._open_file(key)

    def close(self) -> None:
        """Let go of the file that is open; reading opens it again."""
        self._stack.close()
        self._open_path = self._open_file = None

    def _list(self, file: Path) -> dict[str, TensorSpec]:
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt") as tensors:
                    slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118 (no mapping)
                    found = {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
            except SafetensorError as error:
                raise ValueError(f"{file.name} of {self.name} is damaged: {error}") from error
        else:
            tensors = _unpickle(file, self.name)
            found = {key: (_DTYPE_NAMES.get(t.dtype, str(t.dtype)), tuple(t.shape)) for key, t in tensors.items()}
        for key, (dtype, _) in found.items():
            if dtype not in DTYPES:
                raise ValueError(f"{self.name}: tensor {key} has the type {dtype}, which is not supported")
        return {key: TensorSpec(dtype, shape) for key, (dtype, shape) in found.items()}

    def _open(self, file: Path) -> Callable[[str], Tensor]:
        if file.suffix == ".safetensors":
            return self._stack.enter_context(safe_open(file, "pt")).get_tensor
        return _unpickle(file, self.name).__getitem__


def _files(path: Path, name: str) -> tuple[list[Path], set[str]]:
    """Weight files of a checkpoint, and the tensors its index (if any) promises."""
    if path.is_file():
        return [path], set()
    for index_name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if not (path / index_name).is_file():
            continue
        weight_map: dict[str, str] = json.loads((path / index_name).read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
        if foreign := [file for file in files if Path(file).name != file]:
            raise ValueError(f"{index_name} of {name} names files outside its folder: {', '.join(foreign[:3])}")
        if absent := [file for file in files if not (path / file).is_file()]:
            raise FileNotFoundError(f"{name} is incomplete: {len(absent)} files are missing: {', '.join(absent)}")
        return [path / file for file in files], set(weight_map)
    for single in ("model.safetensors", "pytorch_model.bin", "mm_projector.bin"):
        if (path / single).is_file():
            return [path / single], set()
    if files := sorted(path.glob("*.safetensors")):
        return files, set()
    raise FileNotFoundError(f"{name} holds no weights (model.safetensors or pytorch_model.bin)")


def _unpickle(file: Path, name: str) -> dict[str, Tensor]:
    loaded = load_pickle(file, f"{file.name} of {name}")
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{file.name} of {name} holds other things than named tensors: it is no checkpoint")
    return loaded


def load_pickle(file: Path, shown: str) -> Any:
    """What `torch.save` wrote, tensors on the CPU, without running code of the file.

    Command lines that training scripts store beside their weights (`argparse.Namespace`) are read, too.

    Raises:
        ValueError: the file, which messages call `shown`, is none of `torch.save`, damaged, or holds other objects.
    """
    with file.open("rb") as opened:
        start = opened.read(64)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Files of PyTorch before 1.6 are no archives, which alone can be mapped.
            return torch.load(file, map_location="cpu", weights_only=True, mmap=start.startswith(b"PK"))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError) as error:
        if kind := re.search(r"GLOBAL ([\w.]+)", str(error)):
            # The reader takes what is no pickle at all for one with strange objects.
            raise ValueError(
                f"{shown} cannot be loaded as plain tensors: it holds {kind[1]}; where you trust the file, save its "
                "tensors alone and convert those"
            ) from error
        raise ValueError(f"{shown} cannot be loaded as plain tensors: {_why_not(start, error)}") from error


def _why_not(start: bytes, error: Exception) -> str:
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"
    if start.startswith(b"PK"):
        return f"it is damaged or not whole ({str(error).split('. ')[0].splitlines()[0]})"
    return "it was not written by torch.save"


def write_shards(
    out: Path,
    specs: dict[str, TensorSpec],
    read: Callable[[str], Tensor],
    max_shard_bytes: int,
) -> list[Path]:
    """Write safetensors files as transformers names them, one tensor in memory at a time.

    The safetensors library writes whole files from memory only; the format (a length, a JSON header, the bytes) is
    simple enough to be written as a stream.

    Args:
        specs: what will be written, in the order in which `read` is called.
        read: gives the tensor of that name.
        max_shard_bytes: a file is closed before it would grow beyond this (a larger tensor has a file of its own).

    Returns:
        The files, the index last where there is more than one.

    Raises:
        ValueError: `read` gives a tensor of another type or shape than its spec.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for key, spec in specs.items():
        if shards[-1] and size + spec.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += spec.nbytes
    if len(shards) == 1:
        write_file(out / "model.safetensors", shards[0], specs, read)
        return [out / "model.safetensors"]
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, keys in zip(names, shards, strict=True):
        write_file(out / name, keys, specs, read)
    index = {
        "metadata": {"total_size": sum(spec.nbytes for spec in specs.values())},
        "weight_map": {key: name for name, keys in zip(names, shards, strict=True) for key in sorted(keys)},
    }
    index_path = out / "model.safetensors.index.json"
    index_path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [*(out / name for name in names), index_path]


def write_file(
    path: Path,
    keys: Sequence[str],
    specs: dict[str, TensorSpec],
    read: Callable[[str], Tensor],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write the tensors `keys` into one safetensors file, one in memory at a time; see `write_shards`."""
    # Wider types first keeps every tensor aligned to its own type, as the format asks for.
    keys = sorted(keys, key=lambda key: -DTYPES[specs[key].dtype].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"} | (metadata or {})}
    end = 0
    for key in keys:
        spec = specs[key]
        header[key] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [end, end + spec.nbytes]}
        end += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for key in keys:
            tensor, spec = read(key), specs[key]
            if tensor.dtype != DTYPES[spec.dtype] or tuple(tensor.shape) != spec.shape:
                raise ValueError(f"tensor {key} is {tensor.dtype} {tuple(tensor.shape)}, its file's index says {spec}")
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
