"""Stopping at a repeated run of tokens, against its definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from video_ma2mba.eval.answering import RepeatedNgramStop


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=20),
    st.lists(st.integers(0, 2), min_size=1, max_size=16),
    st.integers(1, 6),
)
def test_stops_exactly_when_the_latest_run_occurred_before(prompt: list[int], answer: list[int], n: int):
    rule = RepeatedNgramStop(n)
    for length in range(1, len(answer) + 1):
        ids = torch.tensor([prompt + answer[:length]])
        runs = [tuple(answer[i : i + n]) for i in range(length - n + 1)]
        expected = bool(runs) and runs[-1] in runs[:-1]
        assert rule(ids, None).tolist() == [expected]


def test_rows_end_on_their_own_and_generation_stops(make_model):
    """A model that repeats itself is stopped at the first repeat."""
    rule = RepeatedNgramStop(2)
    assert rule(torch.tensor([[7, 1], [7, 1]]), None).tolist() == [False, False]
    assert rule(torch.tensor([[7, 1, 2, 1, 2], [7, 1, 2, 2, 1]]), None).tolist() == [True, False]
    model = make_model()
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 7]])
        free = model.generate(input_ids=ids, max_new_tokens=150, do_sample=False)[0, 3:].tolist()
        stopped = model.generate(
            input_ids=ids,
            max_new_tokens=150,
            do_sample=False,
            stopping_criteria=[RepeatedNgramStop(1)],
        )[0, 3:].tolist()
    assert len(stopped) < len(free) and free[: len(stopped)] == stopped
    assert stopped[-1] in stopped[:-1]
    with pytest.raises(ValueError, match="stop_repeat_ngram=-1"):
        RepeatedNgramStop(-1)
