"""Recall on matrices made by hand."""

import pytest
import torch

from video_ma2mba.retrieval.recall import ranks, recall, recall_both_ways

SCORES = torch.tensor([[0.9, 0.1, 0.2], [0.3, 0.2, 0.9], [0.5, 0.4, 0.1], [0.1, 0.8, 0.7]])
RIGHT = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0]]).bool()  # texts 1 and 3 are of video 1


def test_ranks_by_hand():
    assert ranks(SCORES, RIGHT).tolist() == [1, 3, 3, 1]
    assert ranks(SCORES.T, RIGHT.T).tolist() == [1, 1, 4]


def test_recall_by_hand():
    found = recall(SCORES, RIGHT)
    assert found == {"r1": 0.5, "r5": 1.0, "r10": 1.0, "median_rank": 2.0}
    both = recall_both_ways(SCORES, RIGHT)
    assert both["t2v_r1"] == 0.5 and both["v2t_r1"] == pytest.approx(2 / 3) and both["v2t_median_rank"] == 1.0
    back = recall_both_ways(SCORES, RIGHT, torch.where(RIGHT, 1.0, 0.0))
    assert back["t2v_r1"] == 0.5 and back["v2t_r1"] == 1.0


def test_a_model_that_finds_everything_alike_finds_nothing():
    assert recall(torch.zeros(20, 20), torch.eye(20).bool())["r10"] == 0.0


def test_what_has_no_partner_is_only_in_the_way():
    scores, right = torch.tensor([[0.5, 0.9], [0.4, 0.1]]), torch.tensor([[True, False], [False, False]])
    assert recall_both_ways(scores, right) == {
        **{"t2v_r1": 0.0, "t2v_r5": 1.0, "t2v_r10": 1.0, "t2v_median_rank": 2.0},
        **{"v2t_r1": 1.0, "v2t_r5": 1.0, "v2t_r10": 1.0, "v2t_median_rank": 1.0},
    }
