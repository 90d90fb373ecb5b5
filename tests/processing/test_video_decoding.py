"""Which frame comes back, exactly, for the ways in which videos are coded."""

import gc
import multiprocessing
import os
import pickle
import struct
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from video_ma2mba.processing import frame_decoding
from video_ma2mba.processing.video_decoding import open_stream
from video_ma2mba.processing.video_reader import open_video

CODINGS = {
    "gop250.mp4": {"gop": 250},
    "gop12.mp4": {"gop": 12},
    "b_frames.mp4": {"gop": 24, "b_frames": 3},
    "pyramid.mkv": {"gop": 30, "b_frames": 4, "b-pyramid": "normal"},
    "open_gop.mp4": {"gop": 15, "b_frames": 3, "x264opts": "open-gop=1"},
    "intra.mp4": {"gop": 1},
    "hevc_open_gop.mp4": {"codec": "libx265", "gop": 15, "b_frames": 3},
    "vp9.webm": {"codec": "libvpx-vp9", "gop": 20, "deadline": "realtime", "cpu-used": "8"},
    "mpeg4.avi": {"codec": "mpeg4", "b_frames": 2},
    "h264.avi": {"gop": 12, "b_frames": 2},
    "stream.ts": {"gop": 12, "b_frames": 2},
}


@pytest.mark.parametrize("name", CODINGS)
@pytest.mark.parametrize("fps", [1.0, 4.0, 30.0])
def test_frame_on_screen_at_each_moment(make_video, read_numbers, name, fps):
    reader = open_video(make_video(name, **CODINGS[name]), fps=fps)
    chunk = reader.read()
    moments = np.arange(round(3 * fps)) / fps
    expected = [int(moment * 30 + 1e-6) for moment in moments]
    assert read_numbers(chunk.pixels) == expected
    np.testing.assert_allclose(chunk.timestamps, np.array(expected) / 30, atol=6e-4)
    assert reader.expected_frames == len(expected) and reader.warnings == []
    assert reader.duration == pytest.approx(3.0, abs=0.01)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["b_frames.mp4", "open_gop.mp4", "hevc_open_gop.mp4", "gop250.mp4"]),
    start=st.floats(0, 2.9),
    length=st.floats(0.05, 3),
    fps=st.floats(0.3, 40),
    chunk=st.integers(1, 9),
)
def test_any_part_at_any_rate(make_video, read_numbers, name, start, length, fps, chunk):
    end = start + length
    reader = open_video(make_video(name, **CODINGS[name]), fps=fps, start=start, end=end)
    chunks = list(reader.chunks(chunk))
    numbers = [number for part in chunks for number in read_numbers(part.pixels)]
    times = np.concatenate([part.timestamps for part in chunks])
    moments = start + np.arange(len(numbers)) / fps
    assert all(len(part) == chunk for part in chunks[:-1])
    assert len(numbers) == reader.expected_frames
    assert moments[-1] < min(end, 3.0) and moments[-1] + 1 / fps >= min(end, 3.0) - 1.1e-3
    for number, moment, stamp in zip(numbers, moments, times, strict=True):
        assert number / 30 <= moment + 1.1e-3 and moment < (number + 1) / 30 + 1e-4
        assert stamp == pytest.approx(number / 30, abs=1e-4)


def test_variable_frame_rate_with_a_gap(make_video, read_numbers):
    # 30 frames a second for 1 s, then 5 a second for 2 s, a standing picture for 3 s, and 10 a second for 1 s.
    times = [*range(0, 1000, 40), *range(1000, 3000, 200), *range(6000, 7000, 100)]
    path = make_video("vfr.mp4", frames=len(times), times_ms=times, gop=12, b_frames=2)
    reader = open_video(path, fps=2)
    chunk = reader.read()
    expected = [max(i for i, time in enumerate(times) if time <= moment) for moment in range(0, 7000, 500)]
    assert read_numbers(chunk.pixels) == expected
    np.testing.assert_allclose(chunk.timestamps, [times[i] / 1000 for i in expected], atol=2e-3)
    assert reader.duration == pytest.approx(7.0, abs=0.15)


def test_num_frames_and_max_frames_are_spread_evenly(make_video, read_numbers):
    path = make_video("b_frames.mp4", **CODINGS["b_frames.mp4"])
    assert read_numbers(open_video(path, num_frames=4).read().pixels) == [0, 29, 59, 89]
    assert read_numbers(open_video(path, num_frames=1).read().pixels) == [0]
    assert read_numbers(open_video(path, num_frames=500).read().pixels) == list(range(90))
    assert read_numbers(open_video(path, fps=10, max_frames=4).read().pixels) == [0, 29, 58, 87]
    assert read_numbers(open_video(path, fps=1, max_frames=4).read().pixels) == [0, 30, 60]
    assert read_numbers(open_video(path, num_frames=2, start=1, end=2).read().pixels) == [30, 59]


@pytest.mark.parametrize(("degrees", "quarters"), [(90, -1), (180, 2), (270, 1)])
def test_rotation_is_honoured(make_video, tmp_path, degrees, quarters):
    data = bytearray(make_video("b_frames.mp4", **CODINGS["b_frames.mp4"]).read_bytes())
    one = 1 << 16
    a, b = {90: (0, one), 180: (-one, 0), 270: (0, -one)}[degrees]
    matrix = data.index(b"tkhd") + 4 + 40
    data[matrix : matrix + 36] = struct.pack(">9i", a, b, 0, -b, a, 0, 0, 0, 1 << 30)
    path = tmp_path / "turned.mp4"
    path.write_bytes(data)
    upright = open_video(make_video("b_frames.mp4", **CODINGS["b_frames.mp4"]), num_frames=3).read().pixels
    turned = open_video(path, num_frames=3).read().pixels
    np.testing.assert_array_equal(turned, np.rot90(upright, quarters, axes=(1, 2)))


def test_odd_sizes(make_video, read_numbers):
    path = make_video("odd.mp4", frames=30, width=83, height=49, pix_fmt="yuv444p")
    chunk = open_video(path, fps=10).read()
    assert chunk.pixels.shape == (10, 49, 83, 3)
    assert read_numbers(chunk.pixels) == list(range(0, 30, 3))
    small = make_video("odd.avi", frames=30, codec="mpeg4", width=83, height=49)
    assert open_video(small, fps=10, size=(7, 5)).read().pixels.shape == (10, 7, 5, 3)


def test_one_frame_video(make_video, read_numbers):
    for name in ("one.mp4", "one.mkv"):
        reader = open_video(make_video(name, frames=1), fps=1)
        assert read_numbers(reader.read().pixels) == [0]
        assert reader.duration == pytest.approx(1 / 30, abs=2e-3)


def test_stream_without_any_time_stamps(make_video, read_numbers):
    path = make_video("raw.h264", gop=12, b_frames=2, file_format="h264")
    reader = open_video(path, num_frames=3)
    assert read_numbers(reader.read().pixels) == [0, 44, 89]
    assert reader.duration == pytest.approx(3.0)  # the rate is in the stream's own parameters
    assert reader.warnings == []


def test_matroska_without_a_duration(make_video, read_numbers, tmp_path):
    path = make_video("live.mkv", gop=12, container_options={"live": "1"})
    reader = open_video(path, fps=1)
    assert read_numbers(reader.read().pixels) == [0, 30, 60]
    assert reader.duration == pytest.approx(3.0, abs=0.01)


def test_bytes_and_dicts_read_like_the_file(make_video):
    path = make_video("gop12.mp4", **CODINGS["gop12.mp4"])
    expected = open_video(path).read()
    data = path.read_bytes()
    for source in (
        data,
        bytearray(data),
        {"bytes": data, "path": None},
        {"path": str(path), "bytes": None},
        str(path),
    ):
        np.testing.assert_array_equal(open_video(source).read().pixels, expected.pixels)
    np.testing.assert_array_equal(open_video(path.as_uri()).read().pixels, expected.pixels)


def test_reader_is_lazy_repeatable_and_goes_to_other_processes(make_video):
    reader = open_video(make_video("gop12.mp4", **CODINGS["gop12.mp4"]), size=(16, 16))
    first = reader.read().pixels
    again = pickle.loads(pickle.dumps(reader)).read().pixels
    np.testing.assert_array_equal(first, reader.read().pixels)
    np.testing.assert_array_equal(first, again)


def open_files() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files as Linux lists them")
@pytest.mark.parametrize("release", [None, "19.0.2"])
def test_titles_in_any_letters_in_any_pyav(make_video, tmp_path, read_numbers, monkeypatch, release):
    """PyAV 19 decodes what it can by itself, and knows no argument that says so."""
    import av

    path = tmp_path / "latin1.mkv"
    with av.open(str(make_video("gop12.mp4", gop=12))) as source, av.open(str(path), "w") as target:
        (stream,) = source.streams.video
        target.metadata["title"] = "a title in Latin-1: XYZ"
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                target.mux(packet)
    path.write_bytes(path.read_bytes().replace(b"XYZ", b"\xe9\xe8\xff"))
    if release is not None:
        opened = av.open
        lenient = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "surrogateescape"}

        def as_later(*given, metadata_errors=None, **more):
            if metadata_errors is not None:
                raise TypeError("open() got an unexpected keyword argument 'metadata_errors'")
            return opened(*given, **lenient, **more)

        monkeypatch.setattr(av, "__version__", release)
        monkeypatch.setattr(av, "open", as_later)
    assert read_numbers(open_video(path, fps=1).read().pixels) == [0, 30, 60]


def test_files_are_closed(make_video):
    path = make_video("gop12.mp4", **CODINGS["gop12.mp4"])
    before = open_files()
    reader = open_video(path, fps=30)
    assert open_files() == before  # nothing is opened before the first read
    chunks = reader.chunks(2)
    next(chunks)
    assert open_files() > before
    reader.close()
    assert open_files() == before
    with open_video(path, fps=30) as reader:
        next(reader.chunks(2))
    assert open_files() == before


def test_memory_does_not_grow_with_the_video(make_video, monkeypatch):
    """Python memory (numpy's included) while streaming every frame: three times the frames, the same peak.

    One thread decodes ahead, and the consumer waits each time until it has gone as far as it may: two groups of
    pictures, the one being read and the next. By itself that depends on who is faster.
    """
    decoded, upright = [0], frame_decoding.upright_pixels

    def counted(*arguments):
        decoded[0] += 1
        return upright(*arguments)

    monkeypatch.setattr(frame_decoding, "upright_pixels", counted)

    def peak(path, frames):
        reader = open_video(path, fps=30, size=(32, 32))
        list(zip(range(2), reader.chunks(4), strict=False))  # warm up imports and caches
        reader.close()
        decoded[0] = count = 0
        tracemalloc.start()
        for chunk in open_video(path, fps=30, size=(32, 32)).chunks(4, threads=1):
            count += len(chunk)
            while decoded[0] < min((count - 1) // 30 * 30 + 60, frames):
                time.sleep(0.001)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return count, top

    few, low = peak(make_video("short.mp4", frames=300, gop=30), 300)
    many, high = peak(make_video("long.mp4", frames=900, gop=30), 900)
    assert (few, many) == (300, 900)
    assert high < low + 128 * 600  # times and wanted frames: some numbers a frame, never pixels (3072 bytes a frame)


def test_pixels_are_those_of_pillow_bicubic(make_video):
    """Resizing frames of a video equals resizing the full frames as pictures, whatever the mode."""
    path = make_video("gop12.mp4", **CODINGS["gop12.mp4"])
    full = open_video(path, num_frames=3).read().pixels
    for mode in ("squash", "crop", "pad"):
        fitted = open_video(path, num_frames=3, size=(30, 20), resize_mode=mode).read().pixels
        as_pictures = open_video(full, size=(30, 20), resize_mode=mode).read().pixels
        np.testing.assert_array_equal(fitted, as_pictures)


def _collect_garbage() -> None:
    """What a forked process does sooner or later."""
    gc.collect()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork")
def test_a_forked_process_ends_whatever_garbage_it_inherits(make_video):
    """FFmpeg frees a scaler by waiting for its threads, which a fork does not copy."""
    gc.disable()  # the cycle below must still be there when the process forks
    try:
        with open_stream(make_video("gop12.mp4", **CODINGS["gop12.mp4"]), "the video") as (container, stream):
            frame = next(container.decode(stream))
            frame.reformat(640, 480, "rgb24", threads=4)
        cycle: list = [frame]
        cycle.append(cycle)
        del frame, cycle, container, stream
        process = multiprocessing.get_context("fork").Process(target=_collect_garbage)
        process.start()
        process.join(20)
        hangs = process.is_alive()
        if hangs:
            process.kill()
        assert not hangs
        assert process.exitcode == 0
    finally:
        gc.enable()
