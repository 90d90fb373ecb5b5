"""Files on disk: what is written can be read back, and nothing half-written stays behind."""

import json
import subprocess
import sys

import av
import numpy as np
import pytest
from typer.testing import CliRunner

from video_ma2mba.cli.world import app
from video_ma2mba.world import KINDS, WorldDataset, build_world, render
from video_ma2mba.world.video_files import render_to_folder, write_video, write_world
from video_ma2mba.world.world import CARD_SYMBOLS, COLOURS, Card


def read(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_a_file_gives_back_every_frame(tmp_path):
    world = build_world(7, 30)
    assert write_world(tmp_path / "a.mp4", world) == 30
    frames, original = read(tmp_path / "a.mp4"), render(world)
    assert frames.shape == original.shape
    assert np.abs(frames.astype(int) - original).mean() < 3
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert float(container.duration / av.time_base) == pytest.approx(30)
        assert container.streams.video[0].average_rate == 1


def test_the_card_can_be_read_from_the_file_at_64_pixels(tmp_path):
    """Matching against every card picks the right one, with a clear margin to the second best."""
    from dataclasses import replace

    world = build_world(2, 6)
    for symbol in CARD_SYMBOLS:
        shown = replace(world, card=Card(symbol, 3, (240, 240, 240), (10, 10, 10)))
        write_world(tmp_path / "card.mp4", shown)
        seen = read(tmp_path / "card.mp4")[3].astype(float)
        errors = {}
        for other in CARD_SYMBOLS:
            picture = render(replace(shown, card=replace(shown.card, symbol=other)))[3].astype(float)
            errors[other] = ((picture - seen) ** 2).mean()
        best, second = sorted(errors, key=errors.get)[:2]
        assert best == symbol
        assert errors[second] > 4 * errors[best]


def test_colours_survive_the_file(tmp_path):
    data = WorldDataset("validation", 6, frames=(16, 16))
    for index in range(6):
        world = data.world(index)
        write_world(tmp_path / "c.mp4", world)
        frames = read(tmp_path / "c.mp4").astype(int)
        for thing in world.things:
            second = next(s for s in range(thing.start, thing.end) if world.card is None or s != world.card.start)
            x, y = thing.position(second)
            offset = 0.75 * thing.radius if thing.shape == "ring" else 0.0  # a ring is hollow in the middle
            row, column = round(y * 64), round((x + offset) * 64)
            patch = frames[second, row - 1 : row + 2, column - 1 : column + 2].reshape(-1, 3).mean(0)
            nearest = min(COLOURS, key=lambda name: np.abs(np.array(COLOURS[name]) * 0.93 - patch).sum())
            assert nearest == thing.colour


def test_smooth_video_and_larger_pictures(tmp_path):
    world = build_world(9, 5)
    assert write_world(tmp_path / "b.mp4", world, fps=10, size=336) == 50
    frames = read(tmp_path / "b.mp4")
    assert frames.shape == (50, 336, 336, 3)
    assert np.abs(frames[::10].astype(int) - render(world, size=336)).mean() < 3


def test_a_folder_holds_videos_and_questions(tmp_path):
    target = render_to_folder(tmp_path / "w", 4, frames=(8, 12), seed=3, split="validation", progress=False)
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert {tuple(row) for row in rows} == {("video", "kind", "question", "options", "answer", "frames")}
    assert {row["video"] for row in rows} == {f"{number:06d}.mp4" for number in range(4)}
    data = WorldDataset("validation", 4, frames=(8, 12), questions=len(KINDS), seed=3)
    asked = [q for index in range(4) for q in data.asked(index)[1]]
    assert [(row["question"], row["answer"]) for row in rows] == [(q.text, q.answer) for q in asked]
    for row in rows:
        assert 8 <= row["frames"] == len(read(tmp_path / "w" / row["video"])) <= 12
        assert not row["options"] or row["answer"] in "ABCD"


def test_an_interrupted_folder_is_completed(tmp_path):
    render_to_folder(tmp_path, 2, frames=(8, 8), progress=False)
    kept = (tmp_path / "000000.mp4").stat().st_mtime_ns
    (tmp_path / "000001.mp4").unlink()
    (tmp_path / "questions.jsonl").unlink()
    render_to_folder(tmp_path, 3, frames=(8, 8), progress=False)
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == ["000000.mp4", "000001.mp4", "000002.mp4"]
    assert (tmp_path / "000000.mp4").stat().st_mtime_ns == kept


def test_foreign_folders_and_other_settings_are_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        render_to_folder(tmp_path, 1, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    render_to_folder(tmp_path / "w", 1, frames=(8, 8), progress=False)
    with pytest.raises(ValueError, match="other settings"):
        render_to_folder(tmp_path / "w", 1, frames=(8, 8), seed=1, progress=False)
    with pytest.raises(ValueError, match="even"):
        render_to_folder(tmp_path / "odd", 1, size=65, progress=False)


@pytest.mark.parametrize("frames", [[], [np.zeros((2, 33, 64, 3), np.uint8)]])
def test_impossible_videos_leave_nothing_behind(tmp_path, frames):
    with pytest.raises(ValueError):
        write_video(tmp_path / "a.mp4", frames)
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import resource, signal, sys
import numpy as np
from video_ma2mba.world.video_files import write_video
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
noise = np.random.RandomState(0).randint(0, 255, (40, 64, 64, 3)).astype(np.uint8)
try:
    write_video(sys.argv[1], [noise])
except OSError as error:
    print("OSError:", error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits on file size are a POSIX feature")
def test_a_full_disk_leaves_no_half_file(tmp_path):
    """A limit on the size of files stands for the end of the disk: writes fail in the same place."""
    path = tmp_path / "a.mp4"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("OSError:")
    assert str(path) in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path):
    run = CliRunner()
    out = tmp_path / "w"
    done = run.invoke(
        app, ["render", "--out", str(out), "--count", "2", "--kinds", "needle, count", "--frames", "8..9"]
    )
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in (out / "questions.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in rows} == {"needle", "count"}
    for wrong in (["--kinds", "smell"], ["--frames", "9..8"], ["--frames", "many"], ["--fps", "0"]):
        failed = run.invoke(app, ["render", "--out", str(tmp_path / "x"), "--count", "1", *wrong])
        assert isinstance(failed.exception, ValueError)
        assert not (tmp_path / "x").exists()


def test_other_words_stand_in_questions_options_and_answers(tmp_path):
    plain = render_to_folder(tmp_path / "plain", 6, ("colour",), (8, 8), progress=False)
    words = {"red": "blue", "blue": "red", "What colour is": "Which paint has"}
    other = render_to_folder(tmp_path / "other", 6, ("colour",), (8, 8), progress=False, rename=words)
    swap = {"red": "blue", "blue": "red"}
    changed = 0
    for before, after in zip(
        *(map(json.loads, file.read_text().splitlines()) for file in (plain, other)), strict=True
    ):
        assert after["answer"] == swap.get(before["answer"], before["answer"])
        assert after["options"] == [swap.get(option, option) for option in before["options"]]
        assert "What colour is" not in after["question"]
        changed += before != after
    assert changed
    with pytest.raises(ValueError, match="another folder"):
        render_to_folder(tmp_path / "plain", 6, ("colour",), (8, 8), progress=False, rename=words)
