"""Ranks that share sequences give what one process gives: five gloo processes on the CPU, in groups of 2, 3, 4 and 5.

The cases themselves are in `sequence_ranks.py`, which runs once for all of them.
"""

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch.distributed

from video_ma2mba.modeling_video_ma2mba.parallel_cut import SequenceCut, clip_numbers, cut_sequence

pytestmark = [
    pytest.mark.timeout(280),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]

CASES = {  # what the names of cases begin with, how many there are, and on how many ranks
    "stack 2": (4, 2),
    "stack 3": (4, 3),
    "stack 4": (4, 4),
    "stack 5": (4, 5),
    "heads 2": (4, 2),
    "heads 4": (4, 4),
    "heads whole 2": (1, 2),
    "heads whole rows 4": (1, 4),
    "heads uneven 3": (1, 3),
    "rounding 2": (1, 2),
    "rounding 5": (1, 5),
    "bits 2": (1, 2),
    "bits 4": (1, 4),
    "whole one row 2": (1, 2),
    "whole one row 3": (1, 3),
    "whole rows 3": (1, 3),
    "whole rows 5": (1, 5),
    "whole frozen 2": (1, 2),
    "whole short 5": (1, 5),
    "own frames 2": (1, 2),
    "own frames 3": (1, 3),
    "steps fp64 3": (1, 3),
    "steps fp32 2": (1, 2),
    "drain": (3, 3),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank found, by case, and the words of all."""
    folder = tmp_path_factory.mktemp("sequence")
    script = Path(__file__).with_name("sequence_ranks.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(script), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    files = [folder / f"{rank}.json" for rank in range(5)]
    return [json.loads(f.read_text()) if f.is_file() else {} for f in files], done.stdout + done.stderr


@pytest.mark.parametrize("name", CASES)
def test_ranks_compute_what_one_process_computes(ranks, name):
    found, words = ranks
    number, size = CASES[name]
    for rank in range(size):
        own = {case: error for case, error in found[rank].items() if case.startswith(name)}
        assert len(own) == number, f"rank {rank} came to {list(found[rank])[-1:]}: {words[-4000:]}"
        for case, error in own.items():
            assert error is None, f"{case} on rank {rank}: {error}"


# ------------------------------------------------------------------------------------------------------- cuts
def video(*parts: int) -> torch.Tensor:
    """(1, S) bool: alternating numbers of text and video tokens."""
    return torch.cat([torch.full((n,), bool(i % 2)) for i, n in enumerate(parts)])[None]


def test_a_single_row_is_cut_between_frames():
    is_video = video(5, 4 * 20, 7)
    for ranks in (2, 3, 4, 5):
        cut = cut_sequence(is_video, ranks, 4, segment_length=20)
        assert cut.tokens == 92 and len(cut.segments) == 5
        assert all(b in (0, 92) or b <= 5 or b >= 85 or (b - 5) % 4 == 0 for b in cut.borders), cut.borders
        frames = [cut.frames(is_video, rank, 4).tolist() for rank in range(ranks)]
        assert sorted(chain(*frames)) == list(range(20)), "every frame is encoded once"
        parts = [cut.take(torch.arange(92)[None], rank)[0].tolist() for rank in range(ranks)]
        assert sorted(chain(*parts)) == list(range(92))
        assert all(cut.mask(rank)[part].all() for rank, part in enumerate(parts))


def test_clips_stay_whole():
    is_video, clips = video(3, 4 * 9, 2, 4 * 5, 1), clip_numbers([9, 5], 4)
    assert clips.tolist() == [0] * 4 + [1] * 4 + [2] + [3] * 4 + [4]
    cut = cut_sequence(is_video, 3, 4, clips, segment_length=9)
    frames = [cut.frames(is_video, rank, 4, clips).tolist() for rank in range(3)]
    assert sorted(chain(*frames)) == list(range(14)), "cuts between clips share them out once"
    through = SequenceCut((0, 9, 62), 2)  # in the second frame of the first clip
    assert through.frames(is_video, 0, 4, clips).tolist() == [0, 1, 2, 3], "a clip is encoded whole, on both sides"
    assert through.frames(is_video, 1, 4, clips).tolist() == list(range(14))
    assert through.frames(is_video, 1, 4).tolist() == list(range(1, 14))


def test_default_cuts_give_every_rank_as_many_segments():
    for tokens in (300, 70_000, 1 << 20):
        for ranks in (2, 3, 4):
            cut = cut_sequence(torch.zeros(1, tokens, dtype=torch.bool), ranks, 144)
            assert len(cut.segments) % ranks == 0 and cut.longest <= 16384
            lengths = [stop - start for start, stop in cut.segments]
            assert max(lengths) - min(lengths) <= 1
            assert tokens < 4096 * ranks or min(lengths) >= 4096


def test_short_sequences_use_a_smaller_group():
    assert cut_sequence(torch.zeros(1, 200, dtype=torch.bool), 5, 4).active == 3, "segments of 64 tokens at least"
    cut = cut_sequence(torch.zeros(1, 3, dtype=torch.bool), 5, 4, segment_length=1)
    assert (len(cut.segments), cut.active, cut.own(3), cut.own(2)) == (3, 3, [], [2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0, 4, 4), 2), "must rise from 0"),
        (((1, 4), 2), "must rise from 0"),
        (((0, 4), 2, "zigzag"), "use one of round_robin, stretches, heads"),
        (((0, 4), 0), "ranks=0"),
    ],
)
def test_cuts_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SequenceCut(*arguments)
