"""Decoding as replayed CUDA graphs: a state of fixed size means that every token is the same list of kernels.

A `Decoder` owns one batch size's buffers and graphs. It is made when first wanted, kept for the next answer, and made
anew when the model's tensors were replaced. Nothing depends on it: without CUDA, with adapters or offloading, or where
capturing fails, generation runs as it does elsewhere.
"""

import contextlib
import functools
import importlib.util
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .decode_step import DecodeBuffers, DecodeWeights, prompt_step, token_step

_KEPT = 2
"""Batch sizes whose buffers and graphs stay for the next answer, per model; less where they take too much memory."""
_KEPT_SHARE = 0.1
LONGEST_PROMPT = 256
"""Prompts up to this many tokens, padded to a power of two, are read by a graph as well."""
_forced: str | None = None


@contextlib.contextmanager
def force_decoding(way: str | None) -> Iterator[None]:
    """Inside, generate by "graphs", by "steps" (the same functions called one by one, on any device) or "eager"ly
    (the model's forward pass); for tests and benchmarks. None: graphs on CUDA, else eagerly."""
    global _forced
    if way not in (None, "graphs", "steps", "eager"):
        raise ValueError(f"way={way!r} is not valid: use 'graphs', 'steps' or 'eager'")
    previous, _forced = _forced, way
    try:
        yield
    finally:
        _forced = previous


class Decoder:
    """Steps of a batch of fixed size, from buffers to buffers."""

    def __init__(self, weights: DecodeWeights, batch: int, graphs: bool, slots: int, state_dtype: torch.dtype) -> None:
        """
        Args:
            graphs: capture CUDA graphs; else every step calls its functions.
            slots: tokens after which the state is written down. state_dtype: what it is kept in between.
        """
        device = weights.embeddings.device
        if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
            from .decode_kernels import OPERATIONS
        else:
            from .decode_reference import OPERATIONS
        self.weights = weights
        self.identity = _identity(weights)
        self.settings = (graphs, slots, state_dtype)
        self.buffers = DecodeBuffers(weights, batch, slots, state_dtype)
        self._prompts: dict[int, tuple[Tensor, Tensor, torch.cuda.CUDAGraph | None] | None] = {}
        self._pool = torch.cuda.graph_pool_handle() if graphs else None
        self._run = lambda fold: token_step(OPERATIONS, weights, self.buffers, fold)
        # A step that folds the history into the state is another list of kernels; with one slot every step does.
        kinds = (True,) if slots == 1 else (False, True)
        self._steps = {fold: self._captured(functools.partial(self._run, fold)) for fold in kinds} if graphs else {}

    def _captured(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """A graph of `run`, which runs once before: compiling and tuning cannot be captured."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            run()
        return graph

    def step(self) -> None:
        """Read `buffers.tokens`; see `token_step`."""
        fold = self.buffers.advance()
        if self._steps:
            self._steps[fold].replay()
        else:
            self._run(fold)

    def prepare_prompt(self, model: Any, tokens: int) -> bool:
        """Make what `read_prompt` needs for prompts of up to `tokens` tokens; False where that fails.

        The buffers' state is lost: call this before they are loaded.
        """
        size = _padded(tokens)
        if size in self._prompts:
            return self._prompts[size] is not None
        try:
            batch, device = len(self.buffers.tokens), self.buffers.tokens.device
            with torch.inference_mode(False):
                ids = torch.zeros(batch, size, dtype=torch.long, device=device)
                lengths = torch.full((batch,), size, dtype=torch.long, device=device)
            graph = None
            if self._steps:
                language_model, head, buffers = model.model.language_model, model.lm_head.weight, self.buffers
                graph = self._captured(lambda: prompt_step(language_model, head, buffers, ids, lengths))
            self._prompts[size] = ids, lengths, graph
        except RuntimeError as error:
            self._prompts[size] = None
            warnings.warn(f"reading a prompt could not be captured ({error}); it runs without", stacklevel=2)
        return self._prompts[size] is not None

    def read_prompt(self, model: Any, ids: Tensor, lengths: Tensor) -> None:
        """Read (B, S) `ids`, of which each row's first `lengths` (B,) count, after `prepare_prompt` and `load`."""
        prepared = self._prompts[_padded(ids.shape[1])]
        assert prepared is not None, "prepare_prompt() has failed"
        own_ids, own_lengths, graph = prepared
        own_ids[:, : ids.shape[1]] = ids
        own_lengths.copy_(lengths)
        if graph is None:
            prompt_step(model.model.language_model, model.lm_head.weight, self.buffers, own_ids, own_lengths)
        else:
            graph.replay()


class _Kept:
    """One model's decoders, the latest last, for one user at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.decoders: OrderedDict[int, Decoder] = OrderedDict()
        self.failed = False


_kept: "weakref.WeakKeyDictionary[Any, _Kept]" = weakref.WeakKeyDictionary()


def decodes_by_graph(model: Any) -> bool:
    """Whether a `Decoder` could make `model`'s tokens now."""
    return _usable_weights(model) is not None


def _usable_weights(model: Any) -> DecodeWeights | None:
    weights = DecodeWeights.of(model) if model.fast_decoding and _forced != "eager" else None
    if weights is None or (_forced is None and weights.embeddings.device.type != "cuda"):
        return None
    return weights


@contextlib.contextmanager
def borrow_decoder(model: Any, batch: int, new_tokens: int) -> Iterator[Decoder | None]:
    """A decoder of `model` for a batch of `batch` rows, or None where generation is better off without.

    Args:
        model: a `VideoMa2mbaForConditionalGeneration`.
        new_tokens: expected at most; for very few, nothing is captured.
    """
    weights = _usable_weights(model)
    if weights is None:
        yield None
        return
    kept = _kept.setdefault(model, _Kept())
    if kept.failed or not kept.lock.acquire(blocking=False):  # another thread is generating: it has the buffers
        yield None
        return
    device = weights.embeddings.device
    try:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            yield _decoder(kept, model, weights, batch, new_tokens)
        if device.type == "cuda":
            share = _KEPT_SHARE if model.decoders_share is None else model.decoders_share
            room = share * torch.cuda.get_device_properties(device).total_memory
            while sum(decoder.buffers.nbytes for decoder in kept.decoders.values()) > room:
                kept.decoders.popitem(last=False)
    finally:
        kept.lock.release()


def _decoder(kept: _Kept, model: Any, weights: DecodeWeights, batch: int, new_tokens: int) -> Decoder | None:
    graphs = _forced == "graphs" or _forced is None
    # Writing states down is a small part of a single row's traffic and most of a large batch's.
    slots = model.decode_slots or (1 if batch < 4 else 16)
    settings = (graphs, slots, model.decode_state_dtype)
    decoder = kept.decoders.pop(batch, None)
    if decoder is None or decoder.identity != _identity(weights) or decoder.settings != settings:
        decoder = None
        if new_tokens < 4:
            return None
        while len(kept.decoders) >= (model.decoders_kept or _KEPT):
            kept.decoders.popitem(last=False)
        try:
            with torch.inference_mode(False), torch.no_grad():  # buffers made in inference mode could not leave it
                decoder = Decoder(weights, batch, *settings)
        except torch.OutOfMemoryError:
            return None
        except Exception as error:  # of CUDA, or of Triton's compiler, which has errors of its own
            kept.failed = True
            warnings.warn(f"decoding could not be captured ({error}); it runs without CUDA graphs", stacklevel=2)
            return None
    kept.decoders[batch] = decoder
    return decoder


def release_decoders(model: Any) -> None:
    """Free the buffers and graphs kept for `model`'s next answers."""
    _kept.pop(model, None)


def _padded(tokens: int) -> int:
    return max(16, 1 << (tokens - 1).bit_length())


def _identity(weights: DecodeWeights) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in weights.tensors())
