"""The data set card counts what is in the folder."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard
from typer.testing import CliRunner

from video_ma2mba.cli.main import app
from video_ma2mba.hub_cards.dataset_card import dataset_card
from video_ma2mba.world.chance import world_chance
from video_ma2mba.world.video_files import render_to_folder


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("card") / "world"
    render_to_folder(folder, 4, frames=(8, 16), seed=5, split="test", progress=False)
    return folder


@pytest.fixture
def world(rendered: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(rendered, tmp_path / "world"))


def test_numbers_are_those_of_the_folder(world: Path):
    text = dataset_card(world, license="apache-2.0")
    rows = [json.loads(line) for line in (world / "questions.jsonl").read_text().splitlines()]
    chance = world_chance(2000, frames=(8, 16), seed=5)
    for kind in {row["kind"] for row in rows}:
        count = sum(row["kind"] == kind for row in rows)
        assert f"| {kind} | {count} | {100 * chance[kind]:.1f} % | " in text
    assert f"| all | {len(rows)} | {100 * chance['all']:.1f} % |" in text
    assert "4 videos of 8 to 16 frames" in text
    card = DatasetCard(text)
    assert card.data.license == "apache-2.0"
    assert card.data.size_categories == ["n<1K"]
    assert card.data.to_dict()["configs"][0]["data_files"] == [{"split": "test", "path": "questions.jsonl"}]


def test_its_command_makes_the_same_folder(world: Path, tmp_path: Path, monkeypatch):
    (line,) = [line for line in dataset_card(world, license="mit").splitlines() if line.startswith("video-ma2mba ")]
    monkeypatch.chdir(tmp_path)
    words = line.replace("--out world", "--out again").split()[1:]
    result = CliRunner().invoke(app, [*words, "--quiet"])
    assert result.exit_code == 0, result.output
    for name in ("world.json", "questions.jsonl"):
        assert (tmp_path / "again" / name).read_text() == (world / name).read_text()


def test_the_verb_writes_it_once(world: Path):
    words = ["world", "card", str(world), "--license", "mit"]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert (world / "README.md").read_text() == dataset_card(world, license="mit")
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 2
    assert "README.md exists" in again.stderr


def test_changed_folders_are_refused(world: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"lacks world\.json"):
        dataset_card(tmp_path, license="mit")
    questions = world / "questions.jsonl"
    whole = questions.read_text()
    questions.write_text("".join(whole.splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match="holds other questions"):
        dataset_card(world, license="mit")
    questions.write_text(whole[:-5])
    with pytest.raises(ValueError, match="is damaged"):
        dataset_card(world, license="mit")
    questions.write_text(whole)
    (world / "000002.mp4").unlink()
    with pytest.raises(ValueError, match=r"lacks the videos 000002\.mp4"):
        dataset_card(world, license="mit")
    (world / "world.json").write_text('{"split": "test"}')
    (world / "000002.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match="no settings of a rendered world"):
        dataset_card(world, license="mit")
