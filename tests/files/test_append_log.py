"""The log: whole lines, whatever crashes, fills up or writes at the same time."""

import errno
import json
import multiprocessing
import os
from pathlib import Path

import pytest

from video_ma2mba.files.append_log import AppendLog, read_log, write_durably, write_lines


def records(path: Path) -> list:
    return [record for _, record in read_log(path)]


@pytest.mark.parametrize("write", [write_lines, write_durably])
def test_what_was_added_is_read_in_order(write, tmp_path: Path):
    path = tmp_path / "log.jsonl"
    log = AppendLog(path, write=write)
    assert not path.exists()
    log.add({"a": 1}, [2], "cut \ud83d")
    AppendLog(path).add({"ü\u2028": None})
    assert records(path) == [{"a": 1}, [2], "cut \ud83d", {"ü\u2028": None}]


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("torn", ['{"b": 2', "x" * 200_000, "\n\0"])
def test_a_torn_line_is_cut_off_and_nothing_else(alone: bool, torn: str, tmp_path: Path):
    path = tmp_path / "log.jsonl"
    AppendLog(path).add({"a": 1})
    whole = path.read_text()
    path.write_text(whole + torn.removeprefix("\n"))
    assert records(path) == [{"a": 1}]
    with AppendLog(path, alone=alone) as log:
        assert path.read_text() == whole + torn.removeprefix("\n"), "opening changes nothing: it may be another's file"
        log.add({"c": 3})
        assert not log.cut_torn_line()
    assert path.read_text() == whole + '{"c": 3}\n'


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    AppendLog(path).add(1)

    def full(file, data: bytes) -> None:
        os.write(file.fileno(), data[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        AppendLog(path, write=full).add("long enough")
    assert path.read_text() == "1\n"


def test_damaged_lines_are_named_or_passed_over(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"1\n\xff\n" + b"[" * 100_000 + b"\n2\n")
    with pytest.raises(ValueError, match="log.jsonl, line 2: no JSON"):
        records(path)
    assert [record for _, record in read_log(path, skip_damaged=True)] == [1, 2]


def _add(path: Path, name: int) -> None:
    for number in range(50):
        AppendLog(path).add({"name": name, "number": number, "long": "x" * 5000})


def test_processes_add_at_once(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    workers = [multiprocessing.get_context("fork").Process(target=_add, args=(path, name)) for name in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found = [(record["name"], record["number"]) for record in records(path)]
    assert sorted(found) == [(name, number) for name in range(3) for number in range(50)]


def test_one_alone(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    with AppendLog(path, alone=True) as log:
        with pytest.raises(ValueError, match="written by another run"):
            AppendLog(path, alone=True)
        log.add(1, 2)
        log.replace([b"2\n"])
        log.add(3)
        with pytest.raises(ValueError, match="written by another run"):
            AppendLog(path, alone=True)
        log.flush()
    with AppendLog(path, alone=True) as log:
        log.add(4)
    assert records(path) == [2, 3, 4]


def test_devices_and_links(tmp_path: Path):
    with AppendLog(os.devnull, alone=True) as log:
        log.add({"a": 1})
        log.flush()
        assert not log.cut_torn_line()
    (tmp_path / "link").symlink_to("real")
    with AppendLog(tmp_path / "link", alone=True) as log:
        log.add(1)
        log.replace([b"2\n"])
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "real").read_text()) == 2
