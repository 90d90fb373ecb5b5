"""`video-ma2mba init`."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from video_ma2mba.cli.main import app


def run(*arguments: str):
    return CliRunner().invoke(app, ["init", *arguments])


@pytest.mark.parametrize(("preset", "width", "layers"), [("370m", 1024, 48), ("1.3b", 2048, 48), ("2.7b", 2560, 64)])
def test_presets_have_the_papers_sizes(tmp_path: Path, preset: str, width: int, layers: int):
    out = tmp_path / "model"
    result = run("--preset", preset, "--config-only", "--out", str(out))
    assert result.exit_code == 0, result.output
    config = json.loads((out / "config.json").read_text())
    assert (config["text_config"]["hidden_size"], config["text_config"]["num_hidden_layers"]) == (width, layers)
    assert config["vision_config"]["image_size"] == 336
    assert not list(out.glob("*.safetensors"))


def test_an_unknown_preset_names_the_known_ones(tmp_path: Path):
    result = run("--preset", "9b", "--out", str(tmp_path / "model"))
    assert result.exit_code == 2
    assert "370m" in result.stderr


def test_a_folder_with_files_is_never_written_into(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    result = run("--preset", "370m", "--config-only", "--out", str(tmp_path))
    assert result.exit_code == 2
    assert "not an empty directory" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_nothing_to_compose_is_an_error(tmp_path: Path):
    result = run("--out", str(tmp_path / "model"))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")


def test_a_missing_checkpoint_is_named(tmp_path: Path):
    missing = str(tmp_path / "none")
    result = run("--language-model", missing, "--vision-tower", missing, "--out", str(tmp_path / "model"))
    assert result.exit_code == 2
    assert missing in result.stderr.replace("\n", "")


def test_a_released_file_is_sent_to_convert(tmp_path: Path):
    (tmp_path / "videomamba.pth").write_bytes(b"PK")
    result = run(
        "--preset", "370m", "--vision-tower", str(tmp_path / "videomamba.pth"), "--out", str(tmp_path / "out")
    )
    assert result.exit_code == 2 and "is a file: video-ma2mba convert" in result.stderr
