"""Reading ahead: the same items in the same order as without threads, bounded, and nothing left running."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from video_ma2mba.processing import frame_decoding
from video_ma2mba.processing.frame_decoding import decode_frames, part_cuts
from video_ma2mba.processing.read_ahead import in_order
from video_ma2mba.processing.video_decoding import scan_video
from video_ma2mba.processing.video_reader import open_video


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.lists(st.integers(), max_size=9), max_size=12),
    threads=st.integers(0, 4),
    spare=st.integers(0, 4),
    room=st.integers(1, 5),
    taken=st.integers(0, 60),
)
def test_order_is_kept_and_threads_end(parts, threads, spare, room, taken):
    def generator(numbers):
        yield from numbers

    expected = [number for numbers in parts for number in numbers]
    running = in_order([lambda n=numbers: generator(n) for numbers in parts], threads, threads + spare or 1, room)
    found = [number for number, _ in zip(running, range(taken), strict=False)]
    running.close()
    assert found == expected[:taken]
    assert readers() == []


def test_an_error_comes_at_its_place_and_ends_everything():
    def breaks():
        yield 3
        raise ZeroDivisionError("here")

    def endless():
        while True:
            yield 0

    found = []
    with pytest.raises(ZeroDivisionError, match="here"):
        found.extend(in_order([lambda: iter_of(1, 2), breaks, endless, endless], 3, 4, 2))
    running = in_order([lambda: iter_of(1, 2), breaks, endless], 2, 3, 2)
    assert [next(running), next(running), next(running)] == [1, 2, 3]
    with pytest.raises(ZeroDivisionError):
        next(running)
    assert readers() == []


def iter_of(*numbers):
    yield from numbers


def test_no_more_is_made_ahead_than_there_is_room_for():
    made = []

    def counted(first):
        for number in range(first, first + 100):
            made.append(number)
            yield number

    running = in_order([lambda f=first: counted(f) for first in range(0, 1000, 100)], 2, 3, 5)
    assert next(running) == 0
    time.sleep(0.3)
    # Two parts run, each with 5 items waiting, one in the hand of its thread, and one consumed.
    assert len(made) <= 2 * 6 + 1
    assert list(running) == list(range(1, 1000))


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(frame_decoding, "PART_WANTED", 3)


CODINGS = {
    "gop12.mp4": {"gop": 12},
    "b_frames.mp4": {"gop": 24, "b_frames": 3},
    "open_gop.mp4": {"gop": 15, "b_frames": 3, "x264opts": "open-gop=1"},
    "gop2.mp4": {"gop": 2, "b_frames": 1},
    "intra.mp4": {"gop": 1},
    "hevc_open_gop.mp4": {"codec": "libx265", "gop": 15, "b_frames": 3},
    "pyramid.mkv": {"gop": 30, "b_frames": 4, "b-pyramid": "normal"},
}


@pytest.mark.parametrize("name", CODINGS)
def test_parts_side_by_side_give_the_same_frames(make_video, read_numbers, small_parts, name):
    path = make_video(name, **CODINGS[name])
    index = scan_video(path, name)
    wanted = np.arange(0, 90, 2)
    assert (len(part_cuts(index, wanted)) > 1) == name.endswith("mp4")
    whole = np.stack([pixels for pixels, _ in decode_frames(path, name, index, wanted, [], threads=0)])
    for skip in (0, 7, 31):
        found = [list(decode_frames(path, name, index, wanted, [], skip=skip, threads=n)) for n in (0, 1, 4)]
        for frames in found:
            assert [number for _, number in frames] == wanted[skip:].tolist()
            pixels = np.stack([pixels for pixels, _ in frames])
            assert read_numbers(pixels) == wanted[skip:].tolist()
            np.testing.assert_array_equal(pixels, whole[skip:])  # reading on after an interruption: the same bits
    for turns in (2, 3):  # who takes turns decodes the same pictures, of his own turns only
        for turn in range(turns):
            own = np.arange(len(wanted)) // 4 % turns == turn
            frames = list(decode_frames(path, name, index, wanted, [], own=own, threads=1))
            assert [number for _, number in frames] == wanted[own].tolist()
            np.testing.assert_array_equal(np.stack([pixels for pixels, _ in frames]), whole[own])
    assert readers() == []


def test_damage_is_met_the_same_by_any_number_of_threads(make_video, small_parts):
    intact = make_video("flips.mp4", b_frames=2, noisy=True).read_bytes()
    differing = 0
    for seed in range(20):
        random = np.random.default_rng(seed)
        data = bytearray(intact)
        for place in random.integers(len(data) // 8, len(data) * 7 // 8, 30):
            data[place] ^= 0xFF
        index = scan_video(bytes(data), "damaged")
        wanted = np.arange(0, len(index.times), 3)
        outcomes = []
        for threads in (0, 1, 4):
            problems = []
            frames = list(decode_frames(bytes(data), "damaged", index, wanted, problems, threads=threads))
            # Not the pixels: FFmpeg fills what is missing of a picture with what its memory held before.
            outcomes.append(([number for _, number in frames], sorted(set(problems))))
        assert outcomes[0] == outcomes[1] == outcomes[2]
        differing += bool(outcomes[0][1])
    assert differing > 2  # damage that nobody met would prove nothing


def test_reading_stopped_early_leaves_no_thread(make_video, small_parts, monkeypatch):
    import torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    path = make_video("gop12.mp4", gop=12)
    with open_video(path, fps=30) as reader:
        next(reader.chunks(2))
        assert readers()
    assert readers() == []
    reader = open_video(path, fps=30)
    chunks = reader.chunks(2)
    next(chunks)
    del chunks
    reader.close()
    assert readers() == []


def test_a_failing_fit_is_raised_and_not_waited_for(make_video):
    path = make_video("gop12.mp4", gop=12)
    index = scan_video(path, "gop12")

    def fail(pixels):
        raise MemoryError("no room for the picture")

    began = time.perf_counter()
    with pytest.raises(MemoryError, match="no room"):
        list(decode_frames(path, "gop12", index, np.arange(90), [], fit=fail, threads=2))
    assert time.perf_counter() - began < 5 and readers() == []
