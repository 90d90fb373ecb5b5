"""A stand-in for Apple's GPU: a device whose tensors hold their values on the CPU, and refuse what Metal refuses.

PyTorch lets Python bring a device of its own (`NAME`), once a process: tests of it run in processes of their own.
Everything below autograd passes through `StandIn`: results of calls on such tensors are such tensors; fp64 is refused,
and so is a call that mixes them with tensors of the CPU. `seen` collects the operations, for a look at which of them
PyTorch has for MPS at all. It proves devices and types, not the numbers of Metal's kernels.
"""

import re
from pathlib import Path

import torch
import torchgen
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

NAME = "metal"
# May have both: copies, and places to read from or write to.
_MIXED = ("copy_", "_to_copy", "index", "index_put", "_index_put_impl", "set_")


class OnMps(torch.Tensor):
    """A tensor of the stand-in; `inner` holds its values."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=torch.device(NAME, 0)
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {}, set())

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self):
        return self.inner.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert mps:0 device type tensor to numpy")

    def __repr__(self):
        return f"OnMps({self.inner})"


class _Made(TorchFunctionMode):
    """`torch.tensor` passes by everything that is below."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and "metal" in str(kwargs.get("device")):
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


def run(func, args, kwargs, seen):
    name = func.overloadpacket.__name__
    there = kwargs.get("device")
    tensors = []
    tree_map(lambda t: tensors.append(t) if isinstance(t, torch.Tensor) else None, (args, kwargs))
    on_mps = [t for t in tensors if isinstance(t, OnMps)]
    to_mps = there is not None and torch.device(there).type == NAME
    if on_mps or to_mps:
        seen.add(func)
        if name not in _MIXED:
            beside = [t for t in tensors if not isinstance(t, OnMps) and t.ndim]
            assert not beside, f"{func} gets tensors of the CPU and of MPS"
    plain_args, plain_kwargs = tree_map(lambda t: t.inner if isinstance(t, OnMps) else t, (args, kwargs))
    if to_mps:
        plain_kwargs["device"] = torch.device("cpu")
    out = func(*plain_args, **plain_kwargs)
    leaves = to_mps or (on_mps and there is None and name != "_local_scalar_dense")
    if name in ("copy_", "set_"):
        return args[0]

    def wrap(value):
        if not isinstance(value, torch.Tensor) or not leaves:
            return value
        if value.dtype == torch.float64:
            raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype: {func}")
        for given in on_mps:  # in place
            if given.inner is value:
                return given
        return OnMps(value)

    return tree_map(wrap, out)


class _Generators:
    """What PyTorch asks a device's module."""

    def __init__(self):
        self.state = torch.Generator()

    def is_available(self):
        return True

    def device_count(self):
        return 1

    def current_device(self):
        return 0

    def is_initialized(self):
        return True

    def _is_in_bad_fork(self):
        return False

    def manual_seed_all(self, seed):
        self.state.manual_seed(seed)

    def get_rng_state(self, device=None):
        return self.state.get_state()

    def set_rng_state(self, state, device=None):
        self.state.set_state(state)

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


class StandIn(TorchDispatchMode):
    """Inside, `NAME` is a device; one instance a process."""

    def __init__(self):
        super().__init__()
        self.seen = set()
        torch.utils.backend_registration._setup_privateuseone_for_python_backend(NAME, _Generators())

    def __enter__(self):
        self.made = _Made()
        self.made.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self.made.__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {}, self.seen)


def without_metal(seen) -> list[str]:
    """Of these operations, those for which PyTorch says nowhere that MPS, or any device, can run them."""
    text = (Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml").read_text(encoding="utf-8")
    entries = {}
    for entry in re.split(r"^- func: ", text, flags=re.MULTILINE)[1:]:
        entries[entry.split("(", 1)[0]] = entry
    missing = []
    for func in seen:
        name = func._schema.name.removeprefix("aten::") + (
            f".{func._schema.overload_name}" if func._schema.overload_name else ""
        )
        entry = entries.get(name)
        while entry and (found := re.search(r"structured_delegate: (\S+)", entry)):
            entry = entries.get(found[1])
        if entry is None or (
            "dispatch:" in entry and not re.search(r"MPS|CompositeExplicit|CompositeImplicit", entry)
        ):
            missing.append(name)
    return sorted(missing)
