"""Sources: files, pipes, growing files, addresses that break off, are silent, or are gone."""

import io
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from video_ma2mba import open_video
from video_ma2mba.streaming.frame_clock import FrameClock
from video_ma2mba.streaming.live_frames import LiveFrames, Patience
from video_ma2mba.streaming.live_sources import LiveSource, find_source
from video_ma2mba.streaming.stream_report import StreamReport

from .conftest import grey, numbers_of, reply

PATIENT = Patience(connect=20, data=20, retries=2, first_pause=0.02)  # where sources end by themselves
SHORT = Patience(connect=2, data=1.5, retries=2, first_pause=0.02)  # where silence is what ends them


def watch(source, fps=1.0, patience=PATIENT, **settings):
    """All chosen frames `(numbers, seconds)` and the report."""
    report = StreamReport()
    source = source if isinstance(source, LiveSource) else find_source(source, settings.pop("follow", False))
    frames = LiveFrames(source, FrameClock(fps), report, threading.Event(), patience, **settings)
    found = [(picture(), seconds) for picture, seconds in frames]
    return numbers_of([pixels for pixels, _ in found]), [seconds for _, seconds in found], report


def events(report) -> list[str]:
    return [mark.event for mark in report.timeline]


@pytest.mark.parametrize("fps", [1.0, 2.0, 0.7, 5.0])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_a_file_gives_the_frames_of_the_reader(grey_video, name, fps):
    path = grey_video(name, frames=17, rate=3)
    with open_video(path, fps=fps) as reader:
        expected = reader.read()
    numbers, seconds, report = watch(path, fps)
    assert numbers == numbers_of(list(expected.pixels))
    np.testing.assert_allclose(seconds, expected.timestamps, atol=1e-6)
    assert report.frames_seen == 17 and events(report) == ["ended"]


def test_realtime_takes_its_time(grey_video):
    began = time.monotonic()
    numbers, _, _ = watch(grey_video("a.mp4", frames=5, rate=5), 5.0, realtime=True)
    assert numbers == [0, 1, 2, 3, 4] and time.monotonic() - began >= 0.8


@pytest.mark.skipif(sys.platform == "win32", reason="pipes are polled with select()")
def test_a_pipe(grey_video):
    data = grey_video("a.ts").read_bytes()
    read_end, write_end = os.pipe()

    def write():
        with open(write_end, "wb") as pipe:
            for place in range(0, len(data), 1000):
                pipe.write(data[place : place + 1000])
                pipe.flush()
                time.sleep(0.001)

    threading.Thread(target=write, daemon=True).start()
    numbers, _, report = watch(LiveSource("a pipe", "pipe", read_end))
    assert numbers == list(range(0, 20, 2)) and report.frames_damaged == 0
    os.close(read_end)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no named pipes")
def test_a_named_pipe_and_stopping_while_it_is_silent(grey_video, tmp_path):
    fifo = tmp_path / "camera.fifo"
    os.mkfifo(fifo)
    data = grey_video("a.ts").read_bytes()
    source = find_source(fifo)
    writer = os.open(fifo, os.O_WRONLY)
    threading.Thread(target=os.write, args=(writer, data), daemon=True).start()
    stop, found = threading.Event(), []

    def read():
        for _, seconds in LiveFrames(source, FrameClock(1.0), StreamReport(), stop, SHORT):
            found.append(seconds)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    deadline = time.monotonic() + 100
    while len(found) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert thread.is_alive(), "the pipe is still open"
    stop.set()
    thread.join(100)
    assert not thread.is_alive() and len(found) >= 5
    os.close(writer)


def test_a_growing_file(grey_video, tmp_path):
    data = grey_video("a.ts").read_bytes()
    path = tmp_path / "growing.ts"
    path.write_bytes(data[:5000])

    def grow():
        for place in range(5000, len(data), 4000):
            time.sleep(0.02)
            with path.open("ab") as file:
                file.write(data[place : place + 4000])

    threading.Thread(target=grow, daemon=True).start()
    numbers, _, _ = watch(path, follow=True, patience=replace(SHORT, data=1))
    assert numbers == list(range(0, 20, 2))


# ----------------------------------------------------------------------------------------------------------- addresses
def test_a_recording_that_breaks_off_goes_on_behind_the_last_frame(grey_video, serve):
    data = grey_video("a.mp4", movflags="faststart").read_bytes()
    first, size = data.index(b"mdat"), len(data) - data.index(b"mdat")
    address = serve(lambda handler, n: reply(handler, data[: first + size * (n + 4) // 6], len(data)))
    numbers, seconds, report = watch(address)
    assert numbers == list(range(0, 20, 2)) and seconds == [float(n) for n in range(10)]
    assert report.frames_seen == 20 and report.gap_seconds == 0
    assert report.breaks == report.reconnects >= 2
    assert events(report)[:2] == ["broke off", "connected again"] and events(report)[-1] == "ended"


def test_a_recording_without_times_in_its_header(grey_video, serve):
    """A transport stream says only how many bytes it has: read again to see that nothing follows, not as new."""
    data = grey_video("a.ts").read_bytes()
    numbers, _, report = watch(serve(lambda handler, n: reply(handler, data[: len(data) * (n + 1) // 2], len(data))))
    assert numbers == list(range(0, 20, 2)) and report.frames_seen == 20 and report.gap_seconds == 0


def test_a_live_stream_that_breaks_off_has_a_gap(grey_video, serve):
    parts = [grey_video("a.ts", frames=8).read_bytes(), grey_video("a.ts", frames=6, first=20).read_bytes()]

    def answer(handler, n):
        if n < 2:
            reply(handler, parts[n])
        else:
            handler.send_error(404)

    numbers, seconds, report = watch(serve(answer))
    assert numbers == [0, 2, 4, 6, 20, 22, 24]
    assert seconds[:4] == [0, 1, 2, 3] and np.diff(seconds)[3] > 0.5 and np.allclose(np.diff(seconds)[4:], 1)
    assert report.gap_seconds == pytest.approx(seconds[4] - 3.5, abs=1e-6) and report.reconnects == 1
    assert events(report) == ["broke off", "connected again", "broke off", "given up", "ended"]
    assert report.breaks == 2


SEND_RTSP = """
import sys, time, av, numpy as np
for attempt in range(100):
    try:
        with av.open(sys.argv[1], "w", format="rtsp", options={"rtsp_transport": "tcp"}) as container:
            stream = container.add_stream("libx264", rate=10, options={"g": "1", "bf": "0", "tune": "zerolatency"})
            stream.width = stream.height = 64
            for number in range(15):
                picture = np.full((64, 64, 3), number * 8, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
                time.sleep(0.1)
        break
    except ConnectionRefusedError:  # nobody listens yet
        time.sleep(0.1)
"""


def test_a_camera_that_speaks_rtsp():
    """The camera calls here, which FFmpeg calls listening; from then on it is RTSP as anywhere."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"rtsp://127.0.0.1:{free.getsockname()[1]}/live"
    found = find_source(address)
    source = replace(found, options={**found.options, "rtsp_flags": "listen", "listen_timeout": "100"})
    with subprocess.Popen([sys.executable, "-c", SEND_RTSP, address]) as camera:
        try:
            numbers, seconds, report = watch(source, 2.0, Patience(connect=100, data=10, retries=0))
        finally:
            camera.kill()
    assert 12 <= report.frames_seen <= 15 and len(numbers) >= 2
    assert np.allclose(np.diff(numbers), 5, atol=1) and np.allclose(np.diff(seconds), 0.5, atol=0.1)
    assert events(report) == ["broke off", "given up", "ended"]


def test_silence_is_a_break(grey_video, serve):
    data = grey_video("a.ts").read_bytes()

    def answer(handler, n):
        reply(handler, data[: len(data) // 2] if n == 0 else data)
        if n == 0:
            time.sleep(30)  # the thread is a daemon

    began = time.monotonic()
    numbers, _, report = watch(serve(answer), patience=replace(SHORT, retries=0))
    assert time.monotonic() - began < 8
    assert numbers == list(range(0, len(numbers) * 2, 2)) and 3 <= len(numbers) < 10
    assert events(report) == ["broke off", "given up", "ended"]


def test_what_is_not_there_is_said_at_once(serve):
    began = time.monotonic()
    with pytest.raises(FileNotFoundError, match="no such address"):
        watch(serve(lambda handler, n: handler.send_error(404)))
    with pytest.raises((ValueError, ConnectionError), match="not a video|cannot read from this address"):
        watch(serve(lambda handler, n: reply(handler, b"hello " * 2000)))
    with pytest.raises(ConnectionError, match="cannot read from this address"):
        watch(serve(lambda handler, n: time.sleep(30)), patience=replace(SHORT, data=0.5))
    assert time.monotonic() - began < 8


# -------------------------------------------------------------------------------------------------- frames and choices
def test_frames_given_by_hand():
    arrays = [grey(n) for n in range(4)]
    assert watch(iter(arrays))[:2] == ([0, 1, 2, 3], [0.0, 1.0, 2.0, 3.0])
    assert watch([Image.fromarray(a) for a in arrays])[0] == [0, 1, 2, 3]
    assert watch([np.stack(arrays[:3]), arrays[3]])[0] == [0, 1, 2, 3]
    assert watch((a, n / 2) for n, a in enumerate(arrays))[0] == [0, 2]
    assert watch(zip(arrays, (0.0, 1.0, 5.0, 6.0), strict=True))[0] == [0, 1, 1, 1, 1, 2, 3]


def test_sources_are_told_apart(tmp_path, grey_video):
    path = grey_video("a.mp4")
    assert find_source(str(path)).kind == "file" and find_source(path, follow=True).kind == "growing file"
    found = find_source("rtsp://user:secret@host:554/stream?token=x")
    assert (found.kind, found.name) == ("address", "rtsp://host:554/stream") and "secret" in found.target
    with pytest.raises(FileNotFoundError, match="nowhere.mp4: no such file"):
        find_source(tmp_path / "nowhere.mp4")
    with pytest.raises(ValueError, match="a directory cannot be watched"):
        find_source(tmp_path)
    with pytest.raises(ValueError, match="kind gopher://"):
        find_source("gopher://host")
    with pytest.raises(ValueError, match="a source must be"):
        find_source(2.5)
    if sys.platform.startswith("linux"):
        if Path("/dev/video0").exists():
            assert find_source("0").kind == "camera"
        with pytest.raises(FileNotFoundError, match="camera 987: there is no such camera"):
            find_source("987")


# --------------------------------------------------------------------------------------------- as the reader sees them
@pytest.mark.parametrize("name", ["packed_b_frames.avi", "hdr_pq.mp4", "hdr_hlg.mp4"])
def test_difficult_files_as_the_reader_reads_them(name):
    path = Path(__file__).parent.parent / "processing" / "files" / name
    expected = open_video(path, fps=5).read()
    frames = LiveFrames(find_source(path), FrameClock(5.0), StreamReport(), threading.Event(), PATIENT)
    found = [(picture(), seconds) for picture, seconds in frames]
    np.testing.assert_array_equal([pixels for pixels, _ in found], expected.pixels)
    np.testing.assert_allclose([seconds for _, seconds in found], expected.timestamps, atol=1e-3)


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(grey(number)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_a_camera_without_times_runs_at_the_pace_of_its_frames(serve):
    """Multipart pictures as web cameras send them: 4 a second for 5 seconds."""

    def answer(handler, n):
        if n:
            handler.send_error(503)
            return
        handler.send_response(200)
        handler.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        handler.end_headers()
        for number in range(20):
            data = jpeg(number)
            head = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(data)
            handler.wfile.write(head + data + b"\r\n")
            handler.wfile.flush()
            time.sleep(0.25)

    _, seconds, report = watch(serve(answer), 2.0, replace(PATIENT, retries=0))
    assert report.frames_seen >= 18 and 3 < report.seconds < 9  # 0.8 at an invented 25 a second
    assert seconds == pytest.approx(np.arange(len(seconds)) / 2, abs=0.6)
    assert events(report)[0] == "no times in the stream" and "arrival" in report.timeline[0].detail


def test_bare_streams_run_at_their_declared_rate(tmp_path):
    for codec, file_format, rate in (("libx264", "h264", 5), ("mjpeg", "mjpeg", 25)):
        path = tmp_path / f"a.{file_format}"
        with av.open(str(path), "w", format=file_format) as container:
            stream = container.add_stream(codec, rate=5, options={"g": "1", "bf": "0"} if codec == "libx264" else {})
            stream.width, stream.height = 32, 32
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            for number in range(20):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(grey(number), format="rgb24")))
            container.mux(stream.encode())
        _, _, report = watch(path)
        assert report.seconds == pytest.approx(19 / rate, abs=0.01) and report.frames_seen == 20
        assert report.timeline[0].detail == f"taken instead: {rate} frames a second"


def test_a_pipe_that_gives_no_frame_is_an_error(tmp_path):
    """As an mp4 does whose index stands at its end: FFmpeg cannot go back in a pipe."""
    late = tmp_path / "late.mp4"
    random = np.random.default_rng(0)
    with av.open(str(late), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 640, 480, "yuv420p"
        stream.options = {"crf": "5", "preset": "ultrafast"}
        for _ in range(20):
            noise = random.integers(0, 256, (480, 640, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise)))
        container.mux(stream.encode())
    with subprocess.Popen(["cat", str(late)], stdout=subprocess.PIPE) as writer:
        source = LiveSource("a pipe", "pipe", writer.stdout.fileno())
        with pytest.raises(ValueError, match="a pipe: it ended before one frame could be read .*faststart"):
            list(LiveFrames(source, FrameClock(1.0), StreamReport(), threading.Event(), Patience()))
        writer.kill()
