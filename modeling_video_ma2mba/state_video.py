"""What a model remembers of a video and what else it has read: a state for every layer, saved, forked, read on from.

With Mamba-2 layers its size is constant, whatever the length of what was read. Legend: L layers, B batch.
"""

import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .state_files import StateContents, read_state, write_state
from .state_layers import KINDS, LayerState, Mamba2State, layer_kinds, stack, tensor_dtype, unstack


class VideoState:
    """Everything the language model carries from token to token; also the `past_key_values` of `generate()`.

    Layers of one kind have tensors of the same sizes and types on the same device.

    Attributes:
        layers: the state of each layer; see `state_layers` for the kinds.
        seen_tokens: tokens read so far, padding included.
        metadata: what produced the state (strings), kept in its file.
        format_version: of the file that it was loaded from, else None.
    """

    # Read by transformers' generate(): no automatic compilation, no cutting of past tokens.
    is_compileable = False
    is_croppable = False
    is_initialized = True
    is_sliding = ()
    is_linear = (False,)  # whole sequences that are given again are cut to what is new, as for attention

    def __init__(
        self, layers: Sequence[LayerState], seen_tokens: int = 0, metadata: Mapping[str, str] | None = None
    ) -> None:
        self.layers = layers
        self.seen_tokens = seen_tokens
        self.metadata = dict(metadata or {})
        self.format_version: int | None = None

    @property
    def layers(self) -> list[LayerState]:
        """State of each layer, first layer first."""
        return self._layers

    @layers.setter
    def layers(self, layers: Sequence[LayerState]) -> None:
        if not layers:
            raise ValueError("a state needs at least one layer")
        self._layers = list(layers)
        self._stacks: dict[str, LayerState] | None = None

    @classmethod
    def from_stacked(
        cls, conv: Tensor, ssm: Tensor, seen_tokens: int = 0, metadata: Mapping[str, str] | None = None
    ) -> "VideoState":
        """A state of Mamba-2 layers from conv (L, B, C, W-1) and ssm (L, B, H, P, N), which it takes over."""
        stacked = Mamba2State(conv, ssm)
        return cls._of_stacks([Mamba2State.kind] * len(conv), {Mamba2State.kind: stacked}, seen_tokens, metadata)

    @classmethod
    def _of_stacks(
        cls,
        kinds: Sequence[str],
        stacks: dict[str, LayerState],
        seen_tokens: int = 0,
        metadata: Mapping[str, str] | None = None,
    ) -> "VideoState":
        """From the kind of each layer and the kinds' stacked tensors, of which the layers become views."""
        for kind, stacked in stacks.items():
            _check_tensors(stacked, kinds.count(kind))
        left = {kind: iter(unstack(stacked)) for kind, stacked in stacks.items()}
        state = cls([next(left[kind]) for kind in kinds], seen_tokens, metadata)
        state._stacks = stacks
        return state

    @classmethod
    def zeros(
        cls, config: Any, batch: int = 1, device: Any = "cpu", dtype: torch.dtype = torch.float32
    ) -> "VideoState":
        """The state before the first token, for a `Ma2mbaTextConfig`."""
        kinds = layer_kinds(config)
        stacks: dict[str, LayerState] = {}
        for kind in dict.fromkeys(kinds):
            named = zip(KINDS[kind]._fields, KINDS[kind].sizes(config), strict=True)
            stacks[kind] = KINDS[kind]._make(
                torch.zeros(
                    kinds.count(kind), batch, *size, device=device, dtype=tensor_dtype(KINDS[kind], field, dtype)
                )
                for field, size in named
            )
        return cls._of_stacks(kinds, stacks)

    def stacked(self, kind: str = Mamba2State.kind) -> LayerState:
        """The tensors of all layers of one kind with a leading layer axis, (L, B, …).

        Made once: the layers are views of them from then on, and what is written into the one is in the other.
        """
        return self._all_stacked()[kind]

    @property
    def conv(self) -> Tensor:
        """The remembered inputs of all Mamba-2 layers' convolutions, (L, B, C, W-1); as in `stacked`."""
        return self.stacked().conv

    @property
    def ssm(self) -> Tensor:
        """The SSM states of all Mamba-2 layers, (L, B, H, P, N); as in `stacked`."""
        return self.stacked().ssm

    def _all_stacked(self) -> dict[str, LayerState]:
        if self._stacks is None:
            kinds = self.kinds
            # The layers themselves are replaced: gradients must still reach them, whatever is recorded at the moment.
            with torch.inference_mode(False), torch.enable_grad():
                stacks = {k: stack([s for s in self._layers if s.kind == k]) for k in dict.fromkeys(kinds)}
                left = {kind: iter(unstack(stacked)) for kind, stacked in stacks.items()}
            self._layers = [next(left[kind]) for kind in kinds]
            self._stacks = stacks
        return self._stacks

    @torch.no_grad()
    def copy_into(self, targets: LayerState) -> None:
        """Write the layers of the targets' kind into stacked tensors (L, B, …) that somebody else holds."""
        if self._stacks is not None:
            for target, tensor in zip(targets, self._stacks[targets.kind], strict=True):
                target.copy_(tensor)
            return
        layers = [layer for layer in self._layers if layer.kind == targets.kind]
        for target, tensors in zip(targets, zip(*layers, strict=True), strict=True):
            torch.stack(tensors, out=target)

    @property
    def kinds(self) -> list[str]:
        """The kind of each layer."""
        return [layer.kind for layer in self._layers]

    @property
    def batch_size(self) -> int:
        """Rows B of every layer's tensors."""
        return self._layers[0][0].shape[0]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self._layers[0][0].device

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors: with Mamba-2 layers the same after a second of video and after a day."""
        return sum(tensor.nbytes for layer in self._layers for tensor in layer)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far (transformers' cache interface)."""
        return self.seen_tokens

    def update(self, layers: Sequence[LayerState], new_tokens: int) -> None:
        """Take over the layers' states after `new_tokens` more tokens."""
        self.layers = layers
        self.seen_tokens += new_tokens

    def take(self, other: "VideoState") -> None:
        """Become what `other` is, sharing its tensors; the metadata stay."""
        self._layers, self._stacks, self.seen_tokens = other._layers, other._stacks, other.seen_tokens

    def _mapped(self, function: Callable[[Tensor, type[LayerState], str], Tensor]) -> "VideoState":
        """A new state of `function` (of a stacked tensor, its kind and field) of all tensors."""
        stacks = {
            kind: type(stacked)._make(
                function(t, type(stacked), f) for f, t in zip(stacked._fields, stacked, strict=True)
            )
            for kind, stacked in self._all_stacked().items()
        }
        return self._of_stacks(self.kinds, stacks, self.seen_tokens, self.metadata)

    def fork(self) -> "VideoState":
        """An independent copy: asking one question does not disturb the next."""
        return self._mapped(lambda tensor, kind, field: tensor.clone())

    def detach(self) -> "VideoState":
        """The same values, cut off from autograd."""
        return self._mapped(lambda tensor, kind, field: tensor.detach())

    def to(self, device: Any, dtype: torch.dtype | None = None) -> "VideoState":
        """The same state on another device, and by request for a model of another data type."""

        like = self._layers[0]
        types = [
            t.dtype if dtype is None else tensor_dtype(type(like), f, dtype)
            for f, t in zip(like._fields, like, strict=True)
        ]
        if like[0].device == torch.device(device) and [t.dtype for t in like] == types:
            same = VideoState(self._layers, self.seen_tokens, self.metadata)
            same._stacks = self._stacks
            return same

        def moved(tensor: Tensor, kind: type[LayerState], field: str) -> Tensor:
            return tensor.to(device, tensor_dtype(kind, field, dtype) if dtype else tensor.dtype)

        return self._mapped(moved)

    def select(self, rows: slice | Tensor) -> "VideoState":
        """The state of some rows: for a slice views of this one, for indices (R,) int64 copies."""
        if isinstance(rows, Tensor):
            index = rows.to(self.device)
            return self._mapped(lambda tensor, kind, field: tensor.index_select(1, index))
        layers = [type(layer)._make(tensor[rows] for tensor in layer) for layer in self._layers]
        return VideoState(layers, self.seen_tokens, self.metadata)

    @classmethod
    def concatenate(cls, states: Sequence["VideoState"]) -> "VideoState":
        """One state of all rows of `states`, in the types and on the device of the first; a copy. `seen_tokens` is
        that of the longest, and the rows' own metadata are dropped."""
        first, *others = states
        if any(other.kinds != first.kinds for other in others):
            raise ValueError("the states have layers of different kinds: they belong to different models")
        stacks: dict[str, LayerState] = {}
        for kind, stacked in first._all_stacked().items():
            parts = zip(stacked, *(other._all_stacked()[kind] for other in others), strict=True)
            stacks[kind] = type(stacked)._make(torch.cat([a, *(b.to(a) for b in rest)], dim=1) for a, *rest in parts)
        return cls._of_stacks(first.kinds, stacks, max(state.seen_tokens for state in states))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row b continues from row beam_idx[b]."""
        self.take(self.select(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times in a row, for beams and several samples of one prompt."""
        self.take(self._mapped(lambda tensor, kind, field: tensor.repeat_interleave(repeats, dim=1)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows `indices`."""
        self.reorder_cache(indices)

    def check_fits(self, config: Any) -> None:
        """ValueError unless the state has the kinds and sizes of a model with this `Ma2mbaTextConfig`."""
        kinds, own = layer_kinds(config), self.kinds
        expected = {kind: KINDS[kind].sizes(config) for kind in dict.fromkeys(kinds)}
        # Layers of a kind are alike: one of each is looked at, with every token.
        firsts = {kind: self._layers[own.index(kind)] for kind in dict.fromkeys(own)}
        found = {kind: tuple(tuple(t.shape[1:]) for t in layer) for kind, layer in firsts.items()}
        if own != kinds or found != expected:
            raise ValueError(
                f"the state belongs to another model: its sizes are {_counted(own, found)}, this model's are "
                f"{_counted(kinds, expected)}"
            )

    def fingerprint(self) -> int:
        """CRC-32 of what is computed in full precision: tells states apart that one model made."""
        crc = 0
        for layer in self._layers:
            for field in layer.wide:
                crc = zlib.crc32(getattr(layer, field).detach().cpu().contiguous().numpy(), crc)
        return crc

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write one safetensors file, complete or not at all.

        Args:
            dtype: store the SSM states, nearly all of the file, in torch.bfloat16 or torch.float16 instead: half the
                size, and rounded. The metadata of what is loaded then say so in "rounded_to". None stores every bit.

        Raises:
            FileNotFoundError: its folder does not exist.
            ValueError: `dtype` is another type, or values are too large for float16.
        """
        write_state(path, StateContents(self.kinds, self._all_stacked(), self.seen_tokens, self.metadata), dtype)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "VideoState":
        """Read a file written by `save`, of this release or an earlier one.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, not a state, or of a newer release.
        """
        found = read_state(path)
        try:
            state = cls._of_stacks(found.kinds, found.stacks, found.seen_tokens, found.metadata)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)!r} is not a video state: {error}") from error
        state.format_version = found.format_version
        return state


def _check_tensors(stacked: LayerState, layers: int) -> None:
    """ValueError unless stacked tensors are floating-point numbers with the axes of their kind and so many layers."""
    real = all(tensor.is_floating_point() for tensor in stacked)
    fit = [tensor.ndim for tensor in stacked] == [axes.count(",") + 1 for axes in stacked.axes]
    if not real or not fit or len({tensor.shape[:2] for tensor in stacked}) != 1 or len(stacked[0]) != layers:
        wanted = " and ".join(f"{f} {axes}" for f, axes in zip(stacked._fields, stacked.axes, strict=True))
        found = " and ".join(f"{tuple(tensor.shape)} of {tensor.dtype}" for tensor in stacked)
        raise ValueError(f"a state needs for {layers} layers of kind {stacked.kind} {wanted}, not {found}")


def _counted(kinds: Sequence[str], sizes: Mapping[str, tuple[tuple[int, ...], ...]]) -> str:
    """Layers in words, those of one kind counted together."""
    counts = {kind: kinds.count(kind) for kind in kinds}
    return ", ".join(f"{count} x {kind} of {' and '.join(map(str, sizes[kind]))}" for kind, count in counts.items())
