"""Where the kept activations of a training step wait between forward and backward: on the device, or in host memory.

The host store copies on side streams behind the computation. Its memory is page-locked once, in slabs that are
reused from step to step; a plain `pin_memory` would round every tensor up to a power of two.
"""

import contextlib
import mmap
import os
import sys
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .recompute_plan import COPIES_IN_FLIGHT

SLAB_BYTES = 1 << 30
_ALIGNMENT = 512


class DeviceStore:
    """Keeps the tensors themselves."""

    host_bytes = 0

    def __init__(self) -> None:
        self._items: dict[Hashable, list[Tensor]] = {}

    def expect(self, pieces: int, nbytes: int) -> None:
        """Nothing to do: nothing is copied."""

    def put(self, key: Hashable, tensors: list[Tensor]) -> None:
        """Keep `tensors` as they are under `key`, without a copy."""
        self._items[key] = tensors

    def prefetch(self, key: Hashable) -> None:
        """Nothing to do: the tensors are here."""

    def read(self, key: Hashable) -> list[Tensor]:
        """Hand the tensors out, and keep them."""
        return self._items[key]

    def take(self, key: Hashable) -> list[Tensor]:
        """Hand the tensors out and forget them."""
        return self._items.pop(key)

    def finish(self) -> None:
        """Let go of everything."""
        self._items.clear()


class PinnedPool:
    """Page-locked host memory handed out in pieces, kept between steps, given back by `release`.

    Pieces are cut from slabs one after the other. Given back, a piece waits for a request of its size; once all are
    back, as between two steps, the slabs are cut anew, so steps of ever new lengths live in the same memory.
    """

    def __init__(self) -> None:
        self._slabs: list[Tensor] = []
        self._at = 0  # the slab being cut, and how much of it is taken
        self._used = 0
        self._free: dict[int, list[Tensor]] = {}
        self._lent: set[int] = set()  # addresses
        self._coming: deque[Future[Tensor]] = deque()  # slabs that another thread page-locks

    def reserve(self, nbytes: int) -> None:
        """Page-lock so much memory now, in whole slabs, instead of during the first step that needs it."""
        while self.nbytes < nbytes:
            self._slabs.append(self._next_slab(SLAB_BYTES))

    def expect(self, pieces: int, nbytes: int) -> None:
        """So many pieces of this size are going to be asked for. What is missing for them is page-locked meanwhile, in
        the background, slab after slab: a first step launches its kernels at the same time."""
        size = max(-(-nbytes // _ALIGNMENT), 1) * _ALIGNMENT
        missing = pieces - sum(slab.nbytes // size for slab in self._slabs)
        if missing <= 0 or self._coming:
            return
        each, cuda = max(SLAB_BYTES // size, 1), torch.cuda.is_initialized()
        device = torch.cuda.current_device() if cuda else None
        thread = ThreadPoolExecutor(1, initializer=None if device is None else partial(torch.cuda.set_device, device))
        for first in range(0, missing, each):
            self._coming.append(thread.submit(self._new_slab, min(each, missing - first) * size))
        thread.shutdown(wait=False)

    @property
    def nbytes(self) -> int:
        """Pinned host memory held, in bytes, whether lent or free."""
        return sum(slab.nbytes for slab in self._slabs)

    def get(self, nbytes: int) -> Tensor:
        """A page-locked uint8 piece of at least `nbytes`."""
        size = max(-(-nbytes // _ALIGNMENT), 1) * _ALIGNMENT
        piece = self._free[size].pop() if self._free.get(size) else self._cut(size)
        self._lent.add(piece.data_ptr())
        return piece

    def _cut(self, size: int) -> Tensor:
        if self._used and self._used + size > self._slabs[self._at].nbytes:
            rest = self._slabs[self._at][self._used :]
            if rest.nbytes:
                self._free.setdefault(rest.nbytes, []).append(rest)
            self._at, self._used = self._at + 1, 0
        if not self._used:  # the next slab that is large enough, or a new one
            places = range(self._at, len(self._slabs))
            found = next((n for n in places if self._slabs[n].nbytes >= size), None)
            slab = self._next_slab(size) if found is None else self._slabs.pop(found)
            self._slabs.insert(self._at, slab)
        self._used += size
        return self._slabs[self._at][self._used - size : self._used]

    def give_back(self, piece: Tensor) -> None:
        """Take a piece of `get` back. One that outlived a `release` belongs to nobody any more."""
        if piece.data_ptr() not in self._lent:
            return
        self._lent.remove(piece.data_ptr())
        self._free.setdefault(piece.nbytes, []).append(piece)
        if not self._lent:
            self._free.clear()
            self._at = self._used = 0

    def _next_slab(self, size: int) -> Tensor:
        """One of those in the background that is large enough, waiting for it, else a new one."""
        while self._coming:
            slab = self._coming.popleft().result()
            if slab.nbytes >= size:
                return slab
            self._slabs.append(slab)
        return self._new_slab(max(size, SLAB_BYTES))

    def _new_slab(self, nbytes: int) -> Tensor:
        slab = _present(nbytes)
        error = torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), nbytes, 0)
        if int(error) != 0:
            raise MemoryError(
                f"{nbytes / 1e9:.1f} GB of host memory could not be page-locked for kept activations (CUDA error "
                f"{int(error)}); lower host_memory_budget or set offload=False"
            )
        return slab

    def release(self) -> None:
        """Unlock and free everything; no piece may be in use."""
        while self._coming:
            with contextlib.suppress(MemoryError):
                self._slabs.append(self._coming.popleft().result())
        if self._slabs:
            torch.cuda.synchronize()
        for slab in self._slabs:
            torch.cuda.cudart().cudaHostUnregister(slab.data_ptr())
        PinnedPool.__init__(self)

    # At the interpreter's end this module's names are gone before the last pool: what is needed is bound here. The
    # driver frees the memory then.
    def __del__(
        self, _ending: Callable[[], bool] = sys.is_finalizing, _suppress: Callable[..., Any] = contextlib.suppress
    ) -> None:
        if (self._slabs or self._coming) and not _ending():
            with _suppress(Exception):
                self.release()


def _present(nbytes: int) -> Tensor:
    """A uint8 buffer whose pages are there, large ones where the system has them. Page-locking would fetch them one
    after the other; threads fetch them many times as fast."""
    if hasattr(mmap, "MAP_PRIVATE"):  # shared memory, the default, rarely has large pages
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        memory = mmap.mmap(-1, nbytes)
    # Forked processes must not have it: what they share is copied when written to, and the copy is not page-locked.
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        with contextlib.suppress(OSError, AttributeError):
            memory.madvise(getattr(mmap, advice))
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        list(threads.map(Tensor.zero_, buffer.split(1 << 26)))
    return buffer


class HostStore:
    """Keeps the tensors of one device in pinned host memory, behind the same interface as `DeviceStore`."""

    def __init__(self, pool: PinnedPool, device: torch.device) -> None:
        self._pool = pool
        self._device = device
        self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._items: dict[Hashable, tuple[list[tuple[Tensor, Tensor]], torch.cuda.Event]] = {}
        self._coming: dict[Hashable, tuple[list[Tensor], torch.cuda.Event | None]] = {}
        self._leaving: deque[tuple[Hashable, list[Tensor], torch.cuda.Event]] = deque()
        self.host_bytes = 0
        self._live = 0

    def expect(self, pieces: int, nbytes: int) -> None:
        """So many tensors of this size are going to be kept: memory for them is got ready meanwhile."""
        self._pool.expect(pieces, nbytes)

    def put(self, key: Hashable, tensors: list[Tensor]) -> None:
        """Start copying to the host. The tensors must not be written to afterwards."""
        compute = torch.cuda.current_stream(self._device)
        self._out.wait_stream(compute)
        slots = []
        with torch.cuda.stream(self._out):
            for tensor in tensors:
                piece = self._pool.get(tensor.nbytes)
                slot = piece[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                slot.copy_(tensor, non_blocking=True)
                slots.append((piece, slot))
                self._live += piece.nbytes
        self.host_bytes = max(self.host_bytes, self._live)
        done = self._out.record_event()
        self._items[key] = (slots, done)
        # A tensor may be freed, and its memory written again by later kernels, only after its copy: the computation
        # waits for old copies on the device, so neither the host nor the allocator ever has to.
        self._leaving.append((key, tensors, done))
        while len(self._leaving) > COPIES_IN_FLIGHT:
            compute.wait_event(self._leaving.popleft()[-1])

    def prefetch(self, key: Hashable) -> None:
        """Start copying back to the device."""
        if key in self._coming or key not in self._items:
            return
        still_here = next((tensors for left, tensors, _ in self._leaving if left == key), None)
        if still_here is not None:  # as where backward begins, with what forward ended with
            self._coming[key] = still_here, None
            return
        slots, stored = self._items[key]
        compute = torch.cuda.current_stream(self._device)
        arrived = [torch.empty_like(slot, device=self._device) for _, slot in slots]
        # The new memory may still be read by kernels already queued.
        self._in.wait_stream(compute)
        self._in.wait_event(stored)
        with torch.cuda.stream(self._in):
            for tensor, (_, slot) in zip(arrived, slots, strict=True):
                tensor.copy_(slot, non_blocking=True)
        self._coming[key] = (arrived, self._in.record_event())

    def read(self, key: Hashable) -> list[Tensor]:
        """Wait, on the device, for the tensors."""
        self.prefetch(key)
        arrived, event = self._coming.pop(key)
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)
        return arrived

    def take(self, key: Hashable) -> list[Tensor]:
        """Wait, on the device, for the tensors; their host memory becomes free for later copies."""
        arrived = self.read(key)
        slots, _ = self._items.pop(key)
        for piece, _ in slots:
            # Safe: a later copy into this piece runs on the out stream, which first waits for the computation.
            self._pool.give_back(piece)
            self._live -= piece.nbytes
        return arrived

    def finish(self) -> None:
        """Let go of everything, in the order of the device."""
        compute = torch.cuda.current_stream(self._device)
        while self._leaving:
            compute.wait_event(self._leaving.popleft()[-1])
        for slots, _ in self._items.values():
            for piece, _ in slots:
                self._pool.give_back(piece)
        self._items.clear()
        self._coming.clear()

    # A forward pass whose backward never came: its memory must not stay lent for ever.
    def __del__(
        self, _ending: Callable[[], bool] = sys.is_finalizing, _suppress: Callable[..., Any] = contextlib.suppress
    ) -> None:
        if not _ending():
            with _suppress(Exception):
                self.finish()
