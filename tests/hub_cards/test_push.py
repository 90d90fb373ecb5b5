"""`push`: what the folder holds, what is refused, and what one commit would bring to the Hub."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled
from typer.testing import CliRunner

from video_ma2mba.cli.main import app
from video_ma2mba.hub_cards.hub_folder import write_hub_folder
from video_ma2mba.hub_cards.preflight import ask_remote_code, refuse_secrets, refuse_wrong_sizes
from video_ma2mba.hub_cards.upload import check_login, check_repo_id

ROOT = Path(__file__).resolve().parents[2]


class Unreachable:
    """Stands in for `HfApi` where the first call fails."""

    def __init__(self, error: Exception):
        self.error = error

    def whoami(self) -> dict:
        raise self.error


def run(*words, api: Any = None, monkeypatch: pytest.MonkeyPatch | None = None):
    if api is not None:
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    return CliRunner().invoke(app, ["push", *map(str, words)])


def refused(*words, **options) -> str:
    result = run(*words, **options)
    assert result.exit_code == 2, result.output
    assert result.stderr.splitlines()[-1].startswith("error: ")
    return result.stderr


def test_dry_run_writes_the_folder_and_needs_no_hub(checkpoint: Path, tmp_path: Path, monkeypatch):
    api = Unreachable(AssertionError("a dry run asks the Hub nothing"))
    out = tmp_path / "out"
    result = run(checkpoint, "me/tiny", "--dry-run", "--out", out, api=api, monkeypatch=monkeypatch)
    assert result.exit_code == 0, result.output
    listed = [line.split()[-1] for line in result.stdout.splitlines()]
    assert listed == sorted(path.name for path in out.iterdir())
    assert not any(path.is_symlink() for path in out.iterdir())
    # what a clean process answered is what the installed package answers
    from video_ma2mba.loading import load_pipeline
    from video_ma2mba.world import WorldDataset
    from video_ma2mba.world.video_files import write_video

    sample = WorldDataset("test", 1, frames=(8, 8), questions=1)[0]
    write_video(tmp_path / "world.mp4", [sample.frames])
    pipe = load_pipeline(str(checkpoint), device="cpu")
    state = pipe.read(str(tmp_path / "world.mp4"))
    assert f"it answers: {pipe.ask(state, sample.questions[0].text, max_new_tokens=8)!r}" in result.stderr


def test_the_folder_must_work_without_the_package(checkpoint: Path, tmp_path: Path):
    target = tmp_path / "out"
    write_hub_folder(checkpoint, target, "me/tiny")
    (target / "ops_ssd.py").unlink()
    with pytest.raises(ValueError, match=r"does not answer a question: .*ops_ssd"):
        ask_remote_code(target)


@pytest.mark.bundled
def test_links_to_the_packages_code_become_copies(tmp_path: Path):
    assert write_hub_folder(ROOT / "bundled", tmp_path, "me/small").left_out == []
    assert not any(path.is_symlink() for path in tmp_path.iterdir())
    module = tmp_path / "modeling_video_ma2mba.py"
    assert module.read_bytes() == (ROOT / "modeling_video_ma2mba" / module.name).read_bytes()
    assert {path.name for path in (ROOT / "bundled").iterdir()} - {"__pycache__"} == {
        path.name for path in tmp_path.iterdir()
    }


def test_links_to_anywhere_else_are_refused(checkpoint: Path, tmp_path: Path):
    secret = tmp_path / "secret.txt"
    secret.write_text("mine")
    (checkpoint / "LICENSE").symlink_to(secret)
    assert "is a link to a file outside" in refused(checkpoint, "me/tiny", "--dry-run", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("secret", ["hf_" + "aB3" * 11, "-----BEGIN RSA PRIVATE " + "KEY-----", "ghp_" + "x9" * 18])
@pytest.mark.parametrize("name", ["generation_config.json", "model.safetensors"])
def test_secrets_are_refused_and_not_repeated(secret: str, name: str, checkpoint: Path):
    if name.endswith(".json"):
        content = json.loads((checkpoint / name).read_text()) | {"note": f"token {secret}"}
        (checkpoint / name).write_text(json.dumps(content))
    else:
        from safetensors.torch import load_file, save_file

        save_file(load_file(checkpoint / name), checkpoint / name, {"format": "pt", "note": secret})
    with pytest.raises(ValueError, match=re.escape(name)) as caught:
        refuse_secrets(checkpoint)
    assert secret not in str(caught.value)


def test_the_packages_own_files_hold_no_secret(checkpoint: Path):
    refuse_secrets(checkpoint)
    refuse_wrong_sizes(checkpoint)


def test_wrong_sizes_are_refused(checkpoint: Path, monkeypatch):
    monkeypatch.setattr("video_ma2mba.hub_cards.preflight.LARGEST_FILE", 20_000)
    with pytest.raises(ValueError, match="smaller max_shard_size"):
        refuse_wrong_sizes(checkpoint)
    (checkpoint / "chat_template.jinja").write_text("")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is empty"):
        refuse_wrong_sizes(checkpoint)


def test_no_licence_no_push(checkpoint: Path, tmp_path: Path):
    (checkpoint / "README.md").unlink()
    with pytest.raises(ValueError, match="give one, such as --license"):
        write_hub_folder(checkpoint, tmp_path / "out", "me/tiny")
    write_hub_folder(checkpoint, tmp_path / "out", "me/tiny", license="apache-2.0")
    assert "license: apache-2.0" in (tmp_path / "out" / "README.md").read_text()


def test_incomplete_and_foreign_checkpoints_are_refused(checkpoint: Path, tmp_path: Path):
    config = json.loads((checkpoint / "config.json").read_text())
    foreign = config | {"auto_map": config["auto_map"] | {"AutoModel": "you/other--modeling.Model"}}
    for content, message in (
        (foreign, "not of this package"),
        ({k: v for k, v in config.items() if k != "custom_pipelines"}, "does not name its code"),
    ):
        (checkpoint / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            write_hub_folder(checkpoint, tmp_path / "out", "me/tiny")
    (checkpoint / "processor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks processor_config\.json"):
        write_hub_folder(checkpoint, tmp_path / "out", "me/tiny")
    assert "not a saved model" in refused(tmp_path, "me/tiny", "--dry-run")


def test_wrong_words_on_the_command_line(checkpoint: Path, tmp_path: Path):
    check_repo_id("me/tiny")
    assert "names no owner" in refused(checkpoint, "tiny", "--dry-run")
    assert "no name of a repository" in refused(checkpoint, "me/ti ny", "--dry-run")
    assert "add --dry-run" in refused(checkpoint, "me/tiny", "--out", tmp_path / "out")
    assert "is not an empty directory" in refused(checkpoint, "me/tiny", "--dry-run", "--out", checkpoint)
    assert (checkpoint / "config.json").exists()


def test_offline_and_not_logged_in(checkpoint: Path, monkeypatch):
    for error, message in (
        (LocalTokenNotFoundError("long text"), "not logged in to the Hub: run `hf auth login`"),
        (OfflineModeIsEnabled("long text"), "unset it, or use --dry-run"),
        (ConnectionError("no route"), "the Hub cannot be reached (no route)"),
    ):
        said = refused(checkpoint, "me/tiny", api=Unreachable(error), monkeypatch=monkeypatch)
        assert message in said
        assert said.count("\n") == 1


def test_the_real_client_offline():
    """Tests run with HF_HUB_OFFLINE=1: the real library's errors are understood, too."""
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE|not logged in"):
        check_login(huggingface_hub.HfApi())


@pytest.mark.parametrize(("status", "message"), [(401, "hf auth login"), (403, "may not write"), (500, "refused")])
def test_refusals_of_the_hub(status: int, message: str):
    from huggingface_hub.errors import HfHubHTTPError

    error = HfHubHTTPError("Server said no", response=SimpleNamespace(status_code=status, headers={}, request=None))
    with pytest.raises(ValueError, match=message):
        check_login(Unreachable(error))
