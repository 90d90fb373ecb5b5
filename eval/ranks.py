"""What several processes of a run share, and the words between them."""

from typing import Any

SHARE_FRAMES = 2000
"""Films of so many frames (half an hour, at one a second) are read by all processes of a run together."""


def everyone(mine: Any, group: Any = None) -> list[Any]:
    """`mine` of every rank of a process group, by rank; default: of all processes."""
    from torch import distributed

    found: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(found, mine, group=group)
    return found
