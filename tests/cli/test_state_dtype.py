"""`--state-dtype`: smaller state files from the command line."""

import pytest
import torch
from typer.testing import CliRunner

from video_ma2mba import VideoState
from video_ma2mba.cli.main import app


@pytest.fixture
def run(tiny_checkpoint):
    def invoke(*words):
        given = [*words, "--model", tiny_checkpoint, "--device", "cpu"]
        return CliRunner().invoke(app, [str(word) for word in given])

    return invoke


def test_read_and_append_round_the_file_only(run, tiny_video, tmp_path):
    whole, half, longer = (tmp_path / f"{name}.state" for name in ("whole", "half", "longer"))
    assert run("read", tiny_video, "--out", whole).exit_code == 0
    assert run("read", tiny_video, "--out", half, "--state-dtype", "bfloat16").exit_code == 0
    exact, rounded = VideoState.load(whole), VideoState.load(half)
    assert torch.equal(rounded.ssm, exact.ssm.bfloat16().float())
    assert rounded.metadata["rounded_to"] == "bfloat16"
    assert run("state", "append", whole, tiny_video, "--out", longer, "--state-dtype", "fp16").exit_code == 0
    assert VideoState.load(longer).metadata["rounded_to"] == "float16"
    shown = CliRunner().invoke(app, ["state", "show", str(half)])
    assert "rounded_to: bfloat16" in shown.stdout


def test_an_unknown_type_is_named_before_anything_is_read(run, tiny_video, tmp_path):
    result = run("read", tiny_video, "--out", tmp_path / "film.state", "--state-dtype", "int4")
    assert result.exit_code != 0
    assert "--state-dtype int4 is unknown" in result.stderr
    assert not list(tmp_path.iterdir())
