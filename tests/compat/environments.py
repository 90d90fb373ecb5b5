"""Runs the core checks (`*_checks.py`) in environments of their own, beside the one that runs this script.

    python tests/compat/environments.py oldest      # the lower bounds of setup.cfg: requirements-oldest.lock
    python tests/compat/environments.py newest      # what was released until now, without a lock (torch as locked)
    python tests/compat/environments.py all --table docs/compatibility.md   # every minor release of transformers

Fails where a check whose name begins as in `FATAL` fails, or checks do not come to their end; other failures are
reported, with the versions that differ from the lock.
"""

import argparse
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from datetime import date
from importlib import metadata, util
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
CHECKS = sorted(Path(__file__).parent.glob("*_checks.py"))
FATAL = ("ask", "pipeline", "remote code")
OLDEST_MINOR = 10  # of transformers 5, as in setup.cfg
SECONDS = 1200  # of a script, behind the tests in priority
_LINE = re.compile(r"^([^:\n]+): (PASS|FAIL|SKIP)(?: \((.*)\))? \[[\d.]+ s\]$", re.MULTILINE)


def pip(python: Path, *words: str, fast: bool = True) -> str | None:
    """Install; what pip said if it failed. `fast`: by uv where it is installed here, in a fifth of the time."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
    if fast and util.find_spec("uv") is not None:
        command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", str(python)]
    done = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True)
    return done.stderr if done.returncode else None


def environment(name: str) -> Path:
    """The Python of an empty environment below the one that runs this."""
    folder = Path(sys.prefix, "compat", name)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


def install(name: str) -> Path:
    """The Python of an environment: `oldest`, `newest` or a minor release of transformers such as `5.12`.

    Raises:
        ChildProcessError: pip failed, with its words.
    """
    python = environment(name)
    torch = f"torch=={locked_versions()['torch']}"
    itself = ("--no-deps", "--no-build-isolation", "--editable", ".")
    if name == "oldest":
        lock = "requirements-oldest.lock"
        steps = [("--constraint", lock, "torch"), ("--no-deps", "--requirement", lock), itself]
    elif name == "newest":
        steps = [(torch,), (torch, "--editable", ".[test]"), ("--no-deps", "lmms-eval")]
    else:
        # Everything but transformers, and what it needs otherwise, is that of the environment that runs this.
        here = sysconfig.get_path("purelib")
        there = sysconfig.get_path(
            "purelib", vars={"base": str(python.parents[1]), "platbase": str(python.parents[1])}
        )
        Path(there, "shared.pth").write_text(f"import site; site.addsitedir({here!r})\n", encoding="utf-8")
        steps = [(f"transformers=={name}.*",)]
    for number, words in enumerate(steps):
        # pip knows which build of torch this machine takes, and sees what `shared.pth` names.
        if (said := pip(python, *words, fast=number > 0)) is not None:
            raise ChildProcessError(said)
    return python


def check(python: Path, quick: bool = False) -> dict[str, tuple[str, str]]:
    """Name of each core check -> (PASS, FAIL or SKIP; the reason). `quick`: with random models only."""
    found = {}
    for script in CHECKS:
        if not quick or script.stem == "core_checks":
            found |= run_checks(python, script)
    if quick:
        return found
    if installed_versions(python)["transformers"] != metadata.version("transformers"):
        found["remote code of another version"] = check_saved_model(python)
    return found


def run_checks(python: Path, script: Path) -> dict[str, tuple[str, str]]:
    """The verdicts that a script prints; where it did not come to its end, its own name failed."""
    with tempfile.TemporaryDirectory() as home:
        settings = {"HF_HOME": home, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | settings
        command = [str(python), str(script)]
        try:
            done = subprocess.run(command, cwd=home, env=variables, capture_output=True, text=True, timeout=SECONDS)
            said, error, status = done.stdout, done.stderr, done.returncode
        except subprocess.TimeoutExpired as late:
            said, error, status = (late.stdout or b"").decode(errors="replace"), f"not done after {SECONDS} s", None
    found = {name: (verdict, reason) for name, verdict, reason in _LINE.findall(said)}
    failed = any(verdict == "FAIL" for verdict, _ in found.values())
    if status not in (0, 1) or status != failed or not found:
        found[script.stem] = ("FAIL", (error.strip().splitlines() or [f"exit code {status}"])[-1])
    return found


def check_saved_model(python: Path) -> tuple[str, str]:
    """Models saved here, by the transformers of here, compute the same there, by the code in their folders."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "tests/compat/test_remote_code.py", "-k", "another"]
    variables = os.environ | {"VIDEO_MA2MBA_COMPAT_PYTHON": str(python), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    errors = re.findall(r"^E\s+(\S.*)", done.stdout, re.MULTILINE) or [done.stdout[-200:].strip()]
    return ("PASS", "") if done.returncode == 0 else ("FAIL", errors[-1])


def locked_versions() -> dict[str, str]:
    """Name -> version of requirements.lock, on this Python."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    locked = [Requirement(line) for line in lines if "==" in line]
    return {
        requirement.name: str(requirement.specifier).removeprefix("==")
        for requirement in locked
        if requirement.marker is None or requirement.marker.evaluate()
    }


def installed_versions(python: Path) -> dict[str, str]:
    done = subprocess.run(
        [str(python), "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {re.sub(r"[-_.]+", "-", row["name"]).lower(): row["version"] for row in json.loads(done.stdout)}


def run(name: str, quick: bool = False) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """Install, check and report; the checks' verdicts and the versions there.

    Raises:
        ChildProcessError: as `install`.
    """
    print(f"{name}: installing ...", flush=True)
    began = time.monotonic()
    python = install(name)
    installed = time.monotonic()
    found, versions = check(python, quick), installed_versions(python)
    print(f"{name}: transformers {versions['transformers']}, Python {platform.python_version()}; ", end="")
    print(f"installed in {installed - began:.0f} s, checked in {time.monotonic() - installed:.0f} s")
    for check_name, (verdict, reason) in found.items():
        print(f"  {verdict} {check_name}{f': {reason}' if reason else ''}")
    if any(verdict == "FAIL" for verdict, _ in found.values()):
        locked = locked_versions()
        changed = sorted(f"{key} {locked[key]} -> {versions[key]}" for key in locked.keys() & versions.keys()
                         if locked[key] != versions[key].partition("+")[0])  # fmt: skip
        print(f"  versions that are not those of the lock: {', '.join(changed)}")
    return found, versions


def is_broken(found: dict[str, tuple[str, str]]) -> bool:
    return any(
        verdict == "FAIL" for name, (verdict, _) in found.items() if name.startswith(FATAL) or name.endswith("_checks")
    )


def table(rows: list[tuple[dict[str, tuple[str, str]], dict[str, str]]]) -> str:
    """The page for docs/: a row a release of transformers, a column a check."""
    columns = list(dict.fromkeys(name for found, _ in rows for name in found))
    lines = [f"| transformers | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    words = {"PASS": "passed", "FAIL": "**failed**", "SKIP": "not there"}
    for found, versions in rows:
        cells = (words[found[name][0]] if name in found else "" for name in columns)
        lines.append(f"| {versions['transformers']} | {' | '.join(cells)} |")
    reasons = [
        f"- {versions['transformers']}, {name}: {reason}"
        for found, versions in rows
        for name, (verdict, reason) in found.items()
        if verdict != "PASS"
    ]
    shown = ("torch", "huggingface-hub", "accelerate", "trl", "peft", "av", "lmms-eval")
    beside = ", ".join(f"{name} {rows[-1][1][name].partition('+')[0]}" for name in shown if name in rows[-1][1])
    return "\n".join(
        [
            "# Compatibility",
            "",
            "Written by `make compat-all`: the core checks (`tests/compat/core_checks.py`) with every minor release",
            f"of transformers, {date.today()}, on Python {platform.python_version()}; beside the last:",
            f"{beside}.",
            "CI runs these and more (`tests/compat/bundled_checks.py`) with the oldest versions of `setup.cfg`",
            "and with the newest of everything.",
            "",
            *lines,
            *(["", "What did not pass:", "", *reasons] if reasons else []),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="oldest, newest, all, or minor releases of transformers such as 5.12")
    parser.add_argument("--quick", action="store_true", help="with random models only, as `all` does")
    parser.add_argument("--table", type=Path, help="file to write the results to")
    arguments = parser.parse_args()
    every = arguments.names == ["all"]
    names = (f"5.{minor}" for minor in itertools.count(OLDEST_MINOR)) if every else iter(arguments.names)
    rows = []
    for name in names:
        try:
            rows.append(run(name, quick=every or arguments.quick))
        except ChildProcessError as error:
            newer = locked_versions()["transformers"].split(".")[1]
            if every and "No matching distribution" in str(error) and len(rows) > int(newer) - OLDEST_MINOR:
                break  # that minor release does not exist yet
            sys.exit(f"{name}: cannot be installed\n{error}")
    if arguments.table is not None:
        arguments.table.write_text(table(rows), encoding="utf-8")
    if any(is_broken(found) for found, _ in rows):
        sys.exit(f"broken: one of {', '.join(FATAL)}")


if __name__ == "__main__":
    main()
