"""Texts as other systems write them; nothing endless, nothing read as what it is not."""

import json
import os
import threading
from pathlib import Path

import pytest

from video_ma2mba.files.text_files import check_text, json_line, open_text, parse_json, read_json, text_lines

TEXT = "Größe? 有\u2028几🎬\n二\n"


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le with mark", "utf-16-be with mark", "utf-16-le"]
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_unicode_encoding_is_told_by_its_beginning(encoding: str, end: str, tmp_path: Path):
    text = ("\ufeff" if "mark" in encoding else "") + ("a," if encoding == "utf-16-le" else "") + TEXT
    (tmp_path / "t").write_bytes(text.replace("\n", end).encode(encoding.split()[0]))
    lines = list(text_lines(tmp_path / "t"))
    assert [line.removeprefix("a,") for line in lines] == ["Größe? 有\u2028几🎬\n", "二\n"]


def test_other_encodings_are_noticed(tmp_path: Path):
    (tmp_path / "t").write_bytes("Größe\nplain\n".encode("cp1252"))
    first, second = text_lines(tmp_path / "t")
    check_text(second)
    with pytest.raises(ValueError, match="0xf6 is not UTF-8.*iconv -f WINDOWS-1252"):
        check_text(first)


def test_endless_sources_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with pytest.raises(ValueError, match="/dev/zero: this is a device"):
        next(text_lines("/dev/zero"))
    assert list(text_lines(os.devnull)) == []
    monkeypatch.setattr("video_ma2mba.files.text_files.LONGEST_LINE", 10)
    (tmp_path / "t").write_text("short\n" + "x" * 50)
    with pytest.raises(ValueError, match="line 2, does not end"):
        list(text_lines(tmp_path / "t"))


def test_pipes_are_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(TEXT.encode("utf-16"),))
    writer.start()
    with open_text(tmp_path / "pipe") as file:
        assert file.read() == TEXT
    writer.join()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "{", ""])
def test_json_that_is_none_is_a_value_error(text: str, tmp_path: Path):
    with pytest.raises(ValueError):
        parse_json(text)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="a.json: this is not JSON"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_strict_json_holds_only_what_can_be_written_again(number: str):
    assert parse_json(f"[{number}]") != [0]
    with pytest.raises(ValueError, match="is no number"):
        parse_json(f"[{number}]", strict=True)


def test_json_lines_take_half_characters():
    for text in ("plain", "Größe 🎬", "cut \ud83d", "caf\udce9", "two\nlines\u2028"):
        line = json_line({"a": text})
        assert line.endswith(b"\n")
        assert line.count(b"\n") == 1
        assert json.loads(line) == {"a": text}
