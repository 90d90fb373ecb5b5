"""`video-ma2mba demo`: the questions of a folder, with a tiny random model and with the model that ships."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from video_ma2mba.cli.main import app

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "videos"


@pytest.fixture(scope="module")
def folder(tiny_video: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `world render` writes it, with one video and two questions."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copy(tiny_video, folder / "a.mp4")
    lines = [{"video": "a.mp4", "question": question, "answer": "two"} for question in ("How many?", "Which way?")]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_every_question_is_answered_and_judged(tiny_checkpoint: Path, folder: Path):
    result = CliRunner().invoke(app, ["demo", str(folder), "--model", str(tiny_checkpoint), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert re.search(r"a\.mp4: 6 frames seen in \d+\.\d+ s, state \d+\.\d kB", result.stdout)
    assert "How many?" in result.stdout
    assert "Which way?" in result.stdout
    assert result.stdout.count("(expected two, ") == 2
    assert "0 of 2 answers right." in result.stdout


def test_the_web_page_is_served_on_this_machine_alone(tiny_checkpoint: Path, folder: Path, monkeypatch):
    layout = pytest.importorskip("video_ma2mba.hub_cards.space.web.layout")
    served = {}

    def serve(page, examples, **settings):
        served.update(settings, title=page.title, videos=[Path(example.video).name for example in examples])

    monkeypatch.setattr(layout, "serve", serve)
    words = ["demo", str(folder), "--model", str(tiny_checkpoint), "--device", "cpu", "--web", "--port", "7999"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert served == {"title": "Ask a video", "videos": ["a.mp4"], "server_name": "127.0.0.1", "server_port": 7999}
    assert "answers right" not in result.stdout


def test_the_web_page_without_gradio_names_the_remedy(tiny_checkpoint: Path, folder: Path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("video_ma2mba.hub_cards.space")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(app, ["demo", str(folder), "--model", str(tiny_checkpoint), "--web"])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "error: the page needs gradio: pip install 'video-ma2mba[demo]'"
    assert CliRunner().invoke(app, ["demo", str(folder), "--port", "7999"]).exit_code == 2


def test_a_folder_without_questions_is_an_error(tmp_path: Path):
    result = CliRunner().invoke(app, ["demo", str(tmp_path)])
    assert result.exit_code == 2
    assert "questions.jsonl" in result.stderr


@pytest.mark.bundled
def test_the_bundled_checkpoint_knows_the_example_videos():
    """What `make demo` shows: nearly every answer is right."""
    result = CliRunner().invoke(app, ["demo", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    right, asked = map(int, re.search(r"(\d+) of (\d+) answers right", result.stdout).groups())
    assert asked == len((EXAMPLES / "questions.jsonl").read_text().splitlines())
    assert right >= 0.85 * asked
