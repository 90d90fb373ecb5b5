"""How the processes of a run share its work."""

import math
import os
import sys
from dataclasses import dataclass
from typing import Any

# What accelerate, FSDP and torchtitan call the dimensions of a mesh.
_NAMES = {
    "data": ("data", "dp", "dp_replicate", "replicate"),
    "shard": ("shard", "fsdp", "dp_shard"),
    "sequence": ("sequence", "sp", "cp"),
}

FEWEST_BLOCKS = 8
"""Blocks of layers at least: with K of them, W ranks wait (W - 1) / K of a segment's time in all."""


def reading_blocks(layers: int, ranks: int) -> list[range]:
    """The layers of each block: `FEWEST_BLOCKS`, or where more ranks take part, two for each rank."""
    size = max(1, layers // max(FEWEST_BLOCKS, 2 * ranks))
    return [range(first, min(first + size, layers)) for first in range(0, layers, size)]


@dataclass(frozen=True)
class ParallelDims:
    """Numbers of processes by what they share; `data * shard * sequence` of them in all, sequence varying fastest.

    Attributes:
        data: whole copies of the parameters, each reading samples of its own.
        shard: processes over which one copy of the parameters is spread (FSDP2, ZeRO), reading samples of their own.
        sequence: processes that work on one sample, each on segments of it.
        rank: this process, from 0.

    Raises:
        ValueError: a number below 1, or a rank outside.
    """

    data: int = 1
    shard: int = 1
    sequence: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        for name in _NAMES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not valid: it must be at least 1")
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank={self.rank} is not one of {self.world} processes")

    @classmethod
    def of_run(cls, shard: int = 1, sequence: int = 1) -> "ParallelDims":
        """The processes of this run: torch.distributed's, before they have met those that the launcher announces, and
        without either this one alone. What `shard` and `sequence` leave are copies of the parameters.

        Raises:
            ValueError: `shard * sequence` does not divide the number of processes.
        """
        world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        if process_group_exists():
            from torch import distributed

            world, rank = distributed.get_world_size(), distributed.get_rank()
        if world % (shard * sequence):
            raise ValueError(f"{world} processes cannot be dealt out to shard={shard} x sequence={sequence}")
        return cls(world // (shard * sequence), shard, sequence, rank)

    @classmethod
    def of_mesh(cls, mesh: Any) -> "ParallelDims":
        """The processes of a `DeviceMesh`. Dimensions go by their usual names; others as `fully_shard` reads them: one
        dimension shards, the first of two holds copies.

        Raises:
            ValueError: more than two dimensions of unknown names.
        """
        known = {alias: name for name, aliases in _NAMES.items() for alias in aliases}
        names = [known[name] for name in mesh.mesh_dim_names or () if name in known]
        if len(set(names)) < mesh.ndim:  # unknown ones, or one twice
            if mesh.ndim > 2:
                raise ValueError(f"the mesh {mesh.mesh_dim_names} has dimensions other than {', '.join(_NAMES)}")
            names = ["data", "shard"][-mesh.ndim :]
        sizes = dict(zip(names, mesh.shape, strict=True))
        place = dict(zip(names, mesh.get_coordinate(), strict=True))
        rank = 0
        for name in _NAMES:
            rank = rank * sizes.get(name, 1) + place.get(name, 0)
        return cls(**sizes, rank=rank)

    @property
    def world(self) -> int:
        """Processes in all."""
        return math.prod(getattr(self, name) for name in _NAMES)

    @property
    def batches(self) -> int:
        """Micro-batches that are worked on at the same time; gradients are means over these."""
        return self.data * self.shard

    @property
    def batch_rank(self) -> int:
        """Which of the micro-batches this process works on."""
        return self.rank // self.sequence

    @property
    def sequence_rank(self) -> int:
        """Which part of its sample this process works on."""
        return self.rank % self.sequence

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and messages."""
        return self.rank == 0


def process_group_exists() -> bool:
    """Whether the processes of this run can talk to each other (`torch.distributed` is initialised)."""
    if "torch" not in sys.modules:  # and is not loaded to find that out
        return False
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized()
