"""Files are written whole, where they were meant to be, with the permissions that files have."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from video_ma2mba.modeling_video_ma2mba.state_layers import Mamba2State
from video_ma2mba.modeling_video_ma2mba.state_video import VideoState
from video_ma2mba.modeling_video_ma2mba.state_writing import (
    give_usual_permissions,
    is_written_through,
    whole_file,
    write_whole,
)


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def state() -> VideoState:
    return VideoState([Mamba2State(torch.zeros(1, 2, 3), torch.ones(1, 2, 2, 2))], 5, {"video": "a"})


@pytest.mark.usefixtures("umask")
def test_new_files_follow_the_umask_and_replaced_ones_keep_theirs(tmp_path: Path):
    file = tmp_path / "a.state"
    state().save(file)
    assert mode(file) == 0o640
    file.chmod(0o604)
    state().save(file)
    assert mode(file) == 0o604
    write_whole(tmp_path / "b", "text")
    assert mode(tmp_path / "b") == 0o640
    (tmp_path / "model.safetensors").touch(0o600)
    (tmp_path / "secret.txt").touch(0o600)
    give_usual_permissions(tmp_path)
    assert [mode(tmp_path / name) for name in ("model.safetensors", "secret.txt")] == [0o640, 0o600]
    assert {path.name for path in tmp_path.iterdir()} == {"a.state", "b", "model.safetensors", "secret.txt"}


def test_links_stay_and_their_targets_are_written(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    target, link, chain = tmp_path / "disk" / "real", tmp_path / "link", tmp_path / "chain"
    link.symlink_to("disk/real")  # there is nothing yet
    chain.symlink_to(link)
    for path, text in ((link, "one"), (chain, "two")):
        write_whole(path, text)
        assert (link.is_symlink(), chain.is_symlink(), target.read_text()) == (True, True, text)
    state().save(link)
    assert link.is_symlink()
    assert VideoState.load(target).seen_tokens == 5


def test_devices_and_pipes_receive_the_bytes(tmp_path: Path):
    state().save(os.devnull)
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    state().save(pipe)
    reader.join()
    (tmp_path / "copy").write_bytes(got[0])
    assert VideoState.load(tmp_path / "copy").seen_tokens == 5
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert [is_written_through(path) for path in (pipe, "/dev/stdout", "/dev/null", tmp_path / "new", tmp_path)] == [
        *(True, True, True),
        *(False, False),
    ]


@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_in_a_file_is_continued(path: str, tmp_path: Path):
    script = (
        "import sys; from video_ma2mba.modeling_video_ma2mba.state_writing import write_whole\n"
        f"print('before', flush=True); write_whole({path!r}, 'content\\n'); print('after')"
    )
    with (tmp_path / "out").open("wb") as out:
        subprocess.run([sys.executable, "-c", script], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "before\ncontent\nafter\n"


def test_what_fails_leaves_the_old_file_and_no_draft(tmp_path: Path):
    file = tmp_path / ("ü" * 120)  # as long as names may be
    file.write_text("old")
    with pytest.raises(ZeroDivisionError), whole_file(file) as draft:  # noqa: PT012
        Path(draft).write_text("half", encoding="utf-8")
        1 / 0  # noqa: B018
    assert file.read_text() == "old"
    write_whole(file, "new")
    assert file.read_text() == "new"
    with pytest.raises(FileNotFoundError) as caught:
        write_whole(tmp_path / "nowhere" / "a", "x")
    assert caught.value.filename == str(tmp_path / "nowhere" / "a")
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path, "x")
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_writers_at_once_leave_one_whole_file(tmp_path: Path):
    texts = [letter * 200_000 for letter in "abcdef"]
    threads = [threading.Thread(target=write_whole, args=(tmp_path / "f", text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "f").read_text() in texts
    assert len(list(tmp_path.iterdir())) == 1
