"""Layers that are units of FSDP2: parameters are gathered around their use, gradients handed back as shards.

FSDP's own hooks gather a layer for each call and expect one backward for it, by autograd. Multi-axis checkpointing
calls a layer once for every segment, and again inside of a backward pass; and processes cut samples of different
length into different numbers of segments, while all must gather the same layers in the same order. So here the engine
asks for the parameters itself, block by block, all processes agree on the blocks (without gradients, where layers are
gathered segment by segment, on the number of segments), and one reduction per block gives every process its shard of
the mean gradient.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, distributed, nn

from .parallel_dims import ParallelDims
from .stack_protocols import Layers

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_unit(module: nn.Module) -> bool:
    """Whether `fully_shard` made this module a unit of its own."""
    return type(module).__name__.startswith("FSDP") and hasattr(module, "unshard")


def is_shard(parameter: Tensor) -> "TypeGuard[DTensor]":
    """Whether this is one process's part of a parameter."""
    return hasattr(parameter, "device_mesh")


class ShardedLayers:
    """The layers of a stack, each of them a unit; all processes call the same methods in the same order.

    Args:
        layers: at rest, that is, not gathered.
    """

    def __init__(self, layers: Layers) -> None:
        self.mesh = next(p for p in layers[0].parameters() if is_shard(p)).device_mesh
        self.dims = ParallelDims.of_mesh(self.mesh)

    @classmethod
    def of(cls, layers: Layers) -> "ShardedLayers | None":
        """None where no layer is a unit.

        Raises:
            ValueError: some layers are and some are not, or a unit is less than a layer.
        """
        units = [is_unit(layer) for layer in layers]
        for index, layer in enumerate(layers):
            if units[index] != units[0] or any(is_unit(part) for part in layer.modules() if part is not layer):
                raise ValueError(
                    f"the FSDP units of layer {index} do not fit multi-axis checkpointing: make every layer one unit, "
                    "fully_shard(layer), or the whole model, fully_shard(model)"
                )
        return cls(layers) if units[0] else None

    def largest(self, *values: int) -> list[int]:
        """The largest of each value among the processes."""
        kind = self.mesh.device_type
        found = torch.tensor(
            values, device=torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else kind
        )
        for dimension in range(self.mesh.ndim):
            distributed.all_reduce(found, distributed.ReduceOp.MAX, group=self.mesh.get_group(dimension))
        return found.tolist()

    @staticmethod
    @contextlib.contextmanager
    def gathered(*layers: Any) -> Iterator[None]:
        """Inside, these layers hold whole parameters; call their `forward`, past FSDP's hooks."""
        try:
            for layer in layers:
                layer.unshard()
            yield
        finally:
            for layer in layers:
                layer.reshard()

    def idle_rounds(self, layers: Iterable[nn.Module], rounds: int) -> None:
        """Take part in gathering while only other processes, with longer samples, have anything to run."""
        for _ in range(rounds):
            for layer in layers:
                with self.gathered(layer):
                    pass

    def shard_of_mean(self, gradient: Tensor, parameter: "DTensor") -> Tensor:
        """From every process's gradient of a whole parameter, its shard of the mean, laid out like `parameter`."""
        from torch.distributed.tensor import DTensor, Partial

        everywhere = [Partial()] * self.mesh.ndim
        total = DTensor.from_local(gradient / self.dims.batches, self.mesh, everywhere, run_check=False)
        return total.redistribute(placements=parameter.placements).to(parameter.dtype)
