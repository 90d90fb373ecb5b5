"""The runner of the core checks: what it makes of their output, and what stops CI."""

import ast
import importlib
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("environments.py")
SCRIPT = Path(__file__).with_name("bundled_checks.py")


@pytest.fixture(scope="module")
def runner():
    spec = util.spec_from_file_location("compat_environments", FILE)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def checks(runner, tmp_path: Path, script: str) -> dict[str, tuple[str, str]]:
    file = tmp_path / "core_checks.py"
    file.write_text(script)
    return runner.run_checks(Path(sys.executable), file)


def test_verdicts_are_read_from_the_lines(runner, tmp_path: Path):
    said = "a warning: x\nask: PASS [0.1 s]\nremote code: PASS [12.0 s]\ntraining: FAIL (no: such (thing)) [3.0 s]"
    found = checks(runner, tmp_path, f"print({said!r}); print('x: SKIP (y) [0.0 s]'); raise SystemExit(1)")
    assert found == {
        "ask": ("PASS", ""),
        "remote code": ("PASS", ""),
        "training": ("FAIL", "no: such (thing)"),
        "x": ("SKIP", "y"),
    }
    assert not runner.is_broken(found)  # reported, but no reason to stop


@pytest.mark.parametrize("name", ["ask", "pipeline, right answers", "remote code", "remote code of another version"])
def test_a_broken_core_stops_ci(runner, name: str):
    assert runner.is_broken({"generate": ("PASS", ""), name: ("FAIL", "because")})
    assert not runner.is_broken({"generate": ("FAIL", "because"), name: ("PASS", "")})


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("raise ImportError('nothing works')", "ImportError: nothing works"),
        ("print('ask: PASS [0.1 s]', flush=True); raise ImportError('later')", "ImportError: later"),
        ("print('ask: PASS [0.1 s]', flush=True); import os; os.kill(os.getpid(), 9)", "exit code -9"),
        ("pass", "exit code 0"),
        ("import time; time.sleep(60)", "not done after"),
    ],
)
def test_checks_that_do_not_come_to_their_end_stop_ci(runner, monkeypatch, tmp_path: Path, script: str, reason: str):
    monkeypatch.setattr(runner, "SECONDS", 3)
    found = checks(runner, tmp_path, script)
    assert runner.is_broken(found)
    assert reason in found["core_checks"][1]


def test_the_scripts_are_found(runner):
    assert [script.name for script in runner.CHECKS] == ["bundled_checks.py", "core_checks.py"]


def test_versions_can_be_compared_with_the_lock(runner):
    locked, installed = runner.locked_versions(), runner.installed_versions(Path(sys.executable))
    assert locked["torch"] == "2.13.0"
    assert {"torch", "transformers", "huggingface-hub"} <= locked.keys() & installed.keys()


def test_the_table_has_a_row_a_release(runner):
    passed = {"ask": ("PASS", ""), "training": ("SKIP", "trl is not installed")}
    failed = {"ask": ("FAIL", "no cache"), "training": ("PASS", ""), "generate": ("PASS", "")}
    versions = [{"transformers": "5.10.4", "torch": "2.13.0+cpu"}, {"transformers": "5.24.0", "torch": "2.13.0+cpu"}]
    page = runner.table([(passed, versions[0]), (failed, versions[1])])
    assert "| transformers | ask | training | generate |" in page
    assert "| 5.10.4 | passed | not there |  |" in page
    assert "| 5.24.0 | **failed** | passed | passed |" in page
    assert "- 5.24.0, ask: no cache" in page
    assert "torch 2.13.0" in page
    assert "+cpu" not in page


def test_checks_say_what_they_find(tmp_path: Path):
    """A wrong answer is a failure with both answers, and exit code 1."""
    script = (
        f"import runpy, sys; names = runpy.run_path({str(SCRIPT)!r}); sys.argv = ['', 'a', 'b']\n"
        "names['CHECKS'].update(a=lambda: names['expect']('red', 'blue'), b=lambda: None)\n"
        "sys.exit(names['main']())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout.splitlines() == ["a: FAIL ('red' instead of 'blue') [0.0 s]", "b: PASS [0.0 s]"]


@pytest.mark.parametrize("script", ["bundled_checks.py", "core_checks.py"])
def test_names_that_the_checks_import_are_there(script: str):
    """They are imported where they are needed, in environments that only CI makes."""
    found = 0
    for node in ast.walk(ast.parse(FILE.with_name(script).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("video_ma2mba"):
            module = importlib.import_module(node.module)
            found += len(node.names)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
    assert found > 2


def test_a_walk_goes_on_with_what_has_not_passed_at_this_commit(tmp_path: Path):
    spec = util.spec_from_file_location("compat_walk", FILE.with_name("walk.py"))
    walk = util.module_from_spec(spec)
    spec.loader.exec_module(walk)
    table = tmp_path / "walk.csv"
    assert walk.passed_before(table, "aa") == []
    rows = [
        ("aa", "1", "passed"),
        ("aa", "2", "exit code 1"),
        ("bb", "3", "passed"),
        ("aa", "4", "needs [ray], as it says"),
    ]
    lines = [f'{commit},python3.11,60,cli,{line},1.0,"{result}"' for commit, line, result in rows]
    table.write_text("\n".join([",".join(walk.FIELDS), *lines]) + "\n")
    assert [row["line"] for row in walk.passed_before(table, "aa")] == ["1", "4"]
