"""Pushing to a Hub on this machine by the real client: one commit, pinned by a tag, resumed where it was cut off."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from typer.testing import CliRunner

from video_ma2mba.cli.main import app
from video_ma2mba.hub_cards.hub_folder import holds_only_our_code
from video_ma2mba.hub_cards.upload import upload


def push(*words) -> str:
    """Push; returns the last commit's page, as printed."""
    result = CliRunner().invoke(app, ["push", *map(str, words)])
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def test_one_commit_whose_card_runs_as_it_stands(checkpoint: Path, hub, untried, tiny_video: Path, tmp_path: Path):
    (checkpoint / "optimizer.pt").write_bytes(b"not for others")
    (checkpoint / "foreign.py").write_text("print('hello')\n")
    page = push(checkpoint, "me/tiny", "--private")
    repo = hub.repos["models/me/tiny"]
    assert repo.private
    assert len(repo.messages) == 1
    assert page == f"{hub.endpoint}/me/tiny/commit/{repo.head}"
    content = repo.commits[repo.head]
    saved = {path.name for path in checkpoint.iterdir()} - {"optimizer.pt", "foreign.py"}
    assert content.keys() == saved
    for name in saved - {"README.md"}:
        assert content[name] == (checkpoint / name).read_bytes(), name
    config = json.loads(content["config.json"])
    assert {"AutoConfig", "AutoModelForImageTextToText"} <= config["auto_map"].keys()
    assert "video-question-answering" in config["custom_pipelines"]

    # The card's Python block loads what was pushed, whatever the branch holds later.
    card = content["README.md"].decode()
    ((tag, commit),) = repo.tags.items()
    assert commit == repo.head
    assert f'revision="{tag}"' in card
    poisoned = {name: b"raise SystemExit('this is not the pinned code')" for name in content if name.endswith(".py")}
    repo.commits["f" * 40] = content | poisoned
    block = re.search(r"```python\n(.*?)```", card, re.S)[1].replace("video.mp4", str(tiny_video))
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    script = f"import sys\nsys.modules['video_ma2mba'] = None\n{block}"
    done = subprocess.run([sys.executable, "-I", "-X", "utf8", "-c", script], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    from video_ma2mba.loading import load_pipeline

    pipe = load_pipeline(str(checkpoint), device="cpu")
    assert done.stdout.decode() == pipe.ask(pipe.read(str(tiny_video), fps=1), "What is shown?") + "\n"


KILLED = """
import sys
from pathlib import Path
from huggingface_hub import HfApi
from video_ma2mba.hub_cards.hub_folder import holds_only_our_code
from video_ma2mba.hub_cards.upload import upload
upload(Path(sys.argv[1]), "me/tiny", tag="first", api=HfApi(endpoint=sys.argv[2], token="hf_test"))
"""


@pytest.fixture
def shards(make_model, tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    make_model().save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("*.safetensors"))) > 6
    return folder


def test_a_killed_upload_goes_on_where_it_was(shards: Path, hub):
    hub.stall_at = 2
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(shards), hub.endpoint], env=environment)
    try:
        assert hub.stalled.wait(60)
    finally:
        process.kill()
        process.wait()
    sent_before = len(hub.received)
    repo = hub.repos["models/me/tiny"]
    assert repo.messages == []  # nothing half is to be seen
    assert not repo.tags

    hub.stall_at = None
    for _ in range(2):  # the third time there is nothing left to do
        commit = upload(shards, "me/tiny", tag="first", api=huggingface_hub.HfApi())
    files = {path.name: path.read_bytes() for path in shards.iterdir()}
    digests = [hashlib.sha256(raw).hexdigest() for name, raw in files.items() if name.endswith(".safetensors")]
    assert 2 <= sent_before < len(digests)
    assert sorted(hub.received) == sorted(digests)  # each once, over all tries
    assert len(repo.messages) == 1
    assert repo.commits[repo.head] == files
    assert repo.tags == {"first": repo.head}
    assert commit.oid == repo.head


def test_files_of_an_earlier_commit(shards: Path, checkpoint: Path, hub):
    api = huggingface_hub.HfApi()
    upload(shards, "me/tiny", api=api)
    repo = hub.repos["models/me/tiny"]
    repo.commits["e" * 40] = repo.commits[repo.head] | {"notes.txt": b"of the author"}
    upload(checkpoint, "me/tiny", api=api)
    assert len(repo.messages) == 2
    # weights cut differently are gone, in the same commit; what is not ours to judge stays
    assert repo.commits[repo.head].keys() == {path.name for path in checkpoint.iterdir()} | {"notes.txt"}


def test_private_never_goes_to_a_public_repository(checkpoint: Path, hub):
    api = huggingface_hub.HfApi()
    api.create_repo("me/tiny")
    with pytest.raises(ValueError, match="exists and is public"):
        upload(checkpoint, "me/tiny", private=True, api=api)
    assert hub.repos["models/me/tiny"].messages == []


def test_a_refused_file_is_one_sentence(checkpoint: Path, hub):
    hub.refuses_files = True
    with pytest.raises(ValueError, match=r"did not finish: .*model\.safetensors.*the same command goes on"):
        upload(checkpoint, "me/tiny", api=huggingface_hub.HfApi())


def save_adapter(base: Path, folder: Path) -> Path:
    peft = pytest.importorskip("peft")
    from video_ma2mba import VideoMa2mbaForConditionalGeneration

    model = VideoMa2mbaForConditionalGeneration.from_pretrained(base)
    config = peft.LoraConfig(r=2, target_modules=r".*language_model\.layers\.\d+\.mixer\.(in_proj|out_proj)")
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


def test_no_code_of_others_runs_without_the_flag(checkpoint: Path, tmp_path: Path):
    """An adapter is tried on its base model, by the code that comes with that."""
    harm = f"open({str(tmp_path / 'harm')!r}, 'w')\n"
    for name in ("modeling_video_ma2mba.py", "ops_ssd.py"):
        code = checkpoint / name
        code.write_text(harm + code.read_text())
    adapter = save_adapter(checkpoint, tmp_path / "adapter")
    words = ["push", str(adapter), "me/lora", "--license", "mit", "--base-model", "me/tiny", "--dry-run"]
    refused = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")])
    assert refused.exit_code == 2
    assert "read it, then add --trust-remote-code" in refused.stderr
    assert not (tmp_path / "harm").exists()
    for name in ("modeling_video_ma2mba.py", "ops_ssd.py"):
        code = checkpoint / name
        code.write_text(code.read_text().removeprefix(harm))
    assert holds_only_our_code(checkpoint)
    assert not holds_only_our_code(Path("me/tiny"))  # of the Hub


def test_adapter_with_its_base(tiny_checkpoint: Path, tmp_path: Path, hub):
    adapter = save_adapter(tiny_checkpoint, tmp_path / "adapter")
    refused = CliRunner().invoke(app, ["push", str(adapter), "me/lora", "--license", "mit"])
    assert refused.exit_code == 2
    assert "--base-model" in refused.stderr

    push(adapter, "me/lora", "--license", "mit", "--base-model", "me/tiny")
    repo = hub.repos["models/me/lora"]
    commit = repo.commits[repo.head]
    assert commit.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(commit["adapter_config.json"])["base_model_name_or_path"] == "me/tiny"
    card = commit["README.md"].decode()
    assert "base_model: me/tiny" in card
    assert "base_model_relation: adapter" in card
    (tag,) = repo.tags
    assert f'"me/lora", revision="{tag}"' in card
    assert "base_model:adapter" in (adapter / "README.md").read_text()  # PEFT's own card names the local path
    for name, content in commit.items():
        assert str(tiny_checkpoint).encode() not in content, name


PUSH_TO_HUB = """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor
import video_ma2mba
AutoModelForImageTextToText.from_pretrained(sys.argv[1]).push_to_hub("me/plain", token="hf_test")
AutoProcessor.from_pretrained(sys.argv[1]).push_to_hub("me/plain", token="hf_test")
"""


def test_push_to_hub_of_model_and_processor(checkpoint: Path, hub, tmp_path: Path):
    """transformers' own way: two commits, no card of ours, but all that loading takes, the code included."""
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment["HF_HOME"] = str(tmp_path / "home")
    done = subprocess.run([sys.executable, "-c", PUSH_TO_HUB, str(checkpoint)], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    repo = hub.repos["models/me/plain"]
    content = repo.commits[repo.head]
    assert {path.name for path in checkpoint.iterdir()} - {"README.md"} <= content.keys()
    assert content["modeling_video_ma2mba.py"] == (checkpoint / "modeling_video_ma2mba.py").read_bytes()
    assert (
        json.loads(content["config.json"])["auto_map"]
        == json.loads((checkpoint / "config.json").read_text())["auto_map"]
    )
