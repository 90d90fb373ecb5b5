"""What is no video is refused in one clear sentence; what is damaged gives what can be read, and a warning."""

import re
import struct
import threading
import time
import warnings
import wave
import zlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from video_ma2mba.processing.video_reader import open_video


def boxes(data: bytes, start: int = 0, end: int | None = None) -> list[tuple[bytes, int, int]]:
    """The boxes of an mp4 file as `(type, first byte, byte behind)`."""
    found, end = [], len(data) if end is None else end
    while start < end:
        length, kind = struct.unpack_from(">I4s", data, start)
        found.append((kind, start, start + length))
        start += length
    return found


def read_with_warnings(source, **options):
    reader = open_video(source, **options)
    with pytest.warns(UserWarning, match=re.escape(reader.name)) as caught:
        chunk = reader.read()
    assert reader.warnings and len(caught) == len(reader.warnings)
    return reader, chunk


@pytest.fixture
def faststart(make_video):
    return make_video("faststart.mp4", b_frames=2, noisy=True, container_options={"movflags": "faststart"})


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.mp4: no such file"):
        open_video(tmp_path / "nowhere.mp4")


def test_directory_without_images(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}: the directory contains no images"):
        open_video(tmp_path)


def test_empty_sources(tmp_path):
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(ValueError, match=r"empty\.mp4: the file is empty"):
        open_video(tmp_path / "empty.mp4")
    with pytest.raises(ValueError, match="empty"):
        open_video(b"")
    with pytest.raises(ValueError, match="no frames"):
        open_video([])
    with pytest.raises(ValueError, match="path of the video is empty"):
        open_video("")
    with pytest.raises(ValueError, match="must be a path"):
        open_video(3)
    with pytest.raises(ValueError, match="'path' or 'bytes'"):
        open_video({"video": "a.mp4"})


def test_not_a_video(tmp_path):
    path = tmp_path / "text.mp4"
    path.write_text("this is a text " * 500)
    with pytest.raises(ValueError, match=r"text\.mp4: not a video"):
        open_video(path).read()
    with pytest.raises(ValueError, match="bytes>: not a video"):
        open_video(path.read_bytes()).read()


def test_wrong_kinds_of_address():
    for address in ("rtsp://camera/1", "concat://a|b", "subfile,,start,0,end,9://x.mp4"):
        with pytest.raises(ValueError, match="not supported"):
            open_video(address)
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_video("concat:a.mp4|b.mp4")


def test_audio_only(tmp_path):
    path = tmp_path / "sound.wav"
    with wave.open(str(path), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    with pytest.raises(ValueError, match=r"sound\.wav: there is no video in this file, it contains only audio"):
        open_video(path).read()


def test_music_with_a_cover_picture_is_no_video(tmp_path):
    song, cover = BytesIO(), BytesIO()
    with av.open(song, "w", format="mp3") as container:
        stream = container.add_stream("libmp3lame", rate=44100)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.int16), format="s16p", layout="mono")
        frame.rate = 44100
        for _ in range(20):
            frame.pts = None
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    Image.new("RGB", (8, 8)).save(cover, "PNG")
    body = b"\0image/png\0\3\0" + cover.getvalue()
    tag = b"APIC" + struct.pack(">IH", len(body), 0) + body
    length = bytes(len(tag) >> shift & 0x7F for shift in (21, 14, 7, 0))
    path = tmp_path / "song.mp3"
    path.write_bytes(b"ID3\3\0\0" + length + tag + song.getvalue())
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1  # FFmpeg takes the cover for a video stream
    with pytest.raises(ValueError, match="contains only audio"):
        open_video(path).read()


def test_no_decodable_frame(faststart):
    data = bytearray(faststart.read_bytes())
    _, start, end = next(box for box in boxes(bytes(data)) if box[0] == b"mdat")
    data[start + 8 : end] = bytes(end - start - 8)
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(ValueError, match="not one frame could be decoded"):
        open_video(bytes(data)).read()


def test_truncated_file_gives_its_beginning(faststart, read_numbers):
    data = faststart.read_bytes()
    reader, chunk = read_with_warnings(data[: len(data) * 2 // 3], fps=30)
    numbers = read_numbers(chunk.pixels)
    assert 30 < len(numbers) < 89
    assert numbers[:-4] == list(range(len(numbers) - 4))  # frames around the cut may miss what they refer to
    assert any("header promises 3.0 s" in warning for warning in reader.warnings)


def test_file_cut_before_its_index_is_refused(make_video):
    data = make_video("gop12_plain.mp4", gop=12).read_bytes()
    with pytest.raises(ValueError, match="header is damaged"):
        open_video(data[: len(data) // 2]).read()


def test_truncated_matroska_and_transport_stream(make_video, read_numbers):
    for name in ("cut.mkv", "cut.ts"):
        data = make_video(name, b_frames=2, noisy=True).read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            numbers = read_numbers(open_video(data[: len(data) // 2], fps=30).read().pixels)
        assert 30 < len(numbers) < 60 and numbers[:30] == list(range(30))


@pytest.mark.parametrize("name", ["flips.mp4", "flips.mkv", "flips.ts"])
def test_flipped_bytes_lose_few_frames(make_video, read_numbers, name):
    intact = make_video(name, b_frames=2, noisy=True).read_bytes()
    reported = 0
    for seed in range(4):
        random = np.random.default_rng(seed)
        data = bytearray(intact)
        for place in random.integers(len(data) // 4, len(data) * 3 // 4, 40):
            data[place] ^= 0xFF
        reader = open_video(bytes(data), fps=10)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            chunk = reader.read()
        numbers = np.array(read_numbers(chunk.pixels))
        assert len(numbers) >= 25
        nominal = np.rint(chunk.timestamps * 30)
        assert (numbers == nominal).mean() > 0.6  # a damaged picture may show wrong bars; the times stay right
        reported += bool(reader.warnings)
    assert reported  # not every flipped bit is an error to a decoder


def test_start_and_end(make_video):
    path = make_video("gop12_plain.mp4", gop=12)
    for options, reason in [
        ({"fps": 0}, "fps must be more than 0"),
        ({"fps": -1}, "fps must be more than 0"),
        ({"fps": float("nan")}, "fps must be more than 0"),
        ({"fps": 1e9}, "at most 1000"),
        ({"fps": None}, "either fps or num_frames"),
        ({"num_frames": 0}, "num_frames must be a whole number of at least 1"),
        ({"max_frames": 0}, "max_frames must be"),
        ({"start": -1}, "start must be a time"),
        ({"end": float("inf")}, "end must be a time"),
        ({"start": 2, "end": 2}, r"start \(2 s\) must come before end \(2 s\)"),
        ({"size": (0, 4)}, "at least 1 pixel"),
        ({"size": (30000, 30000)}, "more than the limit"),
        ({"resize_mode": "stretch"}, "squash, crop, pad"),
    ]:
        with pytest.raises(ValueError, match=reason):
            open_video(path, **options)
    with pytest.raises(
        ValueError, match=r"gop12_plain\.mp4: start \(3 s\) is beyond the end of the video \(3\.000 s\)"
    ):
        open_video(path, start=3).read()
    assert len(open_video(path, start=2.99, end=1e6).read()) == 1
    with pytest.raises(ValueError, match="at least 1 frame"):
        open_video(path).chunks(0)


def test_gigantic_frames_are_refused_before_decoding(tmp_path):
    video = tmp_path / "giant.y4m"
    video.write_bytes(b"YUV4MPEG2 W16000 H16000 F25:1 Ip A1:1 C420jpeg\nFRAME\n" + bytes(4096))
    header = b"IHDR" + struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    image = tmp_path / "giant.png"
    image.write_bytes(
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\1IDAT"
    )
    for path in (video, image):
        begin = time.perf_counter()
        with pytest.raises(ValueError, match=rf"{path.name}: .*(16000x16000|limit of)"):
            open_video(path).read()
        assert time.perf_counter() - begin < 5
    with pytest.raises(ValueError, match="more than the limit"):
        open_video(np.broadcast_to(np.uint8(0), (1, 30000, 30000, 3))).read()


def test_thousands_of_streams(make_video):
    data = make_video("gop12_plain.mp4", gop=12).read_bytes()
    _, start, end = next(box for box in boxes(data) if box[0] == b"moov")
    _, track_start, track_end = next(box for box in boxes(data, start + 8, end) if box[0] == b"trak")
    copies = data[track_start:track_end] * 3000
    moov = data[start + 8 : end] + copies
    many = data[:start] + struct.pack(">I", 8 + len(moov)) + b"moov" + moov + data[end:]
    begin = time.perf_counter()
    with pytest.raises(ValueError, match="not a video, or its header is damaged"):
        open_video(many).read()
    assert time.perf_counter() - begin < 20


def test_a_header_promising_years_is_not_believed(faststart, read_numbers):
    data = bytearray(faststart.read_bytes())
    for kind, skip in ((b"mdhd", 20), (b"mvhd", 20), (b"tkhd", 24)):
        place = data.index(kind)
        struct.pack_into(">I", data, place + skip, 0xFFFFFFF0)
    reader = open_video(bytes(data), fps=1)
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert read_numbers(reader.read().pixels) == [0, 30, 60]
    assert time.perf_counter() - begin < 5 and reader.duration == pytest.approx(3, abs=0.01)


def test_time_stamps_that_leap_a_year_are_not_believed(make_video, read_numbers):
    times = [*range(0, 2000, 40), *range(40_000_000_000, 40_000_002_000, 40)]
    path = make_video("leap.mkv", frames=100, times_ms=times, gop=12)
    reader, chunk = read_with_warnings(path, num_frames=3)
    assert read_numbers(chunk.pixels) == [0, 49, 99]
    assert reader.duration < 10


def test_unreadable_images_of_a_directory_are_skipped(tmp_path, picture_of, read_numbers):
    for number in (10, 2, 1):
        Image.fromarray(picture_of(number)).save(tmp_path / f"frame{number}.png")
    (tmp_path / "frame3.png").write_bytes(b"not an image")
    reader, chunk = read_with_warnings(tmp_path)
    assert read_numbers(chunk.pixels) == [1, 2, 10]
    assert chunk.timestamps.tolist() == [0, 1, 3]
    assert "frame3.png" in reader.warnings[0]
    with pytest.raises(ValueError, match=r"frame3\.png: not a readable image"):
        open_video(tmp_path / "frame3.png").read()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def server(faststart):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(faststart.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_web_addresses(server, faststart, read_numbers):
    reader = open_video(f"{server}/{faststart.name}", fps=1)
    assert read_numbers(reader.read().pixels) == [0, 30, 60]
    with pytest.raises(FileNotFoundError, match=r"missing\.mp4: no such address"):
        open_video(f"{server}/missing.mp4").read()
    with pytest.raises(ConnectionError, match="cannot read from this address"):
        open_video("http://127.0.0.1:9/video.mp4").read()
    for page in (
        "<!DOCTYPE html><html><body>film</body></html>",
        "\n<!-- made by -->\n<HTML lang=en>",
        "<?xml version='1'?><html/>",
    ):
        (faststart.parent / "watch").write_text(page + " " * 2000)
        with pytest.raises(ValueError, match=r"/watch\?v=1: this is a web page, not a video: .*yt-dlp"):
            open_video(f"{server}/watch?v=1").read()
    (faststart.parent / "watch").write_text("no page " * 2000)
    with pytest.raises(ValueError, match="watch: not a video"):
        open_video(f"{server}/watch").read()


def test_streams_that_appear_late_are_left_alone(make_video, picture_of, read_numbers):
    """A transport stream that gains another stream on the way, as broadcasts do."""
    one, two = make_video("stream.ts", gop=12, b_frames=2).read_bytes(), BytesIO()
    with av.open(two, "w", format="mpegts") as container:
        streams = [container.add_stream("libx264", rate=30) for _ in range(2)]
        for stream in streams:
            stream.width, stream.height = 80, 48
        for number in range(20):
            for stream in streams:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture_of(number), format="rgb24")))
        for stream in streams:
            container.mux(stream.encode())
    data = one + two.getvalue() + one * 50  # FFmpeg looks for streams at the beginning and at the end only
    reader, chunk = read_with_warnings(data, end=2.5)
    assert read_numbers(chunk.pixels) == [0, 30, 60]
    assert any("time stamps are not usable" in warning for warning in reader.warnings)  # they start again and again


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["cut.mkv", "cut.ts", "flips.mp4", "raw.h264"]), data=st.data())
def test_random_damage_is_read_or_refused(make_video, name, data):
    """Any bytes of any file changed, and its end cut off: frames come, or one clear error."""
    file_format = {"file_format": "h264"} if name.endswith("h264") else {}
    damaged = bytearray(make_video(name, b_frames=2, noisy=True, **file_format).read_bytes())
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(damaged) - 1), st.integers(0, 255)), max_size=30)
    ):
        damaged[place] = value
    cut = data.draw(st.integers(1, len(damaged)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            chunk = open_video(bytes(damaged[:cut]), fps=2, max_frames=20, size=(16, 16)).read()
        except ValueError as error:
            named = str(error).startswith(f"<{cut} bytes>: ")
        else:
            named = True
            assert chunk.pixels.shape == (len(chunk.timestamps), 16, 16, 3) and len(chunk) > 0
            assert (np.diff(chunk.timestamps) >= 0).all()
    assert named
