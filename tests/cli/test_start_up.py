"""What a command imports before it knows that its arguments make sense, and what it says while it imports the rest."""

import json
import os
import shlex
import socket
import subprocess
import sys
import wave
from pathlib import Path

import pytest
from typer.testing import CliRunner

from video_ma2mba import VideoState
from video_ma2mba.auto_classes import WITHOUT_TORCH
from video_ma2mba.cli.loading import load_pipeline
from video_ma2mba.cli.main import app
from video_ma2mba.loading import check_loading
from video_ma2mba.modeling_video_ma2mba.state_header import KINDS_IN_FILES, summarise
from video_ma2mba.modeling_video_ma2mba.state_layers import KINDS

ROOT = Path(__file__).resolve().parents[2]
OLD_STATE = ROOT / "tests" / "modeling_video_ma2mba" / "data" / "format_1.state"
VIDEO = ROOT / "world" / "examples" / "000000.mp4"
WRONG = [
    ("ask none.mp4 Hm?", "none.mp4: no such file"),
    ("ask {prose} Hm?", "not a video, or its header is damaged (it holds text)"),
    ("ask {bare} Hm?", "contains no images"),
    ("ask {cut} Hm?", "cut.mp4: not a video, or its header is damaged"),
    ("read {sound} --out {folder}/x.state", "sound.wav: there is no video in this file, it contains only audio"),
    ("watch {cut} --ask Hm?", "header is damaged"),
    ("where {cut} Hm?", "header is damaged"),
    ("describe {cut}", "header is damaged"),
    ("plan --video {cut}", "header is damaged"),
    ("niah --out {folder}/n --haystack {cut}", "header is damaged"),
    ("state append {state} {cut}", "header is damaged"),
    ("ask {video} Hm? --model {models}/other", "holds a model of the type bert, not a Video-Ma2mba model"),
    ("classify {video} --model {models}/other", "of the type bert, not a VideoMamba classifier"),
    ("retrieve x --videos {video} --model {models}/other", "of the type bert, not a retrieval model"),
    ("serve --model {models}/other", "of the type bert, not a Video-Ma2mba model"),
    ("eval --tasks rendered_world --out {folder}/e --model {models}/other", "of the type bert"),
    ("batch {queue} {folder}/out.jsonl --model {models}/other", "of the type bert"),
    ("watch {video} --ask Hm? --model {models}/other", "of the type bert"),
    ("niah --out {folder}/n --model {models}/nameless", "config.json names no model_type"),
    ("demo --model {models}/broken", "config.json is damaged, it is not JSON"),
    ("plan --frames 3 --model {models}/broken", "config.json is damaged, it is not JSON"),
    ("ask {video} Hm? --model {models}/halved", "tokenizer.json is damaged, it is not JSON"),
    ("ask {video} Hm? --model {models}/mute", "holds no processor_config.json"),
    ("ask {video} Hm? --model {models}/weightless", "holds no weights"),
    ("ask {video} Hm? --model {models}/short", "model.safetensors is damaged, or was not copied to its end"),
    ("describe {prose}", "it holds text"),
    ("batch {queue} {queue}", "is the queue itself"),
    ("convert {bare} --out {folder}/c", "holds no config.json"),
    ("data check {prose}", "must end in .jsonl"),
    ("train --config lora model=bundled train_data={prose}", "must end in .jsonl"),
    ("eval --tasks activitynetqa --out {folder}/e", "--no-judge"),
    ("ask {video} ''", "a question is empty"),
    ("ask {video} Hm? --model none", "none does not exist"),
    ("ask {video} Hm? --times --model {untimed}", "never learnt times"),
    ("ask {video} Hm? --device tpu", "--device tpu is unknown"),
    ("ask {video} Hm? --dtype int3", "--dtype int3 is unknown"),
    ("ask {video} Hm? --start 5 --end 2", "must come before end"),
    ("ask {state} Hm? --fps 2", "frames are read already"),
    ("ask ftp://host/a.mp4 Hm?", "addresses of the kind ftp://"),
    ("read none.mp4 --out {folder}/x.state", "none.mp4: no such file"),
    ("read {video} --out {folder}/none/x.state", "there is no folder"),
    ("read {video} --out {folder}/x.state --state-dtype int", "--state-dtype int is unknown"),
    ("state show none.state", "there is no state file"),
    ("state check {video}", "is not a readable state file"),
    ("state append none.state {video}", "there is no state file"),
    ("where none.mp4 Hm?", "none.mp4: no such file"),
    ("where {video} Hm? --out x.jpg", "the picture is a PNG"),
    ("watch none.mp4 --ask Hm?", "none.mp4: no such file"),
    ("watch {video} --ask Hm? --state none.state", "there is no state file"),
    ("batch none.jsonl out.jsonl", "none.jsonl"),
    ("demo none", "none holds no questions.jsonl"),
    ("niah --out {folder}/n --frames x", "write numbers such as"),
    ("niah --out {folder}/n --needles 30", "at most 24"),
    ("niah --out {folder}/n --haystack none.mp4", "no such video file"),
    ("niah --out {folder}/n --model none", "none does not exist"),
    ("plan", "exactly one of"),
    ("plan --preset 9b --frames 3", "--preset 9b is unknown"),
    ("plan --frames 3 --gpu-memory 1XB", "is not a size"),
    ("plan --frames 0 --preset 370m", "at least 1"),
    ("plan --frames 3 --model none", "none does not exist"),
    ("plan --frames 3 --dtype int", "dtype='int' is unknown"),
    ("plan --frames 3 --train x", "train names 'x'"),
    ("plan --video none.mp4", "none.mp4: no such file"),
    ("convert none --out {folder}/c", "there is no directory none"),
    ("convert {folder}/none.pth --out {folder}/c", "no such file (and no file of the Hub"),
    ("convert {video_folder} --out {video}", "is not an empty directory"),
    ("convert {video_folder} --out {folder}/c --to x", "--to x is no layout"),
    ("convert {video_folder} --out {folder}/c --tokenizer none", "there is no directory none"),
    ("init --out {folder}/i --preset 9b", "there is no preset '9b'"),
    ("init --out {folder}/i --language-model none --vision-tower none", "there is no directory none"),
    ("init --out {folder}/i", "name a language model and a vision tower"),
    ("classify none.mp4 --model none", "none does not exist"),
    ("train --config none.yaml", "there is no recipe none.yaml"),
    ("train --config lora nothing", "is no override"),
    ("train --config lora lerning_rate=3", "do you mean 'learning_rate'?"),
    ("train --config lora learning_rate=abc", "learning_rate=abc is not valid"),
    ("train --config lora eval_share=3", "eval_share=3 is not valid"),
    ("train --config lora", "names no model: add model=..."),
    ("train --config lora model=bundled", "names no train_data"),
    ("train --config lora model=none train_data=x", "none does not exist"),
    ("train --config lora model=bundled train_data=none.csv", "none.csv: no such file or folder"),
    ("data check none.csv", "no such file or folder"),
    ("data check {queue} --gpu-memory 80", "has no unit"),
    ("data check {queue} --train x", "'x'"),
    ("batch {queue} {folder}/none/out.jsonl", "there is no folder"),
    ("batch {queue} {folder}/out.jsonl --model none", "none does not exist"),
    ("batch {queue} {folder}/out.jsonl --fps 0", "fps must be more than 0"),
    ("eval --tasks rendered_world --out {folder}/e --model none", "none does not exist"),
    ("eval --tasks rendered_world --out {video}", "is a file"),
    ("eval --tasks rendered_wrld --out {folder}/e", "do you mean rendered_world"),
    ("eval --tasks ' , ' --out {folder}/e", "names no task"),
    ("eval --tasks rendered_world --out {folder}/e --replay none.jsonl", "none.jsonl does not exist"),
    ("eval --tasks rendered_world --out {folder}/e --include none", "none is no folder"),
    ("eval --tasks rendered_world --out {folder}/e --data none", "none is no folder"),
    ("eval --tasks rendered_world --out {folder}/e --frames-sweep x", "numbers of frames"),
    ("describe none.mp4", "none.mp4: no such file"),
    ("describe {video} --out {folder}/x.html", "is not one of srt"),
    ("push none me/x", "none is no directory"),
    ("push {video_folder} me/x", "it is not a saved model"),
    ("serve --model none", "none does not exist"),
    ("serve --device tpu", "--device tpu is unknown"),
    ("world render --out {folder}/w --count 2 --kinds x", "x"),
    ("world render --out {folder}/w --count 2 --rename x", "write words=other words"),
]  # fmt: skip
PLANS = [
    "plan --frames 60",
    "plan --preset 2.7b --frames 7200 --gpus 8 --json",
    "plan --preset 370m --tokens 65536 --gpu-memory 24GB --qlora 16",
    "plan --preset 370m --frames 900 --reading",
]

SCRIPT = """
import json, sys
from typer.testing import CliRunner
from video_ma2mba.cli.main import app
for arguments in json.load(sys.stdin):
    done = CliRunner().invoke(app, arguments)
    heavy = sorted({"torch", "transformers", "pandas", "scipy", "matplotlib", "datasets", "trl"} & sys.modules.keys())
    print(json.dumps([done.exit_code, done.stdout + done.stderr, heavy]))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, tuple[int, str, list[str]]]:
    """Exit code, output, and heavy modules loaded after each command, all in one process that began without any."""
    folder = tmp_path_factory.mktemp("out")
    (folder / "queue.jsonl").write_text(f'{{"video": "{VIDEO}", "question": "Hm?"}}\n')
    (folder / "bare").mkdir()
    (folder / "prose.txt").write_text("Once upon a time\n")
    (folder / "cut.mp4").write_bytes(VIDEO.read_bytes()[:3000])
    with wave.open(str(folder / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 800, "NONE", ""))
        sound.writeframes(bytes(1600))
    models = folder / "models"
    ours, processor = '{"model_type": "video_ma2mba"}', {"processor_config.json": "{}"}
    for name, files in {
        "other": {"config.json": '{"model_type": "bert"}'},
        "nameless": {"config.json": "[]"},
        "broken": {"config.json": '{"model_type":'},
        "halved": {"config.json": ours, "tokenizer.json": "{"},
        "mute": {"config.json": ours},
        "weightless": {"config.json": ours, **processor},
        "short": {"config.json": ours, **processor, "notes.json": "not JSON", "model.safetensors": "\0" * 7},
    }.items():
        (models / name).mkdir(parents=True)
        for file, text in files.items():
            (models / name / file).write_text(text)
    (untimed := folder / "untimed").mkdir()
    for file in (ROOT / "bundled").glob("*.json"):
        kept = {name: value for name, value in json.loads(file.read_text()).items() if name[:11] != "frame_times"}
        (untimed / file.name).write_text(json.dumps(kept))
    (untimed / "model.safetensors").symlink_to(ROOT / "bundled" / "model.safetensors")
    names = {"untimed": untimed, "models": models, "cut": folder / "cut.mp4", "sound": folder / "sound.wav",
             "video": VIDEO, "video_folder": VIDEO.parent, "state": OLD_STATE, "folder": folder,
             "queue": folder / "queue.jsonl", "bare": folder / "bare", "prose": folder / "prose.txt"}  # fmt: skip
    commands = [*(command for command, _ in WRONG), "state show {state}", "state show {state} --json", *PLANS]
    typed = json.dumps([shlex.split(command.format(**names)) for command in commands])
    done = subprocess.run([sys.executable, "-c", SCRIPT], input=typed, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return dict(zip(commands, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize(("command", "message"), WRONG)
def test_wrong_arguments_are_told_without_loading_torch(told, command: str, message: str):
    code, output, heavy = told[command]
    assert (code, heavy) == (2, [])
    assert output.startswith("error: ") and output.count("\n") == 1 and message in output


def test_a_state_is_shown_without_loading_torch(told):
    code, output, heavy = told["state show {state}"]
    assert (code, heavy) == (0, []) and "layers: 2 mamba2" in output
    facts = json.loads(told["state show {state} --json"][1])
    assert (int(facts["bytes"]), int(facts["tokens"])) == (VideoState.load(OLD_STATE).nbytes, 1033)


def test_plans_are_made_without_loading_torch(told):
    assert [told[command][::2] for command in PLANS] == [[0, []]] * len(PLANS)


def test_a_summary_says_what_loading_says(tmp_path: Path):
    assert {name: (kind.version, kind.fields, kind.wide) for name, kind in KINDS_IN_FILES.items()} == {
        name: (kind.version, kind._fields, kind.wide) for name, kind in KINDS.items()
    }
    loaded = VideoState.load(OLD_STATE)
    import torch

    for dtype in (None, torch.bfloat16, torch.float16):
        loaded.save(tmp_path / "state", dtype)
        again, found = VideoState.load(tmp_path / "state"), summarise(tmp_path / "state")
        assert (found.nbytes, found.kinds) == (again.nbytes, again.kinds)
        assert (found.header.seen_tokens, found.header.metadata) == (again.seen_tokens, again.metadata)
    whole = (tmp_path / "state").read_bytes()
    for damaged in (whole[:-1], whole[:40], b"", whole[:-3] + b"\xff\xff\xff", whole.replace(b"BF16", b"I32 ")):
        (tmp_path / "state").write_bytes(damaged)
        if damaged != whole:
            with pytest.raises(ValueError, match="state"):
                summarise(tmp_path / "state")


def test_without_a_network_the_hub_is_not_asked(monkeypatch):
    def nobody(*_):
        raise socket.gaierror(-3, "no name")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    for proxies, expected in (({"https_proxy": "http://here:1"}, None), ({}, "1")):
        environment = {"HF_HOME": "/none", **proxies}
        monkeypatch.setattr(os, "environ", environment)
        check_loading("owner/name")
        assert environment.get("HF_HUB_OFFLINE") == expected


def test_a_folder_that_is_gone_is_told(tmp_path: Path):
    (tmp_path / "gone").mkdir()
    script = "import os; os.rmdir(os.getcwd()); from video_ma2mba.cli.main import main; main()"
    command = [sys.executable, "-c", script, "plan", "--frames", "3"]
    done = subprocess.run(command, cwd=tmp_path / "gone", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and "was started in is gone" in done.stderr
    assert done.stderr.count("\n") == 1


def test_light_files_import_light_files_only():
    script = "".join(f"import video_ma2mba.{name}\n" for name in sorted(WITHOUT_TORCH))
    script += "import sys\nprint([name for name in ('torch', 'transformers') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"


def test_any_file_of_the_hub_folders_may_be_imported_first():
    """Registering with transformers imports these files, and must not meet one that is half imported."""
    name = "video_ma2mba.modeling_video_ma2mba.configuration_video_ma2mba"
    script = (
        f"import sys, {name} as first\nfrom transformers import AutoConfig\nimport inspect\n"
        "config = AutoConfig.for_model('video_ma2mba')\n"
        f"print(sys.modules['{name}'] is first, first.__spec__.loader.__class__.__name__, type(config).__module__)\n"
        "from transformers.utils.import_utils import create_import_structure_from_path as looks\n"
        "print(looks.cache_info().hits > 100)"  # folders of models are looked through once
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "True", "SourceFileLoader", "video_ma2mba.modeling_video_ma2mba.configuration_video_ma2mba", "True",
    ]  # fmt: skip


ENDING = """
import atexit, sys, types
from video_ma2mba.cli import main
def app():
    atexit.register(print, "cleaned up")
    print("said")
    raise SystemExit({code})
main.app, sys.modules["torch"] = app, types.ModuleType("torch")
main.main()
"""


@pytest.mark.parametrize(("code", "expected"), [("0", 0), ("3", 3), ("None", 0), ("'a text'", 1)])
def test_a_command_ends_at_once_with_its_exit_code(code: str, expected: int):
    done = subprocess.run([sys.executable, "-c", ENDING.format(code=code)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (expected, "said\ncleaned up\n")


def test_a_program_that_goes_on_after_a_command_may_still_fail():
    script = ENDING.format(code="0").replace("main.main()", "try: main.main()\nexcept SystemExit: pass\n1 / 0")
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 1


def test_a_command_that_nobody_listens_to_ends_as_any_program():
    quiet = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", ENDING.format(code="0")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=quiet) as process:
        process.stdout.close()
    assert process.returncode == 120


def test_loading_is_told_at_once_on_a_terminal(tiny_checkpoint: Path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    load_pipeline(str(tiny_checkpoint), device="cpu")
    shown = capsys.readouterr().err
    assert shown.startswith("loading …") and shown.endswith("\r         \r")


def test_nothing_about_loading_where_nobody_looks(tiny_checkpoint: Path, tiny_video: Path):
    done = CliRunner().invoke(app, ["ask", str(tiny_video), "Hm?", "--model", str(tiny_checkpoint)])
    assert done.exit_code == 0 and "loading" not in done.output
