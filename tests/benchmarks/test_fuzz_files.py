"""A part of the fuzzing on every machine that runs the tests: the first damaged files, and all the bombs."""

from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture(scope="module")
def fuzz(benchmark_script: Callable[[str], ModuleType], tmp_path_factory) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUZZ_FILES_SCRATCH", str(tmp_path_factory.mktemp("fuzz")))
        yield benchmark_script("fuzz_files")


def test_states_are_refused_or_right(fuzz):
    verdicts = Counter(fuzz.judge_state(case) for case in fuzz.state_cases(400))
    assert verdicts.keys() <= {"refused", "the same state", "another whole state"}
    assert verdicts["refused"] > 350


def test_the_judge_of_states_notices(fuzz):
    """A damaged file that loads is called WRONG, and an error that does not name the file UNCLEAR."""
    assert fuzz.judge_state(("state", "whole", fuzz.state_bytes(0))) == "the same state"
    assert fuzz.judge_state(("state", "whole", fuzz.state_bytes(1))) == "WRONG"


def test_videos_are_refused_or_read(fuzz):
    verdicts = Counter(fuzz.judge_video(case) for case in fuzz.video_cases(150))
    assert verdicts.keys() <= {"refused", "read", "read, with a warning"}
    assert all(count > 10 for count in verdicts.values()) and len(verdicts) == 3


def test_bombs_take_neither_memory_nor_time(fuzz):
    """In a process of its own, whose memory is looked at."""
    cases = list(fuzz.bombs(fuzz.video_bytes))
    assert len(cases) >= 19
    outcomes = list(fuzz.watched(fuzz.judge_video, cases, 20))
    for (source, kind, _), outcome in zip(cases, outcomes, strict=True):
        assert outcome.verdict in ("refused", "read", "read, with a warning"), (source, kind, outcome)
        assert outcome.peak_mb < 200 and outcome.seconds < 10, (source, kind, outcome)


def test_a_long_index_that_is_true_is_read(fuzz, make_long):
    from video_ma2mba.processing.mp4_index import refuse_endless_index

    for data in (
        fuzz.video_bytes("mp4"),
        fuzz.video_bytes("fragmented.mp4"),
        fuzz.video_bytes("faststart.mp4"),
        make_long,
    ):
        refuse_endless_index(data, "video")
    frames = int.from_bytes(make_long[(at := make_long.index(b"stsz") + 12) : at + 4], "big")
    assert frames == 3000
    lying = bytearray(make_long)
    lying[at : at + 4] = (len(make_long) + 1).to_bytes(4, "big")
    with pytest.raises(ValueError, match="its index lists"):
        refuse_endless_index(bytes(lying), "video")


@pytest.fixture(scope="module")
def make_long() -> bytes:
    """3,000 frames of nothing: few bytes a frame."""
    from io import BytesIO

    import av

    out = BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "ultrafast", "crf": "51"})
        stream.width = stream.height = 16
        for _ in range(3000):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()
