"""Messages in the order in which ranks post them never wait for each other in a circle.

NCCL runs what a rank asks of one connection strictly in the order in which it was asked: a receive holds up every send
behind it. Here the walks of all schedules are played through under that rule; gloo, which has no such order, cannot
show it. That connections are made without waiting in a circle is the task of `SequenceGroup`, tested in
`test_parallel_sequence.py` with the order of its calls.
"""

from collections import deque

import pytest

from video_ma2mba.modeling_video_ma2mba.recompute_schedule import CellOrder, shared_order

Message = tuple[int, int, tuple[int, int]]  # from, to, the cell that it is for


def stuck(order: CellOrder, ranks: int, backward: bool, per_pair: bool) -> list[tuple[int, int]]:
    """Cells that never run. `per_pair`: every pair of ranks has a connection for either direction (as NCCL makes them
    one by one); otherwise all messages to higher ranks share one, and all to lower ranks another."""

    def way(source: int, to: int) -> tuple:
        return (source < to, frozenset((source, to)) if per_pair else None)

    step = -1 if backward else 1
    queues: list[dict[tuple, deque[tuple[str, Message]]]] = [{} for _ in range(ranks)]
    cells: list[deque[tuple[int, int]]] = [deque() for _ in range(ranks)]
    for rank in range(ranks):  # the host posts everything without waiting
        for coming, cell in order.programme(rank, backward):
            for other in coming:
                source = order.owner(other[1] - step)
                queues[rank].setdefault(way(source, rank), deque()).append(("receive", (source, rank, other)))
            cells[rank].append(cell)
            following = cell[1] + step
            if 0 <= following < order.segments and order.owner(following) != rank:
                to = order.owner(following)
                message = (rank, to, (cell[0], following))
                queues[rank].setdefault(way(rank, to), deque()).append(("send", message))
    done: set[tuple[int, int]] = set()
    arrived: set[Message] = set()
    moved = True
    while moved:
        moved = False
        for rank in range(ranks):
            while cells[rank]:
                block, segment = cells[rank][0]
                before = segment - step
                source = order.owner(before) if 0 <= before < order.segments else rank
                if source != rank and (source, rank, (block, segment)) not in arrived:
                    break
                done.add(cells[rank].popleft())
                moved = True
            for name, queue in queues[rank].items():
                while queue and queue[0][0] == "send":
                    source, to, cell = message = queue[0][1]
                    other = queues[to].get(name)
                    if (cell[0], cell[1] - step) not in done or not other or other[0] != ("receive", message):
                        break
                    queue.popleft()
                    other.popleft()
                    arrived.add(message)
                    moved = True
    return [cell for rank in range(ranks) for cell in cells[rank]]


@pytest.mark.parametrize("schedule", ["round_robin", "stretches"])
@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
@pytest.mark.parametrize("per_pair", [True, False], ids=["a connection for each pair", "one for all"])
def test_no_schedule_waits_in_a_circle(schedule, ranks, per_pair):
    for blocks, segments, band in ((1, 7, 0), (4, 8, 0), (8, 8, 2), (8, 9, 4), (6, 3, 0), (8, 2, 0), (16, 21, 5)):
        order = shared_order(schedule, blocks, segments, ranks, band)
        for backward in (False, True):
            left = stuck(order, ranks, backward, per_pair)
            assert left == [], f"{blocks} x {segments} cells, band {band}, backward {backward}: {left[:3]}"
