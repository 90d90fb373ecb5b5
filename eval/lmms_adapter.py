"""The model in lmms-eval: `python -m lmms_eval --model video_ma2mba --model_args pretrained=…,fps=1 --tasks …`.

Each video is read once for all its questions, over all tasks and all ranks of a run; every question is answered from
a copy of that state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger

from ..modeling_video_ma2mba.parallel_dims import ParallelDims
from .answer_log import AnswerLog
from .answering import Answerer
from .lmms_ranks import answer_together
from .lmms_requests import Job, Prompt, is_padding, job_of, prompt_of_messages, prompt_of_visuals
from .ranks import SHARE_FRAMES, everyone
from .state_store import Reading, StateStore

_DEFAULT_BYTES = 10.0  # GB


class VideoMa2mbaSimple(lmms):
    """For tasks of the simple interface (and, by its subclass, of chat); arguments are those of `--model_args`.

    Args:
        pretrained: folder or Hub id; `bundled` is the checkpoint of this package.
        device, dtype: `auto`, `cpu`, `cuda`, `cuda:N`; `auto`, `fp32`, `fp16`, `bf16`.
        batch_size: questions about one video that are answered together.
        fps, num_frames, max_frames, folder_fps: which frames are read; see `Reading`.
        subtitles: `auto` reads those of a video between its frames: a text track, or a file beside it or in a folder
            `subtitle(s)` beside it or beside its folder, where the tasks keep them.
        stop_repeat_ngram: end an answer when its latest so many tokens occurred before; 0: never.
        cache_states: states kept in memory. cache_dir: folder for states on disk, limited to `cache_gb`.
        answers: file (JSON lines) for every answer as it comes; answers that it holds to the same questions about the
            same content are not given again.
        broken: `stop` at a video that cannot be read, or `skip` it: its answers are empty.
        share_frames: films of so many frames are read by all processes of a run together; 0: none.
        trust_remote_code: run code that comes with the checkpoint.
        pipe: a loaded pipeline, instead of `pretrained` (from Python).

    Raises:
        ValueError: a setting is out of range; unknown settings are a TypeError.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "bundled",
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        fps: float = 1.0,
        num_frames: int | None = None,
        max_frames: int | None = None,
        folder_fps: float = 3.0,
        subtitles: str | None = None,
        stop_repeat_ngram: int = 5,
        cache_states: int = 8,
        cache_dir: str | None = None,
        cache_gb: float = _DEFAULT_BYTES,
        answers: str | None = None,
        broken: str = "stop",
        share_frames: int | str = SHARE_FRAMES,
        trust_remote_code: bool = False,
        pipe: Any = None,
    ) -> None:
        super().__init__()
        if broken not in ("stop", "skip"):
            raise ValueError(f"broken={broken}: must be stop or skip")
        dims = ParallelDims.of_run()
        self._rank, self._world_size = dims.rank, dims.world
        self.batch_size = int(batch_size) if str(batch_size).isdecimal() and int(batch_size) > 0 else 1
        reading = Reading(fps, num_frames, max_frames, folder_fps, subtitles)
        self.pipe = pipe or self._load(pretrained, device, dtype, trust_remote_code)
        folder = None if cache_dir is None else Path(cache_dir).expanduser()
        self.store = StateStore(self.pipe, reading, cache_states, folder, int(cache_gb * 1e9))
        self.log = AnswerLog(None if answers is None else Path(answers).expanduser(), self._rank)
        self.summary, self.replaced = "nothing was asked", ""
        answering = (stop_repeat_ngram, self.batch_size, broken == "skip", int(share_frames))
        self.answerer = Answerer(self.pipe, self.store, self.log, *answering)

    def _load(self, pretrained: str, device: str | None, dtype: str, trust_remote_code: bool) -> Any:
        from ..loading import join_ranks, load_pipeline

        wanted = join_ranks(device or "auto")
        source = None if pretrained == "bundled" else pretrained
        return load_pipeline(source, device=wanted, dtype=dtype, trust_remote_code=trust_remote_code)

    def settings(self) -> dict[str, Any]:
        """What decides an answer: the model and how it looks at videos."""
        identity = self.pipe.identity()
        facts = {name: identity[name] for name in ("weights", "model_config", "processor", "dtype")}
        return {**facts, **self.store.reading.facts, "stop_repeat_ngram": self.answerer.stop_ngram}

    @property
    def device(self) -> Any:
        """Where the language model runs (`torch.device`); lmms-eval asks for it."""
        return self.pipe.model.device

    def clean(self) -> None:
        """Called by the harness when nothing is left to answer: a judge may need the memory."""
        self.pipe = self.store = self.answerer = None
        super().clean()

    def generate_until(self, requests: list[Any]) -> list[GenerationResult]:
        """Answers in the order of the requests."""
        return self._answers([(job_of(request), is_padding(request)) for request in requests])

    def generate_until_multi_round(self, requests: list[Any]) -> list[list[str]]:
        """For each request the answers of its rounds; each round may show other media."""
        answers = [answer_rounds(self.answerer, job_of(request), self._document) for request in requests]
        self._drop_stale_answers()
        self._log_summary()
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Refused: tasks of this kind ask for likelihoods, and lmms-eval 0.7.3 cannot score them."""
        raise NotImplementedError("likelihoods of given answers are not computed: name a task that generates answers")

    def _answers(self, asked: list[tuple[Job, bool]]) -> list[GenerationResult]:
        seen: dict[str, int] = {}
        keys = []
        for job, padding in asked:
            if job.generation["do_sample"] and not padding:
                plain = job.key(None)
                job.repeat = seen[plain] = seen.get(plain, -1) + 1
            keys.append(self.answerer.key(job, job.prompt(self._document(job))))
            self.log.expect(job.place, keys[-1])
        jobs = dict(zip(keys, (job for job, _ in asked), strict=True))
        rows = answer_together(self.answerer, jobs, self._document, self._rank, self._world_size)
        self._drop_stale_answers()
        self._log_summary()
        counted = [TokenCounts(rows[key]["input_tokens"], rows[key]["output_tokens"]) for key in keys]
        return [GenerationResult(rows[key]["answer"], count) for key, count in zip(keys, counted, strict=True)]

    def _document(self, job: Job) -> Any:
        return self.task_dict[job.task][job.split][job.doc_id]

    def _drop_stale_answers(self) -> None:
        """Drop recorded answers in whose place another question, or another video, stands by now."""
        import torch.distributed as dist

        together = self._world_size > 1 and dist.is_available() and dist.is_initialized()
        if together:
            for expected in everyone(self.log.expected):
                for place, keys in expected.items():
                    self.log.expected.setdefault(place, set()).update(keys)
        if self._rank == 0 or not together:
            dropped = self.log.drop_others(only_own=self._world_size > 1 and not together)
            if dropped:
                self.replaced = f"{dropped} answers there were to other questions, about other videos, or errors, and "
                self.replaced += "are replaced"
        if together:
            dist.barrier()

    def _log_summary(self) -> None:
        """What reading each video once has saved, to the log and into the harness's results."""
        tally = self.store.tally
        disk = f", {tally.from_disk} states being on disk" if tally.from_disk else ""
        self.summary = (
            f"{self.answerer.answered} answers given, {self.answerer.reused} known from an earlier run; "
            f"{tally.videos_read} videos read ({tally.frames_read} frames, {tally.seconds_reading:.1f} s); "
            f"{self.answerer.spared} answers needed no reading of their own{disk}, which saved "
            f"{self.answerer.seconds_saved:.1f} s" + (f"; {self.replaced}" if self.replaced else "")
        )
        logger.info(f"video_ma2mba: {self.summary}")
        log_metrics(
            total_gen_tokens=self.answerer.output_tokens,
            total_elapsed_time=self.answerer.seconds_answering,
            avg_speed=self.answerer.output_tokens / max(self.answerer.seconds_answering, 1e-9),
            additional_metrics={
                "videos_read": tally.videos_read,
                "frames_read": tally.frames_read,
                "seconds_reading": round(tally.seconds_reading, 3),
                "answers_without_reading": self.answerer.spared,
                "seconds_of_reading_saved": round(self.answerer.seconds_saved, 3),
                "rank": self._rank,
            },
        )


class VideoMa2mbaChat(VideoMa2mbaSimple):
    """For tasks of the chat interface."""

    is_simple = False


def answer_rounds(answerer: Answerer, job: Job, document: Callable[[Job], Any]) -> list[str]:
    """Answers of all rounds. Each round is a question of its own: what the task wants remembered, it says again."""
    doc = document(job)
    outputs: list[str] = []
    told: Any = None
    prompt: Prompt | None = job.prompt(doc)
    while prompt is not None:
        this = replace(job, round=len(outputs))
        key = f"{answerer.key(job, prompt)}-{len(outputs)}"
        answerer.log.expect(this.place, key)
        if answerer.log.holds(key):
            answerer.reused += 1
        else:
            answerer.answer([(key, this, prompt)])
        outputs.append(answerer.log.answers[key]["answer"])
        prompt, told = _next_round(job, doc, outputs, told)
    return outputs


def _next_round(job: Job, doc: Any, outputs: list[str], told: Any) -> tuple[Prompt | None, Any]:
    """The next round's prompt (None: there is none), and what the task wants to be told then."""
    progress = {"round_idx": len(outputs), "previous_output": list(outputs), "previous_round_info": told}
    if job.is_chat:
        found = job.source(doc, **progress)
        if not isinstance(found, tuple) or len(found) != 4:
            return None, None
        messages, is_over, _, told = found
        return (None if is_over else prompt_of_messages(messages)), told
    visuals, text, is_over, _, told = job.rounds(doc, **progress)
    return (None if is_over else prompt_of_visuals(visuals, text)), told
