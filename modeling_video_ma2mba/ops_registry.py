"""Which implementation of an operation runs: every operation has a list of backends, one rule picks among them.

An operation is a function with a PyTorch version, which runs anywhere and is differentiated by autograd. A faster
backend is a pair of functions, forward and backward, with a declaration of what it serves. To add one: a file
`ops_…` that imports nothing of this package but this file and `ops_costs`, and one entry in the list of its operation.
"""

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .ops_costs import CallCost

_forced: str | None = None
_names: set[str] = set()


@dataclass(frozen=True)
class Call:
    """What a backend is asked to run, beyond device and type.

    Attributes:
        tokens: of one row. sizes: the operation's own, by name; see its file.
        padded: rows have lengths of their own. packed: samples end within rows (`seq_idx`).
    """

    tokens: int
    sizes: Mapping[str, float]
    padded: bool = False
    packed: bool = False


@dataclass(frozen=True)
class Backend(CallCost):
    """One implementation of one operation, what it serves, and what its calls take (`ops_costs`).

    Attributes:
        name: "torch", or the name of what brings the kernels; what `force_backend` asks for.
        forward: in PyTorch (no `backward`) the operation itself: tensors and options to results. With `backward`:
            `forward(*tensors, **options) -> (results, kept)`, kept being what backward needs beside `tensors`.
        backward: `backward(tensors, kept, gradients, into=None, **options) -> gradients of tensors`. `gradients` has
            None where a result was not used; `into` are buffers for some of the gradients, as the operation says.
        needs: positions of the tensors that backward looks at, the others are None there; None is all of them.
        device, dtypes: None where any will do.
        available: whether it can run on this machine at all, packages and hardware.
        fits: whether it can run a call: sizes, alignment, borders of samples.
    """

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., tuple[Tensor | None, ...]] | None = None
    needs: tuple[int, ...] | None = None
    device: str | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    available: Callable[[], bool] = lambda: True
    fits: Callable[[Call], bool] = lambda call: True


@functools.cache
def triton_available() -> bool:
    """Whether this package's own kernels can run: Triton comes with PyTorch's CUDA builds, and products of bf16 with
    the GPUs of 2020 and later."""
    if importlib.util.find_spec("triton") is None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


class Operation:
    """An operation's backends, the preferred one first; the last, in PyTorch, serves everything."""

    def __init__(self, name: str, backends: Sequence[Backend]) -> None:
        self.name = name
        self.backends = tuple(backends)
        _names.update(backend.name for backend in backends)

    def pick(
        self,
        device: torch.device,
        dtype: torch.dtype,
        tokens: int,
        padded: bool = False,
        packed: bool = False,
        **sizes: float,
    ) -> Backend:
        """The backend of a call: the first that serves it. A forced one (`force_backend`) is not asked about device,
        type and availability, only about what it can compute; where it cannot, PyTorch does."""
        call = Call(tokens, sizes, padded, packed)
        for backend in self.backends[:-1]:
            if _forced is None:
                if backend.device not in (None, device.type) or (backend.dtypes and dtype not in backend.dtypes):
                    continue
                if not backend.available():
                    continue
            elif backend.name != _forced:
                continue
            if backend.fits(call):
                return backend
        return self.backends[-1]

    def named(self, name: str) -> Backend:
        """The backend of that name; ValueError if there is none."""
        for backend in self.backends:
            if backend.name == name:
                return backend
        raise ValueError(f"{self.name} has no backend {name!r}: use {_listed(b.name for b in self.backends)}")


@contextlib.contextmanager
def force_backend(name: str | None) -> Iterator[None]:
    """Run everything inside with the backend `name` where an operation has it and it fits, else in PyTorch; for tests
    and benchmarks. None: let every operation pick."""
    global _forced
    if name is not None and name not in _names:
        raise ValueError(f"backend={name!r} is not valid: use {_listed(_names)}")
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def _listed(names: Any) -> str:
    return " or ".join(repr(name) for name in sorted(names, reverse=True))


def run(backend: Backend, *tensors: Tensor | None, **options: Any) -> Any:
    """An operation on its picked backend, differentiable; kernels keep their inputs and what they say they keep."""
    if backend.backward is None:
        return backend.forward(*tensors, **options)
    results = _Kernels.apply(backend, options, *tensors)
    return results[0] if len(results) == 1 else results


class _Kernels(torch.autograd.Function):
    """The forward and backward of a backend as a node of autograd."""

    @staticmethod
    def forward(ctx: Any, backend: Backend, options: dict[str, Any], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        results, kept = backend.forward(*tensors, **options)
        needed = (t if backend.needs is None or i in backend.needs else None for i, t in enumerate(tensors))
        ctx.save_for_backward(*needed, *kept)
        ctx.backend, ctx.options, ctx.count = backend, options, len(tensors)
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, kept = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        return None, None, *ctx.backend.backward(tensors, kept, gradients, **ctx.options)
