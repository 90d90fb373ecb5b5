"""What this package's Triton kernels of the operations share: Triton itself, softplus, how launches are chosen, and
how several kernels are compiled at the same time."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import torch

try:  # the other files of kernels take both from here; the guard keeps transformers from demanding them
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    raise ImportError("these kernels need triton, which comes with PyTorch's CUDA builds") from error

S = TypeVar("S")
_ahead: ContextVar[bool] = ContextVar("kernels are compiled, not launched", default=False)


class Kernel:
    """A Triton kernel, launched as `kernel[grid](...)`."""

    def __init__(self, jit: Any) -> None:
        self.jit = jit

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return functools.partial(self.jit.warmup, grid=grid) if _ahead.get() else self.jit[grid]


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Kernel]:
    """`triton.jit` for a function that is launched."""
    return lambda function: Kernel(triton.jit(**options)(function))


@contextlib.contextmanager
def compiling_ahead() -> Iterator[None]:
    """Inside, launches of a `Kernel` only have it compiled, all at the same time; the results are whatever was in
    memory. A launch with arguments of the same kind then starts at once. Triton before 3.5 compiles at launches."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads, triton.AsyncCompileMode(threads):
        token = _ahead.set(True)
        try:
            yield
        finally:
            _ahead.reset(token)


class LaunchTable(Generic[S]):
    """Fixed settings by GPU, so that nothing is tuned when a model runs.

    Args:
        measured: settings by compute capability. default: for cards that were not measured.
    """

    def __init__(self, measured: Mapping[tuple[int, int], S], default: S) -> None:
        self._measured, self._default = dict(measured), default
        self._forced: S | None = None

    def settings_for(self, device: torch.device) -> S:
        """The settings to launch with on a device."""
        if self._forced is not None:
            return self._forced
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        return self._default if capability is None else self._measured.get(capability, self._default)

    def force_settings(self, settings: S | None) -> None:
        """Launch with these from now on; None goes back to the table. For tests and sweeps."""
        self._forced = settings


@triton.jit
def softplus(x):
    """log(1 + exp(x)), fp32, of any shape; x itself above 20, as PyTorch has it."""
    e = tl.exp(tl.minimum(x, 20.0))
    small = e * (1.0 - e * (0.5 - e * 0.33333334))  # log(1 + e) loses the digits of a small e
    return tl.where(x > 20.0, x, tl.where(x < -4.0, small, tl.log(1.0 + e)))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), fp32, without a division, which takes several instructions."""
    root = tl.rsqrt(1.0 + tl.exp(-x))
    return root * root
