"""Words between the processes of a run."""

from typing import Any


def everyone(mine: Any, group: Any = None) -> list[Any]:
    """`mine` of every rank of a process group, by rank; default: of all processes."""
    from torch import distributed

    found: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(found, mine, group=group)
    return found
