"""Schedules by the clock are transformers' own, looked up by progress."""

import pytest
import torch
from transformers import get_scheduler

from video_ma2mba.trainer.training_clock import ClockCallback, TrainingClock
from video_ma2mba.trainer.training_config import VideoMa2mbaTrainingConfig


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "polynomial"])
def test_rates_are_those_of_the_schedule(name: str):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    (theirs,) = get_scheduler(name, optimizer, 0, 200).lr_lambdas
    clock = TrainingClock(None, 50.0, schedule=name)
    for step in (0, 37, 100, 163, 199):
        clock.elapsed = 50.0 * step / 200
        assert clock(1000 + step) == pytest.approx(theirs(step), abs=1e-4)


def test_the_saved_clock_goes_on():
    clock = TrainingClock(None, 10.0, 3, "cosine")
    clock.elapsed = 4.0
    scheduler = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0), clock)
    later = TrainingClock(None, 20.0, 3, "cosine")
    other = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0), later)
    callback = ClockCallback(later)
    other.load_state_dict(scheduler.state_dict())
    assert (later.elapsed, later.seconds) == (4.0, 10.0)
    callback.clock.steps, callback.clock.seconds = callback.length  # as when training begins
    assert later.progress(0) == 0.2


def test_the_clock_alone_is_length_enough():
    args = VideoMa2mbaTrainingConfig("out", max_seconds=5.0, report_to="none")
    assert args.max_steps > 10**6
    with pytest.raises(ValueError, match="save_seconds=-1"):
        VideoMa2mbaTrainingConfig("out", save_seconds=-1.0, report_to="none")
