"""Videos per hour in lmms-eval: each video read once for all its questions, against reading it for every question.

    OMP_NUM_THREADS=1 python benchmarks/eval_throughput.py --out benchmarks/results/eval_throughput.csv

Both adapters answer the same questions about the same rendered videos with the bundled checkpoint, in one process and
in turn; the answers are compared. CPU seconds hold on a busy machine, too (that of the results was). ActivityNet-QA
has 10 questions a video, Video-MME 3.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch
from result_tables import hardware, write_rows

from video_ma2mba.eval.answer_log import AnswerLog
from video_ma2mba.eval.answering import Answerer
from video_ma2mba.eval.harness import OWN_TASKS, evaluate_tasks, prepare_environment, quiet_harness
from video_ma2mba.eval.lmms_adapter import VideoMa2mbaChat
from video_ma2mba.eval.lmms_requests import job_of
from video_ma2mba.eval.state_store import StateStore
from video_ma2mba.loading import load_pipeline

FIELDS = ("adapter", "questions_per_video", "videos", "frames_per_video", "questions", "seconds", "videos_per_hour")
FIELDS += ("cpu_seconds", "same_answers", "hardware", "threads", "date")


class PlainAdapter(VideoMa2mbaChat):
    """Reads the video of every question, one question at a time, as adapters in the harness do."""

    def generate_until(self, requests: list) -> list[str]:
        answers = []
        for request in requests:
            job = job_of(request)
            store = StateStore(self.pipe, self.store.reading, keep=1)
            answerer = Answerer(self.pipe, store, AnswerLog(None), batch=1)
            answerer.answer([("only", job, job.prompt(self._document(job)))])
            answers.append(answerer.log.answers["only"]["answer"])
        return answers


def task_folder(root: Path, frames: int, videos: int, questions: int) -> Path:
    """A copy of the task `rendered_world` with another plan."""
    folder = root / f"{frames}_{videos}_{questions}"
    shutil.copytree(OWN_TASKS / "rendered_world", folder)
    plan = {"frames": frames, "videos": videos, "questions": questions, "seed": 0}
    (folder / "plan.jsonl").write_text(json.dumps(plan) + "\n", encoding="utf-8")
    return folder


def measure(adapter: VideoMa2mbaChat, folder: Path) -> tuple[float, float, list[str]]:
    """Seconds and CPU seconds of reading and answering (not of loading tasks and models), and the answers."""
    from lmms_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False, model_name="video_ma2mba")
    spent = []
    answer = adapter.generate_until

    def timed(requests: list) -> list:
        for request in requests:
            request.args[1](adapter.task_dict[request.args[4]][request.args[5]][request.args[3]])  # renders the video
        began, cpu = time.perf_counter(), time.process_time()
        found = answer(requests)
        spent.append((time.perf_counter() - began, time.process_time() - cpu))
        return found

    adapter.generate_until = timed
    results = evaluate_tasks(adapter, ["rendered_world"], manager)
    ((seconds, cpu_seconds),) = spent
    return seconds, cpu_seconds, [sample["filtered_resps"][0] for sample in results["samples"]["rendered_world"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/eval_throughput.csv"))
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--videos", type=int, default=4)
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 3, 10])
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        prepare_environment()
        quiet_harness()
        for count in given.questions:
            folder = task_folder(Path(scratch), given.frames, given.videos, count)
            answers = {}
            for name, kind in (("read once", VideoMa2mbaChat), ("read for every question", PlainAdapter)):
                pipe = load_pipeline(None, device="cpu")
                pipe.ask(pipe.read(torch.zeros(32, 64, 64, 3, dtype=torch.uint8)), "What?", max_new_tokens=2)  # warm
                seconds, cpu, answers[name] = measure(kind(pipe=pipe), folder)
                facts = (name, count, given.videos, given.frames, len(answers[name]), round(seconds, 2))
                facts += (round(3600 * given.videos / seconds, 1), round(cpu, 2))
                rows.append(dict(zip(FIELDS, facts, strict=False)))
                print(rows[-1], flush=True)
            same = answers["read once"] == answers["read for every question"]
            for row in rows[-2:]:
                row |= {
                    "same_answers": same,
                    "hardware": hardware(),
                    "date": datetime.date.today(),
                }
                row |= {"threads": torch.get_num_threads()}
    write_rows(given.out, rows, FIELDS)


if __name__ == "__main__":
    main()
