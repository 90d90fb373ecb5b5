"""Subtitles from files and tracks: what they say, when, against ffprobe; and what is told about bad ones."""

import json
import struct
import subprocess
import warnings

import numpy as np
import pytest

from video_ma2mba.processing.frame_times import Cue
from video_ma2mba.processing.video_reader import open_video
from video_ma2mba.processing.video_subtitles import find_subtitles, read_subtitles

SRT = """1
00:00:01,000 --> 00:00:02,500
Grüß <i>Gott</i>,
ihr zwei

2
00:00:04,040 --> 00:00:05,000
{\\an8}Bye & <font color="red">now</font>
"""
CUES = [Cue(1.0, 2.5, "Grüß Gott, ihr zwei"), Cue(4.04, 5.0, "Bye & now")]
VTT = (
    "WEBVTT\n\nNOTE nothing\n\n"
    + SRT.replace(",000 -->", ".000 -->").replace("2,500", "2.500").replace("4,040", "4.040").replace("5,000", "5.000")
    .replace("&", "&amp;").replace("{\\an8}", "").replace('<font color="red">now</font>', "<v Bob>now</v>")
)  # fmt: skip
ASS = """[Script Info]
ScriptType: v4.00+

[V4+ Styles]
Format: Name, Fontname
Style: Default,Arial

[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
Dialogue: 0,0:00:01.00,0:00:02.50,Default,,0,0,0,,Grüß {\\i1}Gott{\\i0},\\Nihr zwei
Dialogue: 0,0:00:04.04,0:00:05.00,Default,,0,0,0,,Bye & now
"""
WORDS = [cue.text for cue in CUES]
WHISPER = {"text": "…", "segments": [{"id": 0, "start": c.start, "end": c.end, "text": f" {c.text}"} for c in CUES]}
CPP = {"transcription": [{"offsets": {"from": c.start * 1000, "to": c.end * 1000}, "text": c.text} for c in CUES]}
PIPELINE = {"chunks": [{"timestamp": [c.start, c.end], "text": c.text} for c in CUES]}
LINES = [
    {"start": "00:00:01.000", "end": "00:00:02.500", "line": WORDS[0]},
    {"start": 4.04, "end": 5, "line": WORDS[1]},
]


@pytest.mark.parametrize(
    "text", [SRT, SRT.replace("\n", "\r\n"), VTT, ASS, *map(json.dumps, (WHISPER, CPP, PIPELINE, LINES))]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_every_form_and_encoding_says_the_same(tmp_path, text, encoding):
    file = tmp_path / "film.txt"
    file.write_bytes(text.encode(encoding))
    found = read_subtitles(file)
    assert found.cues == CUES
    assert found.problems == []


def ffprobe(file, *entries):
    command = ["ffprobe", "-v", "error", "-of", "json", *entries, str(file)]
    return json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


@pytest.fixture(scope="module")
def film(ffmpeg, tmp_path_factory):
    """A film of a variable rate whose clock does not begin at 0, with a track of text; and its container's kinds."""
    folder = tmp_path_factory.mktemp("film")
    (folder / "text.srt").write_text(SRT, encoding="utf-8")
    uneven = "setpts='(3+if(lt(N,20),N/10,2+(N-20)/3))/TB'"
    made = {}
    for name, codec in (("film.mkv", "srt"), ("film.mp4", "mov_text")):
        subprocess.run(
            [ffmpeg, "-v", "error", "-f", "lavfi", "-i", "testsrc=d=3:r=10:s=64x48", "-itsoffset", "3", "-i",
             str(folder / "text.srt"), "-vf", uneven, "-fps_mode", "vfr", "-c:v", "libx264", "-c:s", codec,
             "-copyts", "-avoid_negative_ts", "disabled", str(folder / name)],
            check=True,
        )  # fmt: skip
        made[name] = folder / name
    return made


@pytest.mark.parametrize("name", ["film.mkv", "film.mp4"])
def test_times_of_frames_and_cues_are_those_of_ffprobe(film, name):
    """Both are counted from the first frame, wherever the container's clock begins."""
    packets = ffprobe(film[name], "-show_entries", "packet=pts_time,duration_time,size,codec_type")["packets"]
    shown = sorted(float(packet["pts_time"]) for packet in packets if packet["codec_type"] == "video")
    texts = [packet for packet in packets if packet["codec_type"] == "subtitle" and int(packet["size"]) > 2]
    reader = open_video(film[name], fps=10)
    found = find_subtitles("auto", reader)
    for cue, packet, words in zip(found.cues, texts, WORDS, strict=True):
        assert cue.start == pytest.approx(float(packet["pts_time"]) - shown[0], abs=2e-3)
        assert cue.end - cue.start == pytest.approx(float(packet["duration_time"]), abs=2e-3)
        assert cue.text == words
    times = reader.read().timestamps
    assert set(np.round(times, 3)) <= {round(moment - shown[0], 3) for moment in shown}
    assert times == pytest.approx(reader.frame_times)


def test_auto_takes_the_track_then_the_file_beside_it(film, tmp_path, tiny_video):
    assert "text track" in find_subtitles("auto", open_video(film["film.mp4"])).name
    video = tmp_path / "plain.mp4"
    video.write_bytes(tiny_video.read_bytes())
    assert find_subtitles("auto", open_video(video)) is None
    assert find_subtitles("off", open_video(video)) is find_subtitles(None, open_video(video)) is None
    (tmp_path / "plain.en.vtt").write_text(VTT, encoding="utf-8")
    assert find_subtitles("auto", open_video(video)).name.endswith("plain.en.vtt")
    (tmp_path / "plain.srt").write_text(SRT, encoding="utf-8")
    assert find_subtitles("auto", open_video(video)).name.endswith("plain.srt")
    assert find_subtitles([(1, 2, "a"), Cue(0, 1, "b")], open_video(video)).cues == [Cue(0, 1, "b"), Cue(1, 2, "a")]


DAMAGED = SRT + "\n3\n00:00:aa --> 00:00:07,000\nlost\n\n4\n00:00:05,000 --> 00:00:04,000\nbackwards\n"


def test_what_is_wrong_with_subtitles_is_one_clear_line(tmp_path, tiny_video):
    def told(data):
        file = tmp_path / "film.srt"
        file.write_bytes(data)
        reader = open_video(tiny_video)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return find_subtitles(file, reader).cues, reader.warnings

    cues, said = told(DAMAGED.encode())
    assert cues == CUES
    assert "1 of 3 cues end before they start and are left out" in said[0]
    assert "1 of 4 cues are damaged and left out" in said[1]
    later = SRT.replace("00:00:04,040 --> 00:00:05", "00:01:04,040 --> 00:01:05").encode()
    cues, said = told(later)
    assert cues == CUES[:1]
    assert "1 of 2 cues lie outside of the video, which lasts 0:06" in said[0]
    assert "shifted" in said[0]
    with pytest.raises(
        ValueError, match=r"lie between 1:00:01 and 1:00:05, but the video lasts 0:06: they are shifted"
    ):
        told(SRT.replace("00:00:0", "01:00:0").encode())
    with pytest.raises(ValueError, match=r"film.srt, line 3: the byte 0xfc is not UTF-8 .*iconv"):
        told(SRT.encode("latin-1"))
    for nothing in (b"", b"not at all", b"WEBVTT\n\n", b"[Script Info]\n"):
        with pytest.raises(ValueError, match="there are no subtitles in it"):
            told(nothing)
    with pytest.raises(ValueError, match="this is not JSON"):
        told(b'{"segments": [')
    with pytest.raises(ValueError, match="holds no list of segments"):
        told(b'{"text": "hello"}')
    with pytest.raises(ValueError, match=r"cue 0 is not \(start, end, text\)"):
        told(b'[{"begin": 1}]')
    with pytest.raises(FileNotFoundError, match="no such file of subtitles"):
        read_subtitles(tmp_path / "none.srt")
    with pytest.raises(ValueError, match="this is no file"):
        read_subtitles(tmp_path)


def srt(*cues):
    return "".join(f"{n}\n{times}\n{text}\n\n" for n, (times, text) in enumerate(cues, 1))


ONE = ("00:00:01,000 --> 00:00:02,000", "one")
ASS_HEAD = ASS.partition("Dialogue")[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (srt(("-00:00:01,000 --> 00:00:02,000", "before"), ONE), [(-1, "before"), (1, "one")]),
        (srt(("00:00:-01,000 --> 00:00:02,000", "before")), [(-1, "before")]),
        (srt(("00:00:01,000 --> 00:00:05,000", "long"), ("00:00:02,000 --> 00:00:03,000", "inside")),
         [(1, "long"), (2, "inside")]),
        (srt(("00:00:04,000 --> 00:00:05,000", "later"), ONE), [(1, "one"), (4, "later")]),
        (srt(ONE, ("100:00:01,000 --> 100:00:02,000", "far")), [(1, "one"), (360001, "far")]),
        (srt(("00:00:01 --> 00:00:02", "no milliseconds")), [(1, "no milliseconds")]),
        (srt(("0:0:1.5 --> 0:0:2.25", "few digits")), [(1.005, "few digits")]),
        (srt(("00:00:01,000 -> 00:00:02,000 X1:10 X2:20", "one dash")), [(1, "one dash")]),
        (srt(("00:00:01,000 --> 00:00:02,000", "look --> here"), ("00:00:03,000 --> 00:00:04,000", "42")),
         [(1, "look --> here"), (3, "42")]),
        (ONE[0] + "\n\nafter a gap\n2\n00:00:03,000 --> 00:00:04,000\nno gap\n", [(1, "after a gap"), (3, "no gap")]),
        ("WEBVTT\n00:01,000 --> 00:02,000\nwith a comma\n", [(1, "with a comma")]),
        ("WEBVTT - x\nKind: captions\n\nSTYLE\n::cue { a: b }\n\nNOTE 00:01.000 --> 00:02.000\nnot said\n\nintro\n"
         "00:01.000 --> 00:02.000 align:start\n<c.red>Hi</c> <00:01.500><b>you</b> &lt;x&gt;&nbsp;y\n\nid\n",
         [(1, "Hi you <x> y")]),
        (srt((ONE[0], "Tom &amp; &quot;J&#39;&quot; 3 < 4 <i>a</i><br>b {\\an8}\u202bc\u202c\x00")),
         [(1, "Tom & \"J'\" 3 < 4 a b c")]),
        (ASS_HEAD + "Dialogue: 0,0:00:01.00,0:00:02.00,Default,,0,0,0,,{\\pos(1,2)}Hi{\\k20} you\\Nand\\hme{note}\n"
         "Comment: 0,0:00:01.00,0:00:02.00,Default,,0,0,0,,not said\n"
         "Dialogue: 0,0:00:03.00,0:00:04.00,Default,,0,0,0,,{\\p1}m 0 0 l 100 0{\\p0}\n", [(1, "Hi you and me")]),
        (json.dumps({"words": [{"word": " Hello", "start": 1, "end": 2}, {"word": " world", "start": 2, "end": 3}]}),
         [(1, "Hello world")]),
        (json.dumps([{"start": "1.5", "end": "2.5", "text": "a string"}, {"start": 3, "end": 4, "text": None}]),
         [(1.5, "a string")]),
        (json.dumps({"chunks": [{"timestamp": [1, None], "text": "open end"}]}), [(1, "open end")]),
    ],
)  # fmt: skip
def test_strange_files_say_what_they_mean(tmp_path, text, said):
    (tmp_path / "film.srt").write_text(text, encoding="utf-8")
    found = read_subtitles(tmp_path / "film.srt")
    assert [(cue.start, cue.text) for cue in found.cues] == said
    assert found.problems == []


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (srt(ONE, ("00:00:03,000 --> 00:00:xx,000", "lost")), "1 of 2 cues are damaged"),
        (srt(ONE) + "2\n00:00:03,000", "1 of 2 cues are damaged"),
        ("WEBVTT\n\n00:xx.000 --> 00:02.000\nlost\n\n00:01.000 --> 00:02.000\none\n", "1 of 2 cues are damaged"),
        (ASS_HEAD + "Dialogue: 0,0:00:xx.00,0:00:02.00,Default,,0,0,0,,lost\n"
         "Dialogue: 0,0:00:01.00,0:00:02.00,Default,,0,0,0,,one\n", "1 of 2 cues are damaged"),
        (srt(ONE).encode("utf-32"), ""),
        (srt(ONE).encode("utf-16-le"), ""),
        (bytes(range(256)) * 9, "this is no text"),
        (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03", "this is no text"),
        ("[" * 100_000, "this is not JSON"),
        ("[00:01.00]a song\n", "no subtitles in it .*other kinds: ffmpeg"),
        (srt(("00:00:0x,000 --> 00:00:02,000", "lost")), "no subtitles in it but 1 damaged"),
    ],
)  # fmt: skip
def test_damage_of_every_kind_is_told(tmp_path, data, problem):
    (tmp_path / "film.srt").write_bytes(data if isinstance(data, bytes) else data.encode())
    if "this" in problem or "no subtitles" in problem:
        with pytest.raises(ValueError, match=problem):
            read_subtitles(tmp_path / "film.srt")
        return
    found = read_subtitles(tmp_path / "film.srt")
    assert [(cue.start, cue.text) for cue in found.cues] == [(1, "one")]
    assert [problem in told for told in found.problems] == [True] * bool(problem)


def test_tracks_that_cannot_be_read_and_those_to_choose_from_are_told(ffmpeg, tmp_path):
    (tmp_path / "en.srt").write_text(srt(ONE))
    (tmp_path / "de.srt").write_text(srt((ONE[0], "eins")))
    parts = ((0x16, struct.pack(">HHBHBBBB", 32, 32, 16, 0, 128, 0, 0, 0)), (0x80, b""))  # PGS: what comes, its end
    pictures = b"".join(b"PG" + struct.pack(">IIBH", 90000, 0, kind, len(data)) + data for kind, data in parts)
    (tmp_path / "bluray.sup").write_bytes(pictures)
    film = [ffmpeg, "-v", "error", "-f", "lavfi", "-i", "testsrc=d=3:r=5:s=32x32"]
    two = [
        "-map",
        "0",
        "-map",
        "1",
        "-map",
        "2",
        "-c:s",
        "srt",
        "-disposition:s:0",
        "0",
        "-disposition:s:1",
        "default",
    ]
    named = ["-metadata:s:s:0", "language=eng", "-metadata:s:s:1", "language=deu", "two.mkv"]
    for command in (
        [*film, "-i", "en.srt", "-i", "de.srt", *two, *named],
        [*film, "-f", "sup", "-i", "bluray.sup", "-map", "0", "-map", "1", "-c:s", "copy", "pictures.mkv"],
    ):
        subprocess.run(command, check=True, cwd=tmp_path)
    with pytest.warns(UserWarning, match=r"text track 2 \(deu\) of 2 \(eng, deu\) is read"):
        assert find_subtitles("auto", open_video(tmp_path / "two.mkv")).cues == [Cue(1.0, 2.0, "eins")]
    with pytest.warns(UserWarning, match=r"pictures.mkv: its subtitles are pictures .*pgssub.*give a file"):
        assert find_subtitles("auto", open_video(tmp_path / "pictures.mkv")) is None
    (tmp_path / "early.srt").write_text(srt(("-01:00:01,000 --> -01:00:00,000", "early")))
    with pytest.raises(ValueError, match="lie between -1:00:01 and -1:00:00, but the video lasts 0:03: they are"):
        find_subtitles(tmp_path / "early.srt", open_video(tmp_path / "two.mkv"))
