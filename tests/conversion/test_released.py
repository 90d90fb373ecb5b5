"""Checkpoints in the released layout, named as a model: converted once, and only whole conversions are used."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
from typer.testing import CliRunner

from video_ma2mba.cli.main import app
from video_ma2mba.conversion import released
from video_ma2mba.conversion.convert_checkpoint import convert_checkpoint
from video_ma2mba.conversion.released import usable_folder
from video_ma2mba.loading import resolve_model

IDS = torch.randint(6, 262, (1, 20), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "video_ma2mba"


@pytest.fixture
def source(checkpoint, tensors) -> Path:
    return checkpoint(tensors, shards=3)


def conversions(home: Path) -> list[Path]:
    return [path for path in home.iterdir() if path.is_dir()]


def tree(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_auto_classes_load_the_conversion(home: Path, source: Path, tmp_path: Path):
    convert_checkpoint(source, tmp_path / "ours")
    with torch.no_grad():
        expected = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours").eval()(input_ids=IDS).logits
        before = tree(source)
        model = AutoModelForImageTextToText.from_pretrained(source).eval()
        assert torch.equal(model(input_ids=IDS).logits, expected)
        hidden = AutoModel.from_pretrained(str(source)).eval()(input_ids=IDS).last_hidden_state
    assert torch.equal(model.lm_head(hidden), expected)
    assert type(model).__name__ == "VideoMa2mbaForConditionalGeneration"
    assert model.config.model_type == "video_ma2mba"
    assert AutoModelForImageTextToText.from_pretrained(source, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert type(AutoProcessor.from_pretrained(source)).__name__ == "VideoMa2mbaProcessor"
    assert AutoConfig.from_pretrained(source).d_model == 16
    assert len(conversions(home)) == 1
    assert tree(source) == before


def test_pipeline_and_command_answer_the_same(home: Path, source: Path, tiny_video: Path):
    pipe = pipeline("video-question-answering", model=str(source), trust_remote_code=True)
    answer = pipe(video=str(tiny_video), question="What is shown?", max_new_tokens=4)[0]["answer"]
    words = ["ask", str(tiny_video), "What is shown?", "--model", str(source), "--max-new-tokens", "4", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["answer"] == answer
    assert len(conversions(home)) == 1


@pytest.mark.parametrize("words", [["plan", "--frames", "10", "--gpu-memory", "8GB"], ["data", "check"], ["state"]])
def test_every_command_takes_it(home: Path, source: Path, tiny_video: Path, tmp_path: Path, words: list[str]):
    if words[0] == "data":
        rows = tmp_path / "rows.jsonl"
        rows.write_text(json.dumps({"video": str(tiny_video), "question": "What?", "answer": "That."}))
        words = [*words, str(rows)]
    if words[0] == "state":
        out = str(tmp_path / "film.state")
        read = CliRunner().invoke(app, ["read", str(tiny_video), "--out", out, "--model", str(source)])
        assert read.exit_code == 0, read.output
        words = ["state", "check", out]
    done = CliRunner().invoke(app, [*words, "--model", str(source)])
    assert done.exit_code == 0, done.output
    assert len(conversions(home)) == 1


def test_it_is_converted_once_and_its_size_told_first(home: Path, source: Path, capsys):
    first = resolve_model(str(source))
    said = capsys.readouterr().err
    assert "MB" in said.splitlines()[0]
    assert first in said.splitlines()[0]
    written = tree(Path(first))
    assert resolve_model(str(source)) == first
    assert capsys.readouterr().err == ""
    assert tree(Path(first)) == written


def test_a_changed_source_is_converted_again(home: Path, source: Path):
    first = usable_folder(str(source))
    file = sorted(source.glob("*.safetensors"))[0]
    status, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # same size, same time
    second = usable_folder(str(source))
    assert second != first
    assert tree(Path(second)).keys() == tree(Path(first)).keys()
    (source / "tokenizer_config.json").touch()
    assert usable_folder(str(source)) not in (first, second)


def test_what_a_killed_conversion_left_is_not_used(home: Path, source: Path):
    command = (
        "import os, signal, sys; from huggingface_hub import constants; constants.HF_HOME = sys.argv[2]\n"
        "from video_ma2mba.conversion import released\n"
        "class Bar:\n"
        "    def __init__(self, **_): self.calls = 0\n"
        "    def __enter__(self): return self\n"
        "    def __exit__(self, *_): pass\n"
        "    def update(self, _):\n"
        "        self.calls += 1\n"
        "        if self.calls == 9: os.kill(os.getpid(), signal.SIGKILL)\n"
        "released.tqdm = Bar\n"
        "released.usable_folder(sys.argv[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", command, str(source), str(home.parent)], capture_output=True)
    assert done.returncode < 0
    assert [path.suffix for path in conversions(home)] == [".partial"]
    model = AutoModelForImageTextToText.from_pretrained(source)
    assert torch.isfinite(model(input_ids=IDS).logits).all()
    assert not [path for path in conversions(home) if path.suffix == ".partial"]


def test_a_conversion_that_lost_files_is_made_again(home: Path, source: Path):
    folder = Path(usable_folder(str(source)))
    files = set(tree(folder))
    (folder / "conversion.json").unlink()
    (folder / "model.safetensors").unlink()
    assert usable_folder(str(source)) == str(folder)
    assert set(tree(folder)) == files


def _convert(source: str, home: str, barrier, results) -> None:
    released.constants.HF_HOME = home
    barrier.wait()
    results.put(usable_folder(source))


def test_processes_share_one_conversion(home: Path, source: Path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    started = [
        context.Process(target=_convert, args=(str(source), str(home.parent), barrier, results)) for _ in range(3)
    ]
    for process in started:
        process.start()
    folders = {results.get(timeout=120) for _ in started}
    for process in started:
        process.join(60)
        assert process.exitcode == 0
    assert len(folders) == len(conversions(home)) == 1
    AutoModelForImageTextToText.from_pretrained(folders.pop())


def test_another_process_at_work_is_waited_for_and_named(home: Path, source: Path, capsys, monkeypatch):
    folder = usable_folder(str(source))
    (Path(folder) / "conversion.json").unlink()
    waited = []

    class Busy(released.FileLock):
        def acquire(self, *arguments, **options):
            if options.get("blocking") is False:
                raise released.Timeout(self.lock_file)
            waited.append(time.monotonic())
            return super().acquire(*arguments, **options)

    monkeypatch.setattr(released, "FileLock", Busy)
    assert usable_folder(str(source)) == folder
    assert waited
    assert "converted by another process: waiting" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_named(source: Path, tmp_path: Path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "file"))
    with pytest.raises(
        OSError, match=r"cannot be written .*: set HF_HOME .*`video-ma2mba convert .*source0 --out DIR"
    ):
        usable_folder(str(source))


def test_a_read_only_source(home: Path, source: Path):
    for path in [*source.iterdir(), source]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        AutoModelForImageTextToText.from_pretrained(source)
    finally:
        source.chmod(0o755)


def test_a_broken_source_leaves_nothing_and_is_one_line(home: Path, checkpoint, tensors, tiny_video: Path):
    del tensors["backbone.norm_f.weight"]
    source = checkpoint(tensors)
    done = CliRunner().invoke(app, ["ask", str(tiny_video), "What?", "--model", str(source)])
    assert done.exit_code == 2
    assert "norm_f.weight" in done.stderr.splitlines()[-1]
    assert conversions(home) == []


@pytest.mark.parametrize("word", ["ask", "plan"])
def test_without_a_network_file_and_command_are_named(home: Path, tiny_video: Path, word: str):
    name = "lakelee/video-ma2mba-3.1b-clip"
    words = {"ask": ["ask", str(tiny_video), "What?"], "plan": ["plan", "--frames", "10", "--gpu-memory", "8GB"]}
    done = CliRunner().invoke(app, [*words[word], "--model", name])
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {name} cannot be loaded: config.json cannot be fetched")
    assert f"hf download {name}" in line
    with pytest.raises(OSError, match="config.json cannot be fetched"):
        usable_folder(name)


def test_other_models_are_left_alone(home: Path, tiny_checkpoint: Path, tmp_path: Path):
    assert usable_folder(str(tiny_checkpoint)) == str(tiny_checkpoint)
    assert usable_folder(str(tmp_path)) == str(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert usable_folder(str(tmp_path)) == str(tmp_path)
    assert usable_folder("no/such/folder") == "no/such/folder"
    assert not home.exists()
