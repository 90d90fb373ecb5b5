"""A pipeline whose process is killed again and again: python killed_pipeline.py FOLDER MODEL OVERRIDE...

The same command is run four times, each time in a process of its own: the first is killed in the middle of a step of
stage 2 (after a checkpoint), the second while the adapters of stage 4 are being merged, the third while what stage 5
has made is measured; the fourth ends by itself. Every micro-batch is written to FOLDER/steps.txt.
"""

import functools
import gc
import os
import signal
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
from video_ma2mba.cli import main, niah  # noqa: E402
from video_ma2mba.eval import needle_report  # noqa: E402
from video_ma2mba.trainer import train_run  # noqa: E402
from video_ma2mba.trainer.video_trainer import VideoMa2mbaTrainer  # noqa: E402
from video_ma2mba.world import accuracy  # noqa: E402


def die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run(out: Path, where: str, arguments: list[str]) -> None:
    step, merge, find = VideoMa2mbaTrainer.training_step, train_run._merged, niah.niah

    def noted(trainer: VideoMa2mbaTrainer, *given):
        place, number = Path(trainer.args.output_dir).relative_to(out), trainer.state.global_step + 1
        with (out / "steps.txt").open("a") as file:
            file.write(f"{where or 'last'} {place} {number}\n")
        if (where, number) == ("step", 4) and place.name.startswith("2_"):
            die()
        return step(trainer, *given)

    VideoMa2mbaTrainer.training_step = noted
    accuracy._BLOCK = 4
    needle_report.draw_heatmap = lambda *_: None  # costs more than all the rest of a measurement
    train_run._merged = lambda *given: die() if where == "merge" else merge(*given)

    @functools.wraps(find)  # its options are looked at
    def measured(**given) -> None:
        die() if where == "measure" and "5_" in str(given["out"]) else find(**given)

    niah.niah = measured
    try:
        main.app(["pipeline", "--config", "longvila", "--smoke", f"output_dir={out}", *arguments])
    except SystemExit as ended:
        os._exit(int(ended.code or 0))


if __name__ == "__main__":
    gc.freeze()  # what importing left is never garbage, nor worth copying into every process
    for place in ("step", "merge", "measure", ""):
        child = os.fork()
        if child == 0:
            run(Path(sys.argv[1]), place, sys.argv[2:])
            os._exit(1)  # it should not have come this far
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed if place else status == 0, f"{place or 'the last'}: {status}"
