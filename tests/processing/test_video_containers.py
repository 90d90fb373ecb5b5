"""What containers say about a video beside its pictures: edits, key marks, orientation, pixel aspect, several streams.

Right values are those of ffmpeg and ffprobe 5.1 for the same files, written down here.
"""

import struct
import threading
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from video_ma2mba.processing.video_decoding import scan_video
from video_ma2mba.processing.video_reader import open_video

from .conftest import numbered_picture, numbers_in, write_video
from .mp4_boxes import find_box, replace_box, with_edits, with_matrix, without_sync_table, written

FILES = Path(__file__).parent / "files"
B_FRAMES = 2 / 30  # seconds by which display times lie behind in files with two B-frames


def shown(source, fps=30.0, **settings):
    reader = open_video(source, fps=fps, **settings)
    chunk = reader.read()
    return numbers_in(chunk.pixels), chunk.timestamps, reader


def runs(*spans: tuple[int, int]) -> list[int]:
    return [number for first, last in spans for number in range(first, last + 1)]


EDITS = {
    "hidden beginning": ([(2.0, B_FRAMES + 0.7)], runs((21, 80))),
    "delay": ([(0.5, None), (2.0, B_FRAMES + 1.15)], runs((35, 94))),
    "parts exchanged": ([(1.0, B_FRAMES + 2.5), (1.0, B_FRAMES + 0.5)], runs((75, 104), (15, 44))),
    "middle left out": ([(1.0, B_FRAMES), (1.0, B_FRAMES + 2.5)], runs((0, 29), (75, 104))),
    "shown twice": ([(1.0, B_FRAMES + 1), (1.0, B_FRAMES + 1)], runs((30, 59), (30, 59))),
}


@pytest.mark.parametrize("gop", [30, 250])
@pytest.mark.parametrize("name", EDITS)
def test_edit_lists(make_video, tmp_path, name, gop):
    edits, expected = EDITS[name]
    data = make_video("edited.mp4", frames=120, gop=gop, b_frames=2).read_bytes()
    path = written(tmp_path / "edited.mp4", with_edits(data, edits))
    numbers, times, reader = shown(path, fps=30)
    assert sorted(set(numbers)) == sorted(set(expected)) and reader.warnings == []
    if name != "middle left out":  # where FFmpeg leaves a tenth of a second between the parts
        assert numbers == expected and reader.duration == pytest.approx(2, abs=0.01)
        np.testing.assert_allclose(times, np.arange(60) / 30, atol=1e-3)
        assert shown(path, fps=5)[0] == expected[::6]
        assert shown(path, fps=1, start=0.5)[0] == expected[15::30]


def test_what_an_edit_list_hides_is_decoded_only_from_the_last_key_frame(make_video, tmp_path):
    data = make_video("edited.mp4", frames=120, gop=30, b_frames=2).read_bytes()
    index = scan_video(written(tmp_path / "cut.mp4", with_edits(data, [(3.0, B_FRAMES + 0.7)])), "cut")
    assert len(index.entries) == 4 and index.entries[0] < 0 == index.pts[0]
    assert len(index.times) == 90 and index.seekable


# ----------------------------------------------------------------------------------------------- where decoding begins
REFRESH = {"x264opts": "intra-refresh=1:keyint=30:no-deblock=1"}


@pytest.mark.parametrize("b_frames", [0, 2])
@pytest.mark.parametrize("name", ["refresh.mp4", "refresh.mkv", "refresh.ts"])
def test_intra_refresh(make_video, name, b_frames):
    """Key marks on pictures from which a decoder recovers only picture by picture."""
    path = make_video(name, frames=240, gop=30, b_frames=b_frames, width=80, **REFRESH)
    for fps in (30, 7, 1):
        numbers, times, _ = shown(path, fps)
        expected = [int(n * 30 / fps + 0.04) for n in range(len(numbers))]
        assert numbers == expected and len(numbers) == -(-8 * fps // 1)
        np.testing.assert_allclose(times, np.array(expected) / 30, atol=6e-4)
    index = scan_video(path, name)
    assert len(index.entries) > 2, "decoding may begin before a recovered picture"
    assert index.pts is not None and (index.keys[1:] > index.entries[1:]).all()


def test_every_packet_marked_as_key(make_video, tmp_path):
    for codec, options in (("libx264", {}), ("mpeg4", {}), ("libx265", {})):
        data = make_video("keys.mp4", frames=90, gop=15, b_frames=2, codec=codec, **options).read_bytes()
        path = written(tmp_path / f"{codec}.mp4", without_sync_table(data))
        for fps in (1, 10):
            assert shown(path, fps)[0] == list(range(0, 90, 30 // fps)), codec
        assert 6 <= len(scan_video(path, codec).entries) <= 8, codec


@pytest.mark.parametrize("name", ["mpeg4.avi", "vp8.webm", "vp9.webm", "mpeg2video.mkv"])
def test_every_index_entry_marked_as_key(make_video, name):
    """AVI's index, and SimpleBlocks: flags of containers that are bits anyone may set."""
    codec = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(name.split(".")[0], name.split(".")[0])
    data = bytearray(make_video(name, frames=60, gop=20, codec=codec).read_bytes())
    changed = 0
    if name.endswith("avi"):
        place = data.index(b"idx1") + 8
        while place + 16 <= len(data) and data[place : place + 4] == b"00dc":
            changed += not data[place + 4] & 0x10
            data[place + 4] |= 0x10
            place += 16
    else:
        place = 0
        while (place := data.find(b"\xa3", place)) >= 0:  # a SimpleBlock: its size, its track, its time, its flags
            size = 8 - int(data[place + 1]).bit_length() + 1 if data[place + 1] else 9
            flags = place + 1 + size + 3
            if flags < len(data) and data[flags - 3] == 0x81 and data[flags] in (0, 0x80):
                changed += data[flags] == 0
                data[flags] = 0x80
            place += 1
    assert changed > 40
    for fps in (1, 10):
        assert shown(bytes(data), fps)[0] == list(range(0, 60, 30 // fps))


@pytest.mark.parametrize("fps", [30, 5, 1])
def test_packed_b_frames(fps):
    """Xvid in AVI: two pictures in a packet, then one that is none; ffmpeg shows 58 frames at a steady rate."""
    numbers, times, reader = shown(FILES / "packed_b_frames.avi", fps)
    every = [*range(57), 59]
    expected = [every[int(n * 30 / fps + 0.04)] for n in range(-(-58 * fps // 30))]
    assert numbers == expected and reader.warnings == []
    np.testing.assert_allclose(times, np.arange(len(numbers)) / fps, atol=1e-3)
    assert reader.duration == pytest.approx(58 / 30, abs=1e-3)


def test_streams_cut_within_a_group(make_video):
    for name in ("open.ts", "refresh.ts"):
        options = {"x264opts": "open-gop=1"} if name == "open.ts" else REFRESH
        data = make_video(name, frames=120, gop=15, b_frames=2 if name == "open.ts" else 0, noisy=True, **options)
        data = data.read_bytes()
        cut = data[: 188 * 3] + data[len(data) // 3 // 188 * 188 :]
        numbers, times, _ = shown(cut, 30)
        assert numbers == list(range(numbers[0], 120)) and 30 <= numbers[0] <= 75
        np.testing.assert_allclose(times, np.arange(len(numbers)) / 30, atol=1e-3)


def test_avi_frames_left_out_keep_their_times(make_video):
    """AVI says with empty chunks that the picture stands still."""
    times = [*range(0, 1000, 40), *range(1000, 3000, 200)]
    path = make_video("still.avi", frames=len(times), times_ms=times, codec="mpeg4", gop=12)
    numbers, _, reader = shown(path, 2)
    assert numbers == [max(i for i, t in enumerate(times) if t <= 1000 * n / 2 + 1) for n in range(6)]
    assert reader.duration == pytest.approx(3, abs=0.25)


# ------------------------------------------------------------------------------------------- orientation, pixel aspect
MATRICES = {
    "as stored": (1, 0, 0, 1, lambda p: p),
    "90": (0, 1, -1, 0, lambda p: np.rot90(p, -1, (1, 2))),
    "180": (-1, 0, 0, -1, lambda p: np.rot90(p, 2, (1, 2))),
    "270": (0, -1, 1, 0, lambda p: np.rot90(p, 1, (1, 2))),
    "left and right": (-1, 0, 0, 1, lambda p: p[:, :, ::-1]),
    "up and down": (1, 0, 0, -1, lambda p: p[:, ::-1]),
    "transposed": (0, 1, 1, 0, lambda p: p.swapaxes(1, 2)),
    "otherwise transposed": (0, -1, -1, 0, lambda p: np.rot90(p, 2, (1, 2)).swapaxes(1, 2)),
}


@pytest.mark.parametrize("name", MATRICES)
def test_eight_orientations(make_video, tmp_path, name):
    *matrix, turn = MATRICES[name]
    path = make_video("plain.mp4", frames=3, noisy=True)
    stored = open_video(path, fps=30).read().pixels
    turned = written(tmp_path / "turned.mp4", with_matrix(path.read_bytes(), *matrix))
    np.testing.assert_array_equal(open_video(turned, fps=30).read().pixels, turn(stored))


ASPECTS = {
    "a.mp4": "libx264",
    "a.mov": "mpeg4",
    "a.mkv": "libx264",
    "a.ts": "libx264",
    "a.mpg": "mpeg2video",
}


@pytest.mark.parametrize("name", ASPECTS)
@pytest.mark.parametrize(("aspect", "width"), [(Fraction(4, 3), 107), (Fraction(8, 9), 71), (Fraction(1), 80)])
def test_pixels_are_made_square(tmp_path, name, aspect, width):
    if name == "a.mpg" and aspect != 1:
        aspect, width = Fraction(16, 9) / Fraction(80, 48), 85  # MPEG-2 knows a few shapes of the whole picture
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        stream = container.add_stream(ASPECTS[name], rate=30)
        stream.width, stream.height, stream.pix_fmt = 80, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        for _ in range(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered_picture(5), format="rgb24")))
        container.mux(stream.encode())
    pixels = open_video(path).read().pixels
    assert pixels.shape[1:] == (48, width, 3)
    padded = open_video(path, size=(96, 96), resize_mode="pad").read().pixels[0]
    rows = np.flatnonzero(padded[:, : 96 // 10].mean((1, 2)) > 60)  # the bar at the left, as high as the picture
    assert len(rows) == pytest.approx(96 * 48 / width, abs=2)


@pytest.mark.parametrize(
    ("across", "down", "width"), [(2, 1, 160), (10, 11, 73), (0, 1, 80), (1, 0, 80), (1000, 1, 80)]
)
def test_pixel_aspect_of_the_container_alone(make_video, tmp_path, across, down, width):
    """A `pasp` box; nonsense in it is passed over."""
    data = make_video("vp9.mp4", frames=3, codec="libvpx-vp9").read_bytes()
    path = "moov/trak/mdia/minf/stbl/stsd"
    start, end = find_box(data, path)
    box = bytearray(data[start:end] + struct.pack(">I4sII", 16, b"pasp", across, down))
    struct.pack_into(">I", box, 0, len(box))
    struct.pack_into(">I", box, 16, struct.unpack_from(">I", box, 16)[0] + 16)
    pixels = open_video(written(tmp_path / "a.mp4", replace_box(data, path, bytes(box)))).read().pixels
    assert pixels.shape[1:] == (48, width, 3)


def test_square_pixels_of_a_turned_video(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 80, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered_picture(5), format="rgb24")))
        container.mux(stream.encode())
    turned = written(tmp_path / "turned.mp4", with_matrix(path.read_bytes(), 0, 1, -1, 0))
    assert open_video(turned).read().pixels.shape[1:] == (160, 48, 3)


# ----------------------------------------------------------------------------------------------------- several streams
def write_streams(path: Path, streams: list[dict], **settings) -> Path:
    """Video streams side by side: each `first` number, `frames`, `width`, `height`, `codec`, `mark`."""
    with av.open(str(path), "w", **settings) as container:
        added = []
        for wanted in streams:
            options = {} if wanted.get("codec") else {"g": "10", "sc_threshold": "0"}
            stream = container.add_stream(wanted.get("codec", "libx264"), rate=10, options=options)
            stream.width, stream.height = wanted.get("width", 80), wanted.get("height", 48)
            stream.pix_fmt = "yuvj420p" if wanted.get("codec") == "mjpeg" else "yuv420p"
            stream.disposition = wanted.get("mark", Disposition(0))
            added.append(stream)
        for number in range(30):
            for stream, wanted in zip(added, streams, strict=True):
                if number < wanted.get("frames", 30):
                    picture = numbered_picture(wanted["first"] + number)
                    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                    frame = frame.reformat(stream.width, stream.height, stream.pix_fmt)
                    frame.pts, frame.time_base = number, Fraction(1, 10)
                    container.mux(stream.encode(frame))
        for stream in added:
            container.mux(stream.encode())
    return path


LARGE = {"width": 160, "height": 96}
STREAMS = {
    "default is second.mkv": [{"first": 500}, {"first": 0, "mark": Disposition.default}],
    "default is second.mp4": [{"first": 500}, {"first": 0, "mark": Disposition.default}],
    "default is smaller.mkv": [{"first": 500, **LARGE}, {"first": 0, "mark": Disposition.default}],
    "larger is second.mkv": [{"first": 500}, {"first": 0, **LARGE}],
    "first of two alike.mkv": [{"first": 0}, {"first": 500}],
    "still first.mkv": [{"first": 500, "frames": 1, "codec": "mjpeg", **LARGE}, {"first": 0}],
    "still first.mov": [{"first": 500, "frames": 1, "codec": "mjpeg", **LARGE}, {"first": 0}],
    "still as default.mp4": [{"first": 500, "frames": 1, "mark": Disposition.default, **LARGE}, {"first": 0}],
    "cover first.mp4": [
        {"first": 500, "frames": 1, "codec": "mjpeg", "mark": Disposition.attached_pic, **LARGE},
        {"first": 0},
    ],
    "first programme.ts": [{"first": 0}, {"first": 500, **LARGE}],
}


@pytest.mark.parametrize("name", STREAMS)
def test_the_film_is_read(tmp_path, name):
    chunk = open_video(write_streams(tmp_path / name, STREAMS[name]), fps=1, size=(48, 80)).read()
    assert numbers_in(chunk.pixels) == [0, 10, 20]


class CountingHandler(SimpleHTTPRequestHandler):
    asked: list[str] = []

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def web_folder(tmp_path):
    CountingHandler.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(CountingHandler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield tmp_path, f"http://127.0.0.1:{server.server_port}", CountingHandler.asked
    server.shutdown()
    server.server_close()


def write_hls(folder: Path) -> None:
    options = {"hls_time": "1", "hls_playlist_type": "vod"}
    for name, first, size in (("low", 500, {}), ("high", 0, LARGE)):
        (folder / name).mkdir()
        write_streams(folder / name / "list.m3u8", [{"first": first, **size}], options=options)
    (folder / "master.m3u8").write_text(
        "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=100000,RESOLUTION=80x48\nlow/list.m3u8\n"
        "#EXT-X-STREAM-INF:AVERAGE-BANDWIDTH=1,BANDWIDTH=900000,RESOLUTION=160x96\nhigh/list.m3u8\n"
    )


def test_the_best_variant_of_a_web_video_is_fetched_once(web_folder):
    folder, address, asked = web_folder
    write_hls(folder)
    reader = open_video(f"{address}/master.m3u8", fps=1, size=(48, 80))
    assert numbers_in(reader.read().pixels) == numbers_in(reader.read().pixels) == [0, 10, 20]
    assert reader.duration == pytest.approx(3, abs=0.01) and reader.warnings == []
    assert len(asked) == len(set(asked)) >= 3 and not any("low" in path for path in asked)
    assert numbers_in(open_video(folder / "master.m3u8", fps=1, size=(48, 80)).read().pixels) == [0, 10, 20]


def test_pieces_of_a_web_video_that_are_missing(web_folder):
    folder, address, _ = web_folder
    write_hls(folder)
    pieces = sorted((folder / "high").glob("*.ts"))
    assert len(pieces) >= 2
    pieces[-1].unlink()
    with pytest.warns(UserWarning, match="1 of .* pieces could not be fetched"):
        assert numbers_in(open_video(f"{address}/master.m3u8", fps=1, size=(48, 80)).read().pixels)[0] == 0
    (folder / "high" / "list.m3u8").unlink()
    with pytest.raises((FileNotFoundError, ConnectionError, ValueError), match="master.m3u8"):
        open_video(f"{address}/nothing/master.m3u8").read()


def test_a_web_playlist_reads_no_file_of_this_machine(web_folder):
    folder, address, _ = web_folder
    secret = folder / "secret.ts"
    write_video(secret, frames=30)
    (folder / "trap.m3u8").write_text(f"#EXTM3U\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n")
    with pytest.raises((ValueError, ConnectionError)):
        open_video(f"{address}/trap.m3u8").read()


# ----------------------------------------------------------------------------------------------------- no times at all
@pytest.mark.parametrize(
    ("name", "codec", "file_format", "rate"),
    [
        ("a.h264", "libx264", "h264", 30),
        ("a.hevc", "libx265", "hevc", 30),
        ("a.m2v", "mpeg2video", "mpeg2video", 30),
        ("a.m4v", "mpeg4", "m4v", 30),
        ("a.mjpeg", "mjpeg", "mjpeg", None),
    ],
)
def test_bare_streams(make_video, name, codec, file_format, rate):
    """At the rate that the stream tells, which FFmpeg takes for 25 in some of them; or at 25, and it is said."""
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = make_video(name, frames=60, codec=codec, file_format=file_format, b_frames=0, pix_fmt=pix_fmt)
    numbers, _, reader = shown(path, 10)
    assert numbers == [int(n * (rate or 25) / 10 + 0.04) for n in range(len(numbers))]
    assert reader.duration == pytest.approx(60 / (rate or 25), abs=1e-3)
    assert reader.warnings == ([] if rate else ["it holds no times; 25 frames per second are assumed"])


def test_boxes_are_found_and_replaced(make_video):
    data = make_video("plain.mp4", frames=3, noisy=True).read_bytes()
    start, end = find_box(data, "moov/trak/tkhd")
    same = replace_box(data, "moov/trak/tkhd", data[start:end])
    assert same == data
    longer = replace_box(data, "moov/trak/edts", struct.pack(">I4s", 8, b"free"))
    assert find_box(longer, "moov")[1] == len(longer)
