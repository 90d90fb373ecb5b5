"""`video-ma2mba convert`."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from video_ma2mba.cli.main import app


def run(*arguments: str | Path):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


@pytest.fixture
def official(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    folder = tmp_path / "official"
    assert run(tiny_checkpoint, "--to", "official", "--out", folder).exit_code == 0
    return folder


def test_there_and_back(tmp_path: Path, official: Path):
    result = run(official, "--out", tmp_path / "ours", "--max-shard-size", "20KB")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'ours'}\n"
    assert "1 tied" in result.stderr
    assert (tmp_path / "ours" / "model.safetensors.index.json").is_file()
    record = json.loads((tmp_path / "ours" / "conversion.json").read_text())
    assert record["counts"]["tied"] == 1
    assert str(tmp_path) not in json.dumps(record)
    assert run(tmp_path / "ours", "--to", "official", "--out", tmp_path / "back").exit_code == 0
    one, other = (load_file(folder / "model.safetensors") for folder in (official, tmp_path / "back"))
    assert one.keys() == other.keys()
    assert all(one[key].equal(other[key]) for key in one)


def test_dry_run_lists_every_tensor_and_writes_nothing(tmp_path: Path, official: Path):
    result = run(official, "--out", tmp_path / "ours", "--dry-run")
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == len(load_file(official / "model.safetensors"))
    assert "tied: lm_head.weight -> model.language_model.embeddings.weight F32 [272, 16]" in result.stdout
    assert not (tmp_path / "ours").exists()


def test_a_refusal_lists_everything_and_ends_in_one_line(tmp_path: Path, official: Path):
    tensors = load_file(official / "model.safetensors")
    gone = [key for key in tensors if ".self_attn." in key]
    save_file({key: value for key, value in tensors.items() if key not in gone}, official / "model.safetensors")
    result = run(official, "--out", tmp_path / "ours")
    assert result.exit_code == 2
    *listed, last = result.stderr.splitlines()
    assert sorted(listed) == sorted(f"missing: {key}" for key in gone)
    assert last.startswith(f"error: {official} cannot be converted: {len(gone)} missing: ")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--out", "x"], "there is no directory nowhere"),
        (["{official}", "--out", "{official}"], "not an empty directory"),
        (["{official}", "--out", "x", "--to", "onnx"], "is no layout"),
        (["{official}", "--out", "x", "--to", "official"], "is no checkpoint of this package"),
        (["{official}", "--out", "x", "--max-shard-size", "big"], "is no size"),
    ],
)
def test_wrong_input_is_one_line(tmp_path: Path, official: Path, monkeypatch, arguments: list[str], message: str):
    monkeypatch.chdir(tmp_path)
    result = run(*(argument.format(official=official) for argument in arguments))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert not (tmp_path / "x").exists()
