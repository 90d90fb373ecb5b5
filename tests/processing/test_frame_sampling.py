"""The choice of frames against a plain restatement of the rule, for any times of frames."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from video_ma2mba.processing.frame_sampling import Sampling

gaps = st.lists(st.floats(0.005, 5), min_size=0, max_size=60)


@given(gaps, st.floats(0.1, 50), st.floats(0.01, 30), st.floats(0, 20))
def test_fps_takes_the_last_frame_not_after_each_moment(gaps, fps, last, start):
    times = np.concatenate([[0.0], np.cumsum(gaps)])
    duration = times[-1] + last
    sampling = Sampling(fps=fps, start=start)
    if start >= duration:
        with pytest.raises(ValueError, match="beyond the end"):
            sampling.choose(times, duration, "clip")
        return
    chosen = sampling.choose(times, duration, "clip")
    for k, index in enumerate(chosen):
        moment = start + k / fps
        assert index == 0 or times[index] <= moment + 1.001e-3
        assert index == len(times) - 1 or times[index + 1] > moment + 0.999e-3
    assert len(chosen) >= 1
    assert start + len(chosen) / fps >= duration - 1.001e-3  # nothing is left out at the end
    assert len(chosen) == 1 or start + (len(chosen) - 1) / fps < duration


@given(gaps, st.integers(1, 100), st.floats(0.1, 50))
def test_numbers_of_frames(gaps, limit, fps):
    times = np.concatenate([[0.0], np.cumsum(gaps)])
    duration = times[-1] + 0.04
    chosen = Sampling(num_frames=limit).choose(times, duration, "clip")
    assert len(chosen) == min(limit, len(times))
    assert chosen[0] == 0 and (limit == 1 or chosen[-1] == len(times) - 1)
    assert np.all(np.diff(chosen) >= 0)
    capped = Sampling(fps=fps, max_frames=limit).choose(times, duration, "clip")
    everything = Sampling(fps=fps).choose(times, duration, "clip")
    assert len(capped) == min(limit, len(everything))
    if len(everything) <= limit:
        np.testing.assert_array_equal(capped, everything)
    elif limit > 1:
        assert (capped[0], capped[-1]) == (everything[0], everything[-1])


def test_absurd_numbers_of_samples_are_refused():
    times, duration = np.array([0.0, 1e9]), 1e9 + 1
    with pytest.raises(ValueError, match="clip: 30 frames a second of 1000000001 s are too many"):
        Sampling(fps=30).choose(times, duration, "clip")
    assert len(Sampling(fps=30, max_frames=7).choose(times, duration, "clip")) == 7


def test_both_limits_hold():
    times = np.arange(100) / 25
    assert len(Sampling(num_frames=50, max_frames=8).choose(times, 4.0, "clip")) == 8
    assert len(Sampling(num_frames=8, max_frames=50).choose(times, 4.0, "clip")) == 8
