"""Walks README and docs as a reader would: every block, in a fresh install of the wheel, on several kinds of terminal.

    python tests/compat/walk.py --pythons python3.11 python3.13 --out runs/walk

Makes a wheel and an environment for each Python (not editable, with the versions of requirements.lock), and runs each
block that is not marked otherwise in an empty folder beside nothing but `examples/`: `piped` (no terminal), `60` and
`120` (a terminal of so many columns, in tmux), `plain` (80 columns, NO_COLOR). A block fails by its exit code, a
traceback, an escape sequence where it was piped, a colour where none was wanted, or a progress bar that is wider than
the terminal. Writes walk.csv (commit and seconds of every block) and what each block printed. Interrupted, the same
command goes on: what passed at this commit is not run again. `make walk` does all of it.
"""

import argparse
import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"(<!-- not run by the tests: [^>]+ -->\n)?```(bash|python)\n(.*?)```", re.DOTALL)
COLOUR = re.compile(r"\x1b\[[0-9;]*(?:3|4|9|10)[0-7](?:;[0-9;]*)?m")
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]|\x1b[=>]|\x1b\][^\x07]*\x07")
MODES = ("piped", "60", "120", "plain")
EXTRAS = "train,plot,demo,serve"
FIELDS = ["commit", "python", "mode", "page", "line", "seconds", "result"]


def blocks(pages: list[Path]) -> list[tuple[str, int, str, str]]:
    """Page, line, language and code of every block that runs as it stands."""
    found = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            if match[1] is None:
                found.append((page.stem, text.count("\n", 0, match.start(3)) + 1, match[2], match[3]))
    return found


def passed_before(table: Path, commit: str) -> list[dict[str, str]]:
    """Rows of blocks that passed at this commit."""
    if not table.exists():
        return []
    with table.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("commit") == commit and is_passed(row["result"])]


def is_passed(result: str) -> bool:
    return result == "passed" or result.startswith("needs")


def make_wheel(out: Path) -> Path:
    """The wheel of what Git tracks; an older build in the tree has no say in it."""
    source, target = out / "source", out / "wheel"
    for folder in (source, target):
        shutil.rmtree(folder, ignore_errors=True)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    make = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", target, source]
    subprocess.run(make, check=True)
    (wheel,) = target.glob("*.whl")
    return wheel


def install(python: str, folder: Path, wheel: Path) -> Path:
    """The interpreter of an environment, made once, with this wheel in it."""
    inside = folder / "bin" / "python"
    if not (folder / "ready").exists():
        if python == sys.executable:
            venv.create(folder, with_pip=True)
        else:
            subprocess.run([python, "-m", "venv", folder], check=True)
        pip = [inside, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "requirements.lock"]
        subprocess.run([*pip, "torch"], check=True)
        subprocess.run([*pip, f"{wheel}[{EXTRAS}]", "openai"], check=True)  # the server's example asks with it
        (folder / "ready").touch()
    else:
        again = [inside, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel]
        subprocess.run(again, check=True)
    return inside


def prepared(folder: Path, language: str, code: str, python: Path) -> str:
    """A folder for a block, and the command that runs it there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copytree(ROOT / "examples", folder / "examples")
    name = "block.sh" if language == "bash" else "block.py"
    (folder / name).write_text(code, encoding="utf-8")
    return f"bash -e {name}" if language == "bash" else f"{python} {name}"


def run_piped(command: str, folder: Path, environment: dict[str, str], limit: float) -> tuple[int, str]:
    try:
        done = subprocess.run(
            shlex.split(command), cwd=folder, env=environment, capture_output=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return 124, ""
    return done.returncode, (done.stdout + done.stderr).decode("utf-8", "replace")


def run_in_tmux(
    command: str, folder: Path, environment: dict[str, str], limit: float, columns: int
) -> tuple[int, str]:
    """Exit code and every byte that the terminal got."""
    # A server of its own for each block: one that is still ending refuses the next session.
    session, raw, ended = f"walk{os.getpid()}-{folder.name}", folder / "terminal.raw", folder / "exit.code"
    given = " ".join(
        f"{name}={shlex.quote(environment[name])}" for name in ("PATH", "HOME", "NO_COLOR") if name in environment
    )
    wait = f"while [ ! -e {raw} ]; do sleep 0.1; done; {given} {command}; echo $? > {ended}; sleep 0.5"
    tmux = ["tmux", "-L", session]
    start = ["new-session", "-d", "-x", str(columns), "-y", "50", "-c", str(folder), "bash", "-c", wait]
    subprocess.run([*tmux, *start], check=True)
    subprocess.run([*tmux, "pipe-pane", "-o", f"cat > {raw}"], check=True)
    until = time.monotonic() + limit
    while not ended.exists() and time.monotonic() < until:
        time.sleep(0.2)
    time.sleep(0.3)
    subprocess.run([*tmux, "kill-server"], check=False, capture_output=True)
    code = int(ended.read_text(encoding="utf-8")) if ended.exists() else 124
    return code, raw.read_text(encoding="utf-8", errors="replace") if raw.exists() else ""


def verdict(code: int, text: str, mode: str, language: str) -> str:
    """ "passed", or what is wrong; "needs …" where a block wants an extra that is not installed here, and says so."""
    if code == 2 and (extra := re.search(r"pip install 'video-ma2mba\[(\w+)\]'", text)) and extra[1] not in EXTRAS:
        return f"needs [{extra[1]}], as it says"
    if code:
        return f"exit code {code}"
    if "Traceback (most recent call last)" in text:
        return "a traceback"
    if mode == "piped" and language == "bash" and "\x1b[" in text:  # bars in Python are those of its libraries
        return "escape sequences in a pipe"
    if mode == "plain" and COLOUR.search(text):
        return "colours in spite of NO_COLOR"
    if mode.isdecimal():
        drawn = [ESCAPE.sub("", part) for part in re.findall(r"\r([^\r\n]+)", text)]
        wide = [part for part in drawn if "%" in part and len(part.rstrip()) > int(mode)]
        if wide:
            return f"a bar of {len(wide[0].rstrip())} columns"
    return "passed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pythons", nargs="+", default=[sys.executable])
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument(
        "--pages", nargs="+", type=Path, default=[ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    )
    parser.add_argument("--limit", type=float, default=900, help="seconds that a block may take")
    parser.add_argument("--out", type=Path, default=Path("runs/walk"))
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    wheel = make_wheel(out)
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=8"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    before = passed_before(out / "walk.csv", commit)
    done = {tuple(row[name] for name in ("python", "mode", "page", "line")) for row in before}
    failed = 0
    with (out / "walk.csv").open("w", encoding="utf-8", newline="") as table:
        writer = csv.DictWriter(table, FIELDS)
        writer.writeheader()
        writer.writerows(before)
        for python in options.pythons:
            name = Path(python).name
            inside = install(python, out / f"venv-{name}", wheel)
            environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
            environment["PATH"] = f"{inside.parent}{os.pathsep}{environment['PATH']}"
            for mode in options.modes:
                for page, line, language, code in blocks(options.pages):
                    if (name, mode, page, str(line)) in done:
                        continue
                    folder = out / "work" / f"{name}-{mode}-{page}-{line}"
                    command = prepared(folder, language, code, inside)
                    started = time.monotonic()
                    if mode == "piped":
                        rc, text = run_piped(command, folder, environment, options.limit)
                    else:
                        plain = {"NO_COLOR": "1"} if mode == "plain" else {}
                        columns = 80 if mode == "plain" else int(mode)
                        rc, text = run_in_tmux(command, folder, environment | plain, options.limit, columns)
                    seconds, result = time.monotonic() - started, verdict(rc, text, mode, language)
                    (out / f"{folder.name}.txt").write_text(text, encoding="utf-8")
                    shutil.rmtree(folder, ignore_errors=True)
                    row = {"commit": commit, "python": name, "mode": mode, "page": page, "line": line}
                    writer.writerow(row | {"seconds": f"{seconds:.1f}", "result": result})
                    table.flush()
                    failed += not is_passed(result)
                    print(f"{name} {mode:>5} {page} line {line}: {seconds:.1f} s, {result}", flush=True)
    print(f"{failed} blocks failed" if failed else "every block passed")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
