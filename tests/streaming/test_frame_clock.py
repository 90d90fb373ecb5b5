"""Frames of a stream are chosen as those of a file are, without looking ahead."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from video_ma2mba.processing.frame_sampling import Sampling
from video_ma2mba.streaming.frame_clock import FrameClock

gaps = st.lists(st.integers(1, 800), max_size=40)  # of 5 ms
rates = st.sampled_from([0.3, 1.0, 2.0, 7.5, 30.0])


@given(gaps, st.integers(1, 400), rates, st.sampled_from([0.0, 17.25]))
def test_the_frames_of_a_file(gaps, last, fps, start):
    times = np.cumsum([0, *gaps]) * 0.005
    expected = Sampling(fps=fps).choose(times, float(times[-1]) + last * 0.005, "video")
    clock = FrameClock(fps)
    chosen = [frame for n, t in enumerate(times.tolist()) for frame in clock.add(n, start + t)]
    chosen += clock.finish(last * 0.005)
    assert [number for number, _ in chosen] == expected.tolist()
    np.testing.assert_allclose([seconds for _, seconds in chosen], start + times[expected])


@given(gaps, rates)
def test_nothing_is_held_back_longer_than_until_the_next_frame(gaps, fps):
    clock = FrameClock(fps)
    for number, seconds in enumerate((np.cumsum([0, *gaps]) * 0.005).tolist()):
        given = list(clock.add(number, seconds))
        assert all(place in (number - 1, number) for place, _ in given)
        assert clock._moment() > seconds, "every moment up to this frame is settled"


def test_a_break_is_not_filled():
    clock = FrameClock(1.0)
    assert [n for t in (0, 1) for n, _ in clock.add(t, t)] == [0, 1]
    assert list(clock.finish(2.0)) == [(1, 1)]  # shown on for another second
    assert list(clock.add("later", 60.5)) == [("later", 60.5)]


def test_bad_times():
    clock = FrameClock(1.0)
    list(clock.add("a", 5.0))
    with pytest.raises(ValueError, match="one of 4 s came after 5 s"):
        list(clock.add("b", 4.0))
    with pytest.raises(ValueError, match="must be a number of seconds"):
        list(clock.add("b", float("nan")))
    with pytest.raises(ValueError, match="fps must be more than 0"):
        FrameClock(0)
