"""A run that goes on after an interruption ends where an uninterrupted one does; nothing incomplete is loaded."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_clips
import torch
from tensor_chats import losses, make_trainer, weights

from video_ma2mba.trainer.checkpoint_files import MANIFEST, last_complete_checkpoint, what_is_missing

SAVES = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Losses and weights of six uninterrupted steps, and their folder."""
    out = tmp_path_factory.mktemp("whole") / "run"
    trainer = make_trainer(out, **SAVES)
    trainer.train()
    return losses(trainer), weights(trainer.model), out


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """Folders "step", "save", "delete" and "clips": what runs that were killed there have left behind."""
    folder = tmp_path_factory.mktemp("killed")
    script = Path(__file__).with_name("killed_runs.py")
    command = [sys.executable, str(script), str(folder), "step", "save", "delete", "clips"]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


def assert_ends_like(whole_run, trainer, after: int) -> None:
    expected_losses, expected, *_ = whole_run
    assert losses(trainer)[-(6 - after) :] == pytest.approx(expected_losses[after:], rel=1e-6)
    assert len(losses(trainer)) == 6, "the history of the first part is kept"
    for name, value in weights(trainer.model).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-7)


def test_resumed_equals_uninterrupted(whole_run, tmp_path):
    shutil.copytree(whole_run[2], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    trainer = make_trainer(tmp_path / "run", **SAVES)
    trainer.train(resume_from_checkpoint=True)
    assert_ends_like(whole_run, trainer, 4)
    runs = (tmp_path / "run", whole_run[2])
    totals, whole = (json.loads((run / "checkpoint-6" / "video_totals.json").read_text()) for run in runs)
    assert totals.pop("seconds") > 0 and whole.pop("seconds") > 0  # by the clock: of both parts together
    assert totals == whole


@pytest.mark.parametrize(("where", "begins_at"), [("step", 4), ("save", 2), ("delete", 4)])
def test_killed_runs_go_on(whole_run, killed, where, begins_at, caplog):
    out = killed / where
    with caplog.at_level(logging.WARNING):
        assert last_complete_checkpoint(out) == str(out / f"checkpoint-{begins_at}")
    if where == "save":
        assert "checkpoint-4 is passed over: it has no checkpoint_files.json" in caplog.text
    if where == "delete":
        assert what_is_missing(out / "checkpoint-2") == "its file optimizer.pt is missing"
    trainer = make_trainer(out, **SAVES)
    trainer.train(resume_from_checkpoint=True)
    assert_ends_like(whole_run, trainer, begins_at)
    assert what_is_missing(out / "checkpoint-6") is None
    if where == "save":
        assert what_is_missing(out / "checkpoint-4") is None, "the half checkpoint was written anew"


def test_a_killed_videomamba_goes_on(killed, tmp_path):
    """Beside a teacher, with mixup and clips drawn twice: everything random is drawn again as it would have been."""
    alone = tiny_clips.distillation_of(tiny_clips.settings(tmp_path, **tiny_clips.AUGMENTED))
    alone.train()
    trainer = tiny_clips.distillation_of(tiny_clips.settings(killed / "clips", **tiny_clips.AUGMENTED, **SAVES))
    trainer.train(resume_from_checkpoint=True)
    assert_ends_like((losses(alone), weights(alone.model)), trainer, 4)


@pytest.mark.parametrize("damage", ["list", "file", "half a file", "list damaged"])
def test_incomplete_checkpoints_are_refused(whole_run, tmp_path, damage):
    folder = tmp_path / "checkpoint-4"
    shutil.copytree(whole_run[2] / "checkpoint-4", folder)
    if damage == "list":
        (folder / MANIFEST).unlink()
    elif damage == "list damaged":
        (folder / MANIFEST).write_text("{")
    elif damage == "file":
        (folder / "scheduler.pt").unlink()
    else:
        os.truncate(folder / "model.safetensors", 1000)
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint-4 cannot be resumed from: .*; choose an earlier one"):
        trainer.train(resume_from_checkpoint=str(folder))
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="there is no checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "none"))


def test_old_checkpoints_are_deleted_once_the_new_one_is_complete(tmp_path):
    trainer = make_trainer(tmp_path, save_total_limit=1, **SAVES)
    trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
    assert trainer.args.save_total_limit == 1


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_a_rank_that_is_killed_ends_all_with_a_message_and_the_run_goes_on(whole_run, tmp_path):
    """Under torchrun's own agent, in the middle of a backward pass that two processes share."""
    command = [sys.executable, str(Path(__file__).with_name("killed_rank.py")), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    words = done.stdout + done.stderr
    assert done.returncode == 0, words[-4000:]
    assert "rank      : 1" in words and "Signal 9 (SIGKILL)" in words, "which rank"
    assert re.search(r"rank 0 of 2 ends in step 5, because another process has ended", words), "which step"
    assert float(re.search(r"^seconds ([\d.]+)$", words, re.MULTILINE)[1]) < 40, "torchrun waits 30 s at most"
    found = torch.load(tmp_path / "end.pt")
    expected_losses, expected, *_ = whole_run
    assert found["losses"] == pytest.approx(expected_losses, rel=1e-5), (
        "four steps of the first run, two of the second"
    )
    for name, value in found["weights"].items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=2e-5)
