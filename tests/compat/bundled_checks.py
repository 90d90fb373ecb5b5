"""What a user does first, with the bundled checkpoint and right answers, on whatever versions are installed.

    python tests/compat/bundled_checks.py [NAME...]

Prints a line a check: `name: PASS`, `FAIL (reason)` or `SKIP (reason)`; the exit status says whether one failed. Right
answers are those of the example clips' `questions.jsonl`. See `environments.py`.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

CLIP = "000000.mp4"


class NotInstalledError(Exception):
    """The optional packages of a check are not there."""


def expect(found: object, wanted: object) -> None:
    if found != wanted:
        raise AssertionError(f"{found!r} instead of {wanted!r}")


def questions() -> list[dict]:
    """Questions about one clip, with their answers."""
    from video_ma2mba import EXAMPLE_VIDEOS

    lines = map(json.loads, (EXAMPLE_VIDEOS / "questions.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["video"] == CLIP]


def clip() -> str:
    from video_ma2mba import EXAMPLE_VIDEOS

    return str(EXAMPLE_VIDEOS / CLIP)


def command(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "video_ma2mba", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return done.stdout


def ask() -> None:
    asked = questions()[:2]
    said = command("ask", clip(), *(line["question"] for line in asked), "--json")
    expect([json.loads(line)["answer"] for line in said.splitlines()], [line["answer"] for line in asked])


def pipeline() -> None:
    import transformers

    import video_ma2mba

    pipe = transformers.pipeline(
        "video-question-answering", model=str(video_ma2mba.BUNDLED_CHECKPOINT), trust_remote_code=True
    )
    for line in questions():
        expect(pipe(video=clip(), question=line["question"])[0]["answer"], line["answer"])


def remote_code() -> None:
    """In a process that cannot import the package, with the folder's own code."""
    from video_ma2mba import BUNDLED_CHECKPOINT
    from video_ma2mba.hub_cards.preflight import ask_remote_code

    expect(bool(ask_remote_code(BUNDLED_CHECKPOINT).strip()), True)


def training_step() -> None:
    if find_spec("trl") is None:
        raise NotInstalledError("trl")
    from video_ma2mba import EXAMPLE_VIDEOS

    with tempfile.TemporaryDirectory() as folder:
        rows = EXAMPLE_VIDEOS / "questions.jsonl"
        out = str(Path(folder, "run"))
        settings = ("model=bundled", f"train_data={rows}", f"output_dir={out}", "max_steps=1")
        command("train", "--config", "lora", *settings)
        expect(Path(out, "merged", "config.json").is_file(), True)


def lmms_eval() -> None:
    if find_spec("lmms_eval") is None:
        raise NotInstalledError("lmms-eval")
    with tempfile.TemporaryDirectory() as folder:
        command("eval", "--tasks", "rendered_world", "--limit", "4", "--out", folder)
        answers = [json.loads(line) for line in Path(folder, "answers.jsonl").read_text(encoding="utf-8").splitlines()]
        expect(len(answers), 4)


CHECKS: dict[str, Callable[[], None]] = {
    "ask, right answers": ask,
    "pipeline, right answers": pipeline,
    "remote code, bundled": remote_code,
    "training by a recipe": training_step,
    "lmms-eval": lmms_eval,
}


def main() -> int:
    failed = 0
    for name in sys.argv[1:] or CHECKS:
        began = time.monotonic()
        try:
            CHECKS[name]()
            said = "PASS"
        except NotInstalledError as error:
            said = f"SKIP ({error} is not installed)"
        except Exception as error:
            failed += 1
            said = f"FAIL ({' '.join(str(error).split()) or type(error).__name__:.300})"
        print(f"{name}: {said} [{time.monotonic() - began:.1f} s]", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
