"""Windows and macOS, as far as Linux can show: modules that are not there, other code pages, other devices, names."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from video_ma2mba.loading import pick_device, pick_dtype
from video_ma2mba.modeling_video_ma2mba.recompute_random import RandomState, random_state_kept

ROOT = Path(__file__).resolve().parents[1]

# What Windows' Python lacks, or names otherwise.
ELSEWHERE = """
import multiprocessing.connection, os, shutil, signal, subprocess, sys, tempfile, types
# What these look for is their own affair.
import av, platform, psutil, rich.console, transformers, typer.core

platform.uname()

for name in ("fcntl", "resource"):
    sys.modules[name] = None
for name in ("sysconf", "fork", "forkpty", "getuid", "geteuid", "getgid", "getppid", "chown", "sched_getaffinity",
             "uname", "mkfifo", "killpg", "setsid", "O_NONBLOCK", "O_DIRECTORY", "O_NOFOLLOW"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGHUP", "SIGPIPE", "SIGALRM", "SIGUSR1", "SIGCHLD", "SIGTSTP", "setitimer", "alarm"):
    if hasattr(signal, name):
        delattr(signal, name)
msvcrt = types.ModuleType("msvcrt")
msvcrt.LK_NBLCK, msvcrt.LK_UNLCK, held = 2, 0, []
msvcrt.locking = lambda number, mode, size: held.append((number, os.lseek(number, 0, os.SEEK_CUR), size))
sys.modules["msvcrt"] = msvcrt

from video_ma2mba.cli.main import app


def run(*words):
    sys.argv = ["video-ma2mba", *words]
    try:
        app()
    except SystemExit as end:
        assert not end.code, (words, end.code)


run("world", "render", "--out", "clips", "--count", "1", "--frames", "8..8", "--seed", "7")
clip = "clips/000000.mp4"
run("ask", clip, "How many squares are there?")
run("read", clip, "--out", "film.state")
run("ask", "film.state", "Which sign did the card show? \\u2192", "--json")
run("batch", "in.jsonl", "out.jsonl")
run("plan", "--frames", "100", "--gpu-memory", "24GB", "--host-memory", "16GB")
assert held and all(place + size < 2**31 for _, place, size in held)
from video_ma2mba.modeling_video_ma2mba.planner import available_host_bytes
assert available_host_bytes() > 1 << 28
"""


def tracked(suffix: str = "") -> list[Path]:
    """Files that Git knows; the checkout may belong to another user, as in a container."""
    command = ["git", "-c", "safe.directory=*", "ls-files", f"*{suffix}"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [ROOT / name for name in names if (ROOT / name).exists()]


@pytest.mark.bundled
def test_core_commands_run_without_what_windows_lacks(tmp_path: Path):
    (tmp_path / "in.jsonl").write_text('{"video": "clips/000000.mp4", "question": "Wie viele, größer?"}\n', "utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252:strict", "PYTHONUTF8": "0", "LC_ALL": "C"}
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode("cp1252", "replace")[-3000:]
    answers = (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    assert '"answer"' in answers and "größer" in answers


UNIX_ONLY = re.compile(
    r"\b(os\.(sysconf|fork|forkpty|getuid|geteuid|getgid|getpgid|killpg|setsid|uname|mkfifo|statvfs|nice|wait3|wait4)\b"
    r"|signal\.(SIGKILL|SIGHUP|SIGPIPE|SIGALRM|SIGUSR1|SIGUSR2|SIGCHLD|SIGTSTP|SIGSTOP|setitimer|alarm|pause)\b"
    r"|(import|from) (resource|termios|tty|pty|pwd|grp|curses)\b|preexec_fn|start_new_session)"
)


def test_nothing_is_asked_of_the_system_that_only_unix_has():
    apart = {"tests", "benchmarks", "docs", "bundled"}
    files = [path for path in tracked(".py") if not apart & {*path.relative_to(ROOT).parts}]
    assert len(files) > 150
    found = {str(path.relative_to(ROOT)): UNIX_ONLY.findall(path.read_text(encoding="utf-8")) for path in files}
    assert {name: hits for name, hits in found.items() if hits} == {}


def test_text_files_have_an_encoding():
    """Ruff's PLW1514 sees this only where it knows that something is a path."""
    found = []
    for path in (path for path in tracked(".py") if "tests" not in path.relative_to(ROOT).parts):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            said = len(node.args) > 1 or any(keyword.arg == "encoding" for keyword in node.keywords)
            if node.func.attr in ("read_text", "write_text") and not said:
                found.append(f"{path.relative_to(ROOT)}, line {node.lineno}")
    assert found == []


# `mps_stand_in` brings a device of its own to PyTorch, for good: in a process of its own.
ON_MPS = """
import sys
import numpy as np
import torch
from mps_stand_in import NAME, OnMps, StandIn, without_metal
from video_ma2mba import Ma2mbaTextConfig, VideoMa2mbaConfig, VideoState
from video_ma2mba.loading import load_pipeline
from video_ma2mba.modeling_video_ma2mba.modeling_video_ma2mba import VideoMa2mbaForConditionalGeneration
from video_ma2mba.modeling_video_ma2mba.stack_weights import in_fp64

pipe = load_pipeline(device="cpu")
frames = np.random.default_rng(0).integers(0, 255, (6, 64, 64, 3), dtype=np.uint8)
question = "How many squares are there?"
answer, state = pipe(video=frames, question=question), pipe.read(frames, fps=1)
tower = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
text = Ma2mbaTextConfig(hidden_size=32, num_hidden_layers=3, vocab_size=300, head_dim=16, state_size=16)
torch.manual_seed(0)
model = VideoMa2mbaForConditionalGeneration(
    VideoMa2mbaConfig(text_config=text, vision_config=tower, video_token_id=290, vision_chunk_frames=8)
).train()
ids = torch.cat([torch.arange(5), torch.full((6 * model.config.tokens_per_frame,), 290), torch.arange(10, 30)])[None]
labels = torch.full_like(ids, -100)
labels[0, -10:] = ids[0, -10:]
pixels = torch.randint(0, 256, (6, 3, 28, 28), dtype=torch.uint8)
plans = ({"layers_per_block": 2, "segment_length": 16, "offload": False},
         {"layers_per_block": 2, "segment_length": 16, "offload": True}, {})


def loss(device, plan):
    model.gradient_checkpointing_enable({"method": "multi_axis", **plan})
    return model(input_ids=ids.to(device), labels=labels.to(device), pixel_values_videos=pixels, use_cache=False).loss


losses = [loss("cpu", plan).item() for plan in plans]
with StandIn() as stand_in:
    pipe.model.to(NAME)
    pipe.device = torch.device(NAME, 0)
    assert isinstance(next(pipe.model.parameters()), OnMps)
    assert pipe(video=frames, question=question) == answer
    again = pipe.read(frames, fps=1)
    assert type(again.layers[0][0]) is OnMps
    again.save("there.state")
    back = VideoState.load("there.state")
    for mine, theirs in zip(back.layers, state.layers):
        assert all((a - b).abs().max() <= 1e-5 * b.abs().max() for a, b in zip(mine, theirs))
    assert pipe.ask(back, question) == answer[0]["answer"]
    model.to(NAME)
    assert [loss(NAME, plan).item() for plan in plans] == losses
    assert in_fp64(torch.ones(2, device=NAME)).device.type == "cpu"
    try:
        torch.ones(2, device=NAME).double()
    except TypeError:
        pass
    else:
        raise AssertionError("the stand-in takes fp64")
assert len(stand_in.seen) > 50
assert without_metal(stand_in.seen) == [], without_metal(stand_in.seen)
assert without_metal({torch.ops.aten._linalg_eigvals.default}) == ["_linalg_eigvals"]
"""


@pytest.mark.bundled
def test_answers_states_and_losses_on_a_device_like_mps(tmp_path: Path):
    """Devices and types: nothing in fp64, nothing of the CPU beside it, every operation one that PyTorch has there."""
    path = f"{ROOT / 'tests'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", ON_MPS], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_mps_is_taken_where_it_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no Metal GPU; use cpu or auto"):
        pick_device("mps")
    assert pick_device("auto").type == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == pick_device("mps") == torch.device("mps")
    assert pick_dtype("auto", torch.device("mps")) is torch.float32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto").type == "cuda"
    with pytest.raises(ValueError, match="auto, cpu, cuda, cuda:N or mps"):
        pick_device("metal")


def test_random_state_of_a_device_is_put_back(monkeypatch: pytest.MonkeyPatch):
    """`torch.mps` has generators, and no context of a device, on which `torch.utils.checkpoint` relies."""
    other = torch.Generator().manual_seed(3)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda device: other.get_state())
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state, device: other.set_state(state))
    devices = torch.device("cpu"), torch.device("mps")
    state = RandomState(*devices)
    drawn = torch.rand(2), torch.rand(2, generator=other)
    with random_state_kept(*devices):
        state.put_back()
        assert all(map(torch.equal, drawn, (torch.rand(2), torch.rand(2, generator=other))))
    state.put_back()
    assert all(map(torch.equal, drawn, (torch.rand(2), torch.rand(2, generator=other))))


def test_names_of_files_are_good_on_every_system():
    names = [path.relative_to(ROOT).as_posix() for path in tracked()]
    folded = [name.casefold() for name in names]
    assert sorted(set(folded)) == sorted(folded), "two names differ in case only"
    reserved = re.compile(r'[<>:"|?*\\]|(^|/)(con|prn|aux|nul|com\d|lpt\d)(\.|/|$)|[ .](/|$)', re.IGNORECASE)
    assert [name for name in names if reserved.search(name)] == []
    assert max(map(len, names)) < 120  # Windows takes 260 with the folder in front
