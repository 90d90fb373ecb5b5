"""Names of sources hold no password or token, however an address is written; `file:` and `~` lead to files."""

import os
import pickle
import shutil
import traceback
from pathlib import Path

import pytest

from video_ma2mba import open_video
from video_ma2mba.processing.video_source_names import address_to_open, local_path, shown_name, without_secrets

PASSWORDS = ["pass", "p@ss#1", "se#cret", "se/cret", "a?b=hidden", "12/34", "#@", "a:b", "p w'd", "x://y", "ü%2F@"]
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "videos" / "000000.mp4"


@pytest.mark.parametrize("scheme", ["rtsp", "http", "SRT", "cache:https"])
@pytest.mark.parametrize("password", PASSWORDS)
def test_a_login_is_left_out_whatever_the_password_holds(scheme: str, password: str):
    address = f"{scheme}://admin:{password}@cam:554/stream"
    assert shown_name(address) == f"{scheme}://cam:554/stream"
    if " " not in password:
        text = f"[Errno 5] cannot open '{address}': or {address}, sorry"
        assert without_secrets(text).count("cam:554/stream") >= 1
        assert password not in without_secrets(text).replace("cannot open", "")


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("http://cam/v.mjpg?user=me&pwd=sesame", "http://cam/v.mjpg"),
        ("http://cam/v?sesame", "http://cam/v"),
        ("http://cam/v#sesame", "http://cam/v"),
        ("https://h/w?v=abc&X-Amz-Signature=sesame&t=3", "https://h/w?v=abc&t=3"),
        ("https://h/a.mp4?sig=sesame;se=2026", "https://h/a.mp4"),
        ("https://h/w?v=http://u:sesame@h", "https://h/w"),
        ("rtsp://cam:554/user=admin&password=sesame&channel=1", "rtsp://cam:554/user=***&password=***&channel=1"),
        ("http://h/hls/token/sesame/x.m3u8", "http://h/hls/token/***/x.m3u8"),
        ("http://h/hdnts=exp=1~hmac=sesame/x.m3u8", "http://h/hdnts=***/x.m3u8"),
        ("admin:sesame@cam/stream", "cam/stream"),
        ("rtsp:/admin:ses@me@cam/stream", "rtsp:/cam/stream"),
    ],
)
def test_parameters_that_let_somebody_in_are_left_out(address: str, name: str):
    assert shown_name(address) == name


@pytest.mark.parametrize(
    "plain",
    ["https://host.org/@somebody/video/12", "rtsp://[::1]:554/s", "http://cam:80/a.mp4", "films/me@home 1:2.mp4"],
)
def test_what_is_no_secret_stays(plain: str):
    assert shown_name(plain) == plain


def test_messages_of_other_libraries_are_masked():
    for text in (
        "HTTPConnectionPool(host='h', port=80): Max retries exceeded with url: /v1?k=sesame (Caused by x)",
        "401 Client Error for url: https://h/v1?api_key=sesame",
        "headers {'Authorization': 'Bearer sesame'} and access_token=sesame.",
    ):
        assert "sesame" not in without_secrets(text)
    assert without_secrets("frame 3 of a.mp4: tokens=100, 2 @ 4:5") == "frame 3 of a.mp4: tokens=100, 2 @ 4:5"


@pytest.mark.parametrize(
    ("address", "opened"),
    [
        ("rtsp://admin:p@ss#1@cam/stream", "rtsp://admin:p%40ss%231@cam/stream"),
        ("rtsp://admin:se/cret@cam:554/stream", "rtsp://admin:se%2Fcret@cam:554/stream"),
        ("http://me:a%2Fb@cam/x?q=a@b", "http://me:a%2Fb@cam/x?q=a@b"),
        ("https://host.org/@somebody/v?a=b", "https://host.org/@somebody/v?a=b"),
    ],
)
def test_passwords_reach_ffmpeg_as_they_were_meant(address: str, opened: str):
    assert address_to_open(address) == opened


def test_no_reader_error_or_traceback_tells_a_password():
    address = "http://admin:ses@me@127.0.0.1:1/film.mp4?token=opensesame"
    reader = open_video(address)
    assert reader.name == "http://127.0.0.1:1/film.mp4"
    with pytest.raises(ConnectionError) as caught:
        reader.read()
    told = "".join(traceback.format_exception(caught.value))
    assert "127.0.0.1:1/film.mp4" in told
    assert "ses@me" not in told
    assert "opensesame" not in told
    assert "opensesame" in pickle.loads(pickle.dumps(reader))._file  # a worker process can still open it
    with pytest.raises(ValueError, match="ftp:// are not supported") as caught:
        open_video("ftp://me:sesame@host/film.mp4")
    assert "sesame" not in str(caught.value)


def test_file_addresses_are_read(tmp_path: Path):
    folder = tmp_path / "my films 100%"
    folder.mkdir()
    film = folder / "a b #1 ü?.mp4"
    shutil.copy(EXAMPLE, film)
    quoted = film.as_uri()
    for address in (
        quoted,
        quoted.replace("file:///", "FILE://localhost/"),
        quoted.replace("file:///", "file:/"),
        f"file://{film}",
        f"{quoted}#t=1",
    ):
        assert local_path(address) == film, address
        assert len(open_video(address, num_frames=1).read()) == 1
    with pytest.raises(ValueError, match="another computer"):
        open_video("file://server/films/a.mp4")
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_video("file:///nowhere/a%20b.mp4")


def test_names_that_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("~nobody.mp4", "~"):
        with pytest.raises((FileNotFoundError, ValueError)):
            open_video(name)
        shutil.copy(EXAMPLE, name)
        assert local_path(name) == Path(name)
        assert len(open_video(name, num_frames=1).read()) == 1
    assert local_path("~/a.mp4") == tmp_path / "home" / "a.mp4"


@pytest.mark.parametrize("name", ["a\0b.mp4", "cut \ud83d.mp4", "x" * 5000, "caf\udce9.mp4", "\n", "a/\x1b[31m"])
def test_names_that_no_file_can_have(name: str):
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_video(name)


def test_what_is_no_file_is_refused_at_once(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in ("/dev/zero", "/dev/null", tmp_path / "pipe.mp4"):
        with pytest.raises(ValueError, match="this is no file but a"):
            open_video(path)
