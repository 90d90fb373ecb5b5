"""Every command and Python block of README.md and `docs/` runs as it stands, beside nothing but `examples/`."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- not run by the tests: (?P<reason>[^>]+) -->\n)?```(?P<language>bash|python)\n(?P<code>.*?)```", re.S
)
BUNDLED = re.compile(r"BUNDLED_CHECKPOINT|load_pipeline\(\)|video-ma2mba (?:ask|demo|describe|eval|niah|serve|where)")

SERVING = re.compile(r"video-ma2mba serve")
TRAINING = re.compile(r"VideoMa2mbaTrainer|video-ma2mba train")


def blocks() -> list:
    """One parameter per fenced block, skipped with the reason that a comment above it gives."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            language, code, reason = match["language"], match["code"], match["reason"]
            marks = [pytest.mark.skip(reason=reason.strip())] if reason else []
            if TRAINING.search(code) and find_spec("trl") is None:
                marks.append(pytest.mark.skip(reason="training needs TRL 1.16, and that Python 3.11"))
            if SERVING.search(code) and not all(map(find_spec, ("fastapi", "openai"))):
                marks.append(pytest.mark.skip(reason="serving needs the extra [serve], its example the openai client"))
            if BUNDLED.search(code):
                marks.append(pytest.mark.bundled)
            line = text.count("\n", 0, match.start("code")) + 1
            found.append(pytest.param(language, code, marks=marks, id=f"{page.stem}-{language}-line-{line}"))
    return found


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with a `video-ma2mba` that has imported torch and transformers already, where a process can be forked.

    The command as it is installed is run by the tests of start-up, wheel and verbs, and `make walk` walks with it.
    """
    folder = tmp_path_factory.mktemp("bin")
    if not hasattr(os, "pidfd_open"):
        (folder / "video-ma2mba").symlink_to(Path(sys.executable).parent / "video-ma2mba")
        yield folder
        return
    warm, address = ROOT / "tests" / "warm_command.py", folder / "socket"
    words = f'exec "{sys.executable}" -I -S "{warm}" RUN "{address}" "$@"'
    (folder / "video-ma2mba").write_text(f"#!/bin/sh\n{words}\n", encoding="utf-8")
    (folder / "video-ma2mba").chmod(0o755)
    with subprocess.Popen([sys.executable, warm, "SERVE", address]) as server:
        while not address.exists():
            assert server.poll() is None
            time.sleep(0.1)
        yield folder
        server.kill()


@pytest.mark.timeout(900)  # a block of ten commands loads torch ten times, on a busy machine each in half a minute
@pytest.mark.parametrize(("language", "code"), blocks())
def test_block_runs(language: str, code: str, commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    if language == "python":
        exec(compile(code, "page", "exec"), {"__name__": "__main__"})
        return
    path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-e", "-c", code], env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=850
    )
    assert done.returncode == 0, done.stderr
    assert "error:" not in done.stderr


def test_no_two_pages_write_into_one_folder():
    """What one page made would be in the way of another's; needles excepted, whose grid grows."""
    folder = re.compile(r"(?:--out |output_dir=|Config\(\")(runs/[\w/.-]+)")
    written: dict[str, set[str]] = {}
    for page in PAGES:
        for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
            for name in folder.findall(match["code"]) if not match["reason"] else ():
                written.setdefault(name, set()).add(page.stem)
    assert len(written) > 5
    assert {name: pages for name, pages in written.items() if len(pages) > 1} in (
        {},
        {"runs/needles": {"README", "needle"}},
    )


def test_readme_is_short():
    assert len(README.splitlines()) <= 230


def test_links_and_tree_name_files_that_exist():
    linked = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    tree = re.findall(r"^([\w./-]+)\s{2,}\S", README, re.M)
    assert len(tree) >= 8
    assert [name for name in linked + tree if not (ROOT / name).exists()] == []
