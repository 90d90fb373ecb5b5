"""The folder of a Space, started as the Hub starts it: without this package."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import SpaceCard
from typer.testing import CliRunner

from video_ma2mba.cli.main import app
from video_ma2mba.hub_cards.hub_folder import write_space_folder

ROOT = Path(__file__).resolve().parents[2]
START = """
import runpy, sys
sys.modules["video_ma2mba"] = None  # as if this package were not installed
sys.path.insert(0, ".")
runpy.run_path("app.py", run_name="__main__")
"""


def test_push_a_space(checkpoint: Path, hub, untried):
    result = CliRunner().invoke(app, ["push", str(checkpoint), "me/demo", "--space"])
    assert result.exit_code == 0, result.output
    repo = hub.repos["spaces/me/demo"]
    assert len(repo.messages) == 1
    assert repo.tags == {}
    files = repo.commits[repo.head]
    assert {"app.py", "requirements.txt", "README.md", "web/layout.py", "checkpoint/config.json"} <= files.keys()
    assert not any("__pycache__" in name for name in files)
    assert files["examples/000000.mp4"] == (ROOT / "examples" / "videos" / "000000.mp4").read_bytes()
    # the checkpoint inside is loaded by its path, where there is no revision to name
    assert b'model="checkpoint", trust_remote_code=True' in files["checkpoint/README.md"]


def test_the_header_is_one_that_the_hub_takes():
    card = SpaceCard.load(ROOT / "hub_cards" / "space" / "README.md")
    assert card.data.sdk == "gradio"
    assert (ROOT / "hub_cards" / "space" / card.data.app_file).is_file()
    assert len(card.data.short_description) <= 60
    pinned = re.search(r"^gradio==(\S+)", (ROOT / "requirements.lock").read_text(), re.M)[1]
    assert card.data.sdk_version == pinned  # the version that the tests run with


def test_adapters_need_their_model(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="merge it into its model"):
        write_space_folder(tmp_path, tmp_path / "out")


@pytest.mark.bundled
def test_it_runs_without_the_package(tmp_path: Path):
    gradio_client = pytest.importorskip("gradio_client")
    folder = tmp_path / "space"
    write_space_folder(ROOT / "bundled", folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONUNBUFFERED")} | {
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(tmp_path / "uploads"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    log = tmp_path / "log"
    with log.open("w") as written:
        process = subprocess.Popen(
            [sys.executable, "-c", START], cwd=folder, env=environment, stdout=written, stderr=written
        )
    try:
        until = time.monotonic() + 250
        while "Running on" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        client = gradio_client.Client(f"http://127.0.0.1:{port}", verbose=False)
        video = gradio_client.handle_file(str(folder / "examples" / "000000.mp4"))
        client.submit(video, 1, api_name="/read").result(timeout=250)
        job = client.submit("Which sign did the card show?", api_name="/ask")
        job.result(timeout=250)
        chats = [messages for messages, *_ in job.outputs() if isinstance(messages, list)]
        assert [message["content"][0]["text"] for message in chats[-1]] == ["Which sign did the card show?", "2"]
        assert "understands nothing else" in str(client.config)  # the words on the checkpoint's card
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder)
