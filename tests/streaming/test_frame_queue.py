"""Falling behind: what is given up, who waits, and that nobody waits for ever."""

import threading
import time

import pytest

from video_ma2mba.streaming.frame_queue import FrameQueue


def test_drop_keeps_the_newest():
    queue = FrameQueue("drop", 3)
    assert [queue.put(n) for n in range(5)] == [None, None, None, 0, 1]
    assert queue.dropped == 2 and len(queue) == 3
    assert queue.take(2) == [2, 3] and queue.take(9) == [4]


@pytest.mark.parametrize("policy", ["queue", "auto"])
def test_queue_makes_the_source_wait_and_loses_nothing(policy):
    queue = FrameQueue(policy, 2)
    most, found = [], []

    def put():
        for n in range(50):
            queue.put(n)
            most.append(len(queue))
        queue.end()

    thread = threading.Thread(target=put)
    thread.start()
    while frames := queue.take(3):
        time.sleep(0.001)
        found += frames
    thread.join(5)
    assert found == list(range(50)) and max(most) <= 2
    assert queue.dropped == 0 and queue.waited > 0


def test_read_means_that_the_reader_came_back():
    queue = FrameQueue("drop", 4)
    queue.put(1)
    assert not queue.wait_until_read(0.01)
    queue.take(1)
    assert not queue.wait_until_read(0.01), "taken, but not read yet"
    thread = threading.Thread(target=queue.take, args=(1,))
    thread.start()
    assert queue.wait_until_read(5)
    queue.close()
    thread.join(5)
    assert not thread.is_alive()


def test_closing_wakes_whoever_waits():
    queue = FrameQueue("queue", 1)
    queue.put(1)
    thread = threading.Thread(target=queue.put, args=(2,))
    thread.start()
    queue.close()
    thread.join(5)
    assert not thread.is_alive()
    assert queue.take(1) == [] and queue.put(3) is None and queue.wait_until_read(0)


def test_bad_settings():
    with pytest.raises(ValueError, match="policy must be one of auto, drop, queue, not 'forget'"):
        FrameQueue("forget", 1)
    with pytest.raises(ValueError, match="at least 1 frame"):
        FrameQueue("drop", 0)
