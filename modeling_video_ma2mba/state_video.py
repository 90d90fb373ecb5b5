"""What a Mamba-2 model remembers: a state of constant size, whatever the length of what it has read.

Legend: L layers, B batch, C conv channels, W conv width, H heads, P head width, N state size.
"""

import json
import os
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

FORMAT_VERSION = 1
_STORED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class VideoState:
    """Everything the language model carries from token to token; also the `past_key_values` of `generate()`.

    Attributes:
        conv: (L, B, C, W-1) last raw inputs of each layer's convolution, in the model's dtype.
        ssm: (L, B, H, P, N) SSM states, fp32 (fp64 in fp64 models).
        seen_tokens: tokens read so far, padding included.
        metadata: what produced the state (strings), kept in its file.
    """

    # Read by transformers' generate(): no automatic compilation, no cutting of past tokens.
    is_compileable = False
    is_croppable = False
    is_initialized = True
    is_sliding = ()
    is_linear = (False,)  # whole sequences that are given again are cut to what is new, as for attention

    def __init__(self, conv: Tensor, ssm: Tensor, seen_tokens: int = 0, metadata: Mapping[str, str] | None = None):
        real = conv.is_floating_point() and ssm.is_floating_point()
        if not real or conv.ndim != 4 or ssm.ndim != 5 or conv.shape[:2] != ssm.shape[:2]:
            raise ValueError(
                f"a state needs conv (L, B, C, W-1) and ssm (L, B, H, P, N), not {tuple(conv.shape)} of {conv.dtype} "
                f"and {tuple(ssm.shape)} of {ssm.dtype}"
            )
        self.conv = conv
        self.ssm = ssm
        self.seen_tokens = seen_tokens
        self.metadata = dict(metadata or {})

    @classmethod
    def zeros(
        cls, config: Any, batch: int = 1, device: Any = "cpu", dtype: torch.dtype = torch.float32
    ) -> "VideoState":
        """The state before the first token, for a `Ma2mbaTextConfig`."""
        layers = config.num_hidden_layers
        conv = torch.zeros(layers, batch, config.conv_dim, config.conv_kernel - 1, device=device, dtype=dtype)
        work = torch.promote_types(dtype, torch.float32)
        ssm_shape = (layers, batch, config.num_heads, config.head_dim, config.state_size)
        return cls(conv, torch.zeros(ssm_shape, device=device, dtype=work))

    @property
    def batch_size(self) -> int:
        return self.conv.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors: the same after a second of video and after a day."""
        return self.conv.nbytes + self.ssm.nbytes

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far (transformers' cache interface)."""
        return self.seen_tokens

    def update(self, conv: Tensor, ssm: Tensor, new_tokens: int) -> None:
        """Take over the state after `new_tokens` more tokens."""
        self.conv, self.ssm = conv, ssm
        self.seen_tokens += new_tokens

    def fork(self) -> "VideoState":
        """An independent copy: asking one question does not disturb the next."""
        return VideoState(self.conv.clone(), self.ssm.clone(), self.seen_tokens, self.metadata)

    def to(self, device: Any, dtype: torch.dtype | None = None) -> "VideoState":
        """The same state on another device, and by request for a model of another data type."""
        conv = self.conv.to(device, dtype or self.conv.dtype)
        ssm = self.ssm.to(device, torch.promote_types(dtype, torch.float32) if dtype else self.ssm.dtype)
        return VideoState(conv, ssm, self.seen_tokens, self.metadata)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row b continues from row beam_idx[b]."""
        index = beam_idx.to(self.conv.device)
        self.conv, self.ssm = self.conv.index_select(1, index), self.ssm.index_select(1, index)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times in a row, for beams and several samples of one prompt."""
        self.conv = self.conv.repeat_interleave(repeats, dim=1)
        self.ssm = self.ssm.repeat_interleave(repeats, dim=1)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows `indices`."""
        self.reorder_cache(indices)

    def check_fits(self, config: Any) -> None:
        """ValueError unless the state has the sizes of a model with this `Ma2mbaTextConfig`."""
        expected_conv = (config.num_hidden_layers, config.conv_dim, config.conv_kernel - 1)
        expected_ssm = (config.num_hidden_layers, config.num_heads, config.head_dim, config.state_size)
        found_conv = (self.conv.shape[0], *self.conv.shape[2:])
        found_ssm = (self.ssm.shape[0], *self.ssm.shape[2:])
        if found_conv != expected_conv or found_ssm != expected_ssm:
            raise ValueError(
                f"the state belongs to another model: its sizes are {found_conv} and {found_ssm}, this model's are "
                f"{expected_conv} and {expected_ssm}"
            )

    def save(self, path: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
        """Write one safetensors file, complete or not at all.

        Args:
            dtype: store the SSM states, nearly all of the file, in torch.bfloat16 or torch.float16 instead: half the
                size, and rounded. The metadata of what is loaded then say so in "rounded_to". None stores every bit.

        Raises:
            FileNotFoundError: its folder does not exist.
            ValueError: `dtype` is another type, or values are too large for float16.
        """
        from safetensors.torch import save_file

        folder = os.path.dirname(os.path.abspath(path))
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"there is no folder {folder!r} to save the state in")
        conv, ssm, metadata = self.conv, self.ssm, self.metadata
        if dtype not in (None, torch.bfloat16, torch.float16, ssm.dtype):
            raise ValueError(f"a state is saved in bfloat16, float16 or as it is, not in {dtype}")
        if dtype in (torch.bfloat16, torch.float16):
            if not ssm.to(dtype).isfinite().all():
                raise ValueError(f"the state holds values too large for {dtype}: save it in bfloat16")
            ssm, conv = ssm.to(dtype), conv.to(dtype) if conv.element_size() > dtype.itemsize else conv
            metadata = {**metadata, "rounded_to": str(dtype).removeprefix("torch.")}
        tensors = {"conv": conv.detach().cpu().contiguous(), "ssm": ssm.detach().cpu().contiguous()}
        facts = {"format_version": str(FORMAT_VERSION), "seen_tokens": str(self.seen_tokens)}
        facts["metadata"] = json.dumps(metadata)
        facts["checksum"] = _checksum(tensors, facts)
        temporary = f"{os.fspath(path)}.part"
        try:
            save_file(tensors, temporary, metadata=facts)
            os.replace(temporary, path)
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "VideoState":
        """Read a file written by `save`. ValueError when it is damaged or not a state."""
        from safetensors import SafetensorError, safe_open

        if not os.path.isfile(path):
            raise FileNotFoundError(f"there is no state file {os.fspath(path)!r}")
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise ValueError(f"{os.fspath(path)!r} is not a readable state file: {error}") from error
        known = all(tensor.dtype in _STORED for tensor in tensors.values())
        if facts.get("format_version") != str(FORMAT_VERSION) or tensors.keys() != {"conv", "ssm"} or not known:
            raise ValueError(f"{os.fspath(path)!r} is not a video state of format version {FORMAT_VERSION}")
        try:
            seen, metadata = int(facts["seen_tokens"]), dict(json.loads(facts["metadata"]))
            if not 0 <= seen < 2**63:
                raise ValueError(f"seen_tokens={seen}")
            if not all(isinstance(text, str) for entry in metadata.items() for text in entry):
                raise ValueError("its metadata are not all text")
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{os.fspath(path)!r} has a damaged header: {error}") from error
        if facts.get("checksum") != _checksum(tensors, facts):
            raise ValueError(f"{os.fspath(path)!r} is damaged: its checksum does not match what it holds")
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{os.fspath(path)!r} holds values that are not finite in {name!r}")
        ssm = tensors["ssm"]
        try:
            return cls(tensors["conv"], ssm.to(torch.promote_types(ssm.dtype, torch.float32)), seen, metadata)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)!r} is not a video state: {error}") from error


def is_state_file(path: str | os.PathLike) -> bool:
    """Whether a file begins like a state (as safetensors: the length of a header, then the header).

    No video, image or text begins so. Damage further inside is for `VideoState.load` to name.
    """
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        head = file.read(9)
    return len(head) == 9 and int.from_bytes(head[:8], "little") < 2**27 and head[8:] == b"{"


def _checksum(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    """CRC-32 of the tensors' bytes, sizes and types and of the header's other fields, as hexadecimal text."""
    described = [[name, str(tensor.dtype), list(tensor.shape)] for name, tensor in sorted(tensors.items())]
    crc = zlib.crc32(json.dumps([described, facts["seen_tokens"], facts["metadata"]]).encode())
    for _, tensor in sorted(tensors.items()):
        crc = zlib.crc32(tensor.flatten().view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"
