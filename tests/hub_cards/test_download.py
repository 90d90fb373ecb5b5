"""Converting by a Hub id, from a Hub on this machine: the command that users of the released checkpoints run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer, Repo

CONVERSION = Path(__file__).resolve().parents[1] / "conversion"
COMMAND = str(Path(sys.executable).parent / "video-ma2mba")
RELEASED = "lakelee/video-ma2mba-3.1b-clip"


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a small checkpoint in the released layout."""
    sys.path.insert(0, str(CONVERSION))
    from conversion_models import clip_tower, language_model, official_tensors, projector, write_checkpoint

    folder = tmp_path_factory.mktemp("released")
    write_checkpoint(folder, official_tensors(language_model(), clip_tower(), projector()), shards=3)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(hub: HubServer, home: Path, *words: str, offline: bool = False) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",
    }
    return subprocess.run([COMMAND, *words], capture_output=True, text=True, env=environment)


def test_convert_by_hub_id_then_ask(hub, released, tiny_video: Path, tmp_path: Path):
    hub.repos[f"models/{RELEASED}"] = Repo(
        private=False, commits={"a" * 40: released | {"evil.py": b"raise SystemExit(9)"}}
    )
    out = tmp_path / "ours"
    done = run(hub, tmp_path / "home", "convert", RELEASED, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert RELEASED in done.stderr
    assert not list((tmp_path / "home").rglob("evil.py"))  # code is not even fetched
    counts = json.loads((out / "conversion.json").read_text())
    assert counts["official"]["config"]["model_type"] == "llava_mamba"
    answer = run(hub, tmp_path / "home", "ask", str(tiny_video), "What is shown?", "--model", str(out), "--json")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["frames"] == 6


def test_ask_by_hub_id_fetches_and_converts_once(hub, released, tiny_video: Path, tmp_path: Path):
    hub.repos[f"models/{RELEASED}"] = Repo(private=False, commits={"a" * 40: released})
    ask = ["ask", str(tiny_video), "What is shown?", "--model", RELEASED, "--json"]
    first = run(hub, tmp_path / "home", *ask)
    assert first.returncode == 0, first.stderr
    fetched, converted = (line for line in first.stderr.splitlines() if line.startswith(RELEASED))
    weights = sum(len(content) for name, content in released.items() if name.endswith(".safetensors"))
    assert f"{weights / 1e6:.1f} MB, once, into" in converted
    assert "MB to fetch" in fetched
    again = run(hub, tmp_path / "home", *ask, offline=True)
    assert again.returncode == 0, again.stderr
    assert RELEASED not in again.stderr
    assert json.loads(again.stdout)["answer"] == json.loads(first.stdout)["answer"]
    hub.repos[f"models/{RELEASED}"].commits["b" * 40] = released  # a new revision
    assert "once, into" in run(hub, tmp_path / "home", *ask).stderr


def test_names_from_the_hub_stay_in_their_folder(hub, released, tmp_path: Path):
    evil = {"../" * levels + "evil.json": b"{}" for levels in (1, 4, 8)}
    hub.repos[f"models/{RELEASED}"] = Repo(private=False, commits={"a" * 40: released | evil})
    home = tmp_path / "one" / "two" / "three" / "home"
    run(hub, home, "convert", RELEASED, "--out", str(tmp_path / "ours"))
    snapshots = list(home.rglob("snapshots"))
    assert snapshots  # it did fetch
    found = list(tmp_path.rglob("evil*"))
    assert [path for path in found if not any(path.is_relative_to(folder) for folder in snapshots)] == []
