"""Reading videos into states and asking states, as methods of the model.

    state = model.read_video("film.mp4", processor)
    model.answer(state, "What is shown?", processor)

The pipeline's `read` and `ask` are these methods with the pipeline's processor and settings.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationMixin

from .answering_batches import answer_together
from .answering_familiarity import Unfamiliar, asked_questions
from .configuration_video_ma2mba import VideoMa2mbaConfig
from .reading_prompt import read_prompt
from .reading_resumable import UNFINISHED, read_resumably, read_shared_resumably
from .reading_together import read_together
from .stack_protocols import Processor, Reader, VideoModel
from .stack_weights import execution_device
from .state_identity import continues, identity_facts, record_source, refuse_other, source_facts
from .state_video import VideoState

VIDEO_SETTINGS = ("fps", "num_frames", "start", "end", "max_frames", "subtitles", "subtitle_tokens")


class VideoQuestionsMixin(GenerationMixin):
    """Gives `VideoMa2mbaForConditionalGeneration` its `read`, `read_video`, `check_state` and `answer`."""

    config: VideoMa2mbaConfig
    model: VideoModel

    def read(
        self,
        input_ids: Tensor,
        videos: Iterable[Iterable[Any]] = (),
        state: VideoState | None = None,
        on_frames: Callable[[int], None] | None = None,
    ) -> VideoState:
        """Read a prompt of any length in memory that does not grow with it; see `read_prompt`."""
        with _current_device(self):
            return read_prompt(self.model, input_ids, videos, state, on_frames)

    def read_together(self, prefix: Tensor, videos: Sequence[Iterable[Any]]) -> list[VideoState | Exception]:
        """Read several videos in one batch, each into a state of its own; see `read_together`."""
        with _current_device(self):
            return read_together(self.model, prefix, videos)

    def read_video(
        self,
        video: Any,
        processor: Processor,
        *,
        state: VideoState | None = None,
        on_frames: Callable[[int, int | None], None] | None = None,
        partial: str | os.PathLike[str] | None = None,
        save_seconds: float = 30.0,
        group: Any = None,
        stop: Callable[[], bool] | None = None,
        **video_settings: Any,
    ) -> VideoState:
        """Read a video into a state of constant size, to be asked, kept, copied and continued.

        Args:
            video: a path, URL, bytes, list of pictures, array: whatever the processor's `open_video` takes.
            processor: the model's `VideoMa2mbaProcessor`.
            state: continue this state with more frames (it stays as it is) instead of beginning a conversation.
            on_frames: called with the number of frames read and the number expected.
            partial: file to keep the unfinished state in, every `save_seconds`. The same call continues from it after
                an interruption; remove it when the result is safe. See `read_resumably`.
            group: a process group of `torch.distributed` (`torch.distributed.group.WORLD`: all processes) that shares
                the video out. All its ranks make the same call and get the same state, which is the one that a single
                process would reach; `partial` is the first rank's. See `read_shared`.
            stop: asked between chunks of frames; true ends the reading there. The state holds what was read so far and
                can be asked; the same call with `partial`, which it needs, goes on to the same bits.
            video_settings: `fps`, `num_frames`, `start`, `end`, `max_frames`; `subtitles` ("auto", a file, or cues)
                and `subtitle_tokens`, see the processor's `timed`.

        Returns:
            The state. Its metadata hold what it belongs to ("model", "revision", "model_config", "weights",
            "processor", "dtype", "package_version") and what it has seen ("video", "fps", "frames", "seconds", and for
            each video "sources"); after a `stop`, "unfinished": the frames of the video that were read.

        Raises:
            ValueError: `state` or `partial` belongs to another model, processor or reading; what differs is named.
                `stop` without `partial`, or with several processes.
        """
        unknown = video_settings.keys() - set(VIDEO_SETTINGS)
        if unknown:
            raise ValueError(f"unknown settings for reading a video: {sorted(unknown)}; use {list(VIDEO_SETTINGS)}")
        shared = group is not None and torch.distributed.get_world_size(group) > 1
        if stop is not None and (partial is None or shared):
            raise ValueError("stop needs partial, the file to go on from, and is for one process: leave group out")
        chosen = {name: value for name, value in video_settings.items() if value is not None}
        messages = [{"role": "user", "content": [{"type": "video", "video": video}]}]
        prefix, _, (reader,) = processor.streaming_prompt(messages, add_generation_prompt=False, **chosen)
        identity = identity_facts(self, processor)
        before = {} if state is None else dict(state.metadata)
        if state is not None:
            self.check_state(state, processor)
            prefix = prefix[:, -1:]
        source = source_facts(reader)
        if continues(before, source):
            reader.after = float(before["frame_time"])
        if (
            shared and on_frames is None
        ):  # all ranks look at the file first: whoever cannot would keep the others waiting
            on_frames = _nobody_asks
        report = report_frames([reader], on_frames)
        try:
            request = {name: value for name, value in source.items() if name not in ("name", "sha256")}
            request |= {"video": source["sha256"] or source["name"]}
            request |= {name: identity[name] for name in ("model_config", "weights", "processor", "dtype")}
            keeping: dict[str, Any] = {"partial": partial, "request": request, "save_seconds": save_seconds}
            if shared:
                with _current_device(self):
                    found = read_shared_resumably(self, prefix, reader, state, group, on_frames=report, **keeping)
            elif partial is None:
                found = self.read(prefix, [reader.chunks(self.config.read_chunk_frames)], state, report)
            else:
                found = read_resumably(self, prefix, reader, state, on_frames=report, stop=stop, **keeping)
        finally:
            reader.close()
        found.metadata |= identity
        stopped = found.metadata.pop(UNFINISHED, None)
        if stop is None:  # of the state that was continued
            stopped = None
        if stopped is not None:  # what was seen ends there
            begin, end = source["start"] or 0.0, min(source["end"] or reader.duration, reader.duration)
            share = min(int(stopped) / max(reader.expected_frames, 1), 1.0)
            source |= {"end": round(begin + share * (end - begin), 6)}
        record_source(found.metadata, before, source, reader.duration)
        if stopped is not None:
            found.metadata[UNFINISHED] = stopped
        return found

    def check_state(self, state: VideoState, processor: Processor) -> None:
        """ValueError naming what differs, unless this model and `processor` made the state."""
        refuse_other(state.metadata, identity_facts(self, processor))
        state.check_fits(self.config.text_config)

    def unfamiliar(self, state: VideoState, question: str | list[dict[str, Any]]) -> Unfamiliar | None:
        """What of a state's video, and of a question or conversation about it, is unlike what the model was trained
        on; None where its checkpoint does not say what that was."""
        known = self.model.familiarity
        return None if known is None else known.unfamiliar(state.metadata, asked_questions(question))

    def answer(
        self, state: VideoState, question: Any, processor: Processor, times: bool = False, **settings: Any
    ) -> Any:
        """Answer a question from a state, which stays as it is; or several questions in one batch.

        Args:
            state: from `read_video`.
            question: the question; the whole conversation that follows the video as messages (question, answer,
                question, ..., the last one being answered); or a list of questions or conversations.
            processor: the model's `VideoMa2mbaProcessor`.
            times: answers are `{"answer", "start", "end"}`, the span in seconds of the video; where a model answers
                without one, both are None and "reason" says so.
            settings: `return_scores` and settings of `generate()`.

        Returns:
            The answer as text. With `return_scores`, `{"answer": ..., "score": ...}`; with `num_return_sequences`, a
            list. For a list of questions, a list of these.

        Raises:
            ValueError: the state belongs to another model or processor; what differs is named. Or the question is
                empty; or times are wanted of a model that never learnt them.
        """
        self.check_state(state, processor)
        several = isinstance(question, list | tuple) and not (question and isinstance(question[0], dict))
        ids = [question_ids(processor, asked, times) for asked in (question if several else [question])]
        if not ids:
            return []
        with _current_device(self), torch.no_grad():
            rows = answer_together(self, processor.tokenizer, [state] * len(ids), ids, **settings)
        if times:
            rows = [[answer | processor.timed_answer(answer["answer"]) for answer in row] for row in rows]
        elif not settings.get("return_scores"):
            rows = [[answer["answer"] for answer in row] for row in rows]
        answers = [row[0] if len(row) == 1 else row for row in rows]
        return answers if several else answers[0]


def question_ids(processor: Processor, question: str | list[dict[str, Any]], times: bool = False) -> Tensor:
    """(1, Q) token ids by which a question, or a conversation, follows a video that was read before.

    Args:
        times: ask for the span that shows the answer.

    Raises:
        ValueError: the question is empty; times are wanted of a model that never learnt them.
    """
    if isinstance(question, str) and not question.strip():
        times = False  # an empty question stays one
    question = processor.times_question(question, times)
    messages = [{"role": "user", "content": question.strip()}] if isinstance(question, str) else list(question)
    content = messages[0]["content"]
    content = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    return _split_prompt(processor, [{**messages[0], "content": [_blank(), *content]}, *messages[1:]])[1]


def video_prefix(processor: Processor) -> Tensor:
    """(1, S) token ids of a conversation up to a video, which is the last of them: ONE token for all its frames."""
    return _split_prompt(processor, [{"role": "user", "content": [_blank()]}], add_generation_prompt=False)[0]


def _blank() -> dict[str, Any]:
    # The processor turns whole conversations into ids; a blank picture stands for a video that comes another way.
    return {"type": "image", "image": Image.new("RGB", (1, 1))}


def _split_prompt(processor: Processor, messages: list[dict[str, Any]], **settings: Any) -> tuple[Tensor, Tensor]:
    prefix, rest, readers = processor.streaming_prompt(messages, **settings)
    for reader in readers:
        reader.close()
    return prefix, rest


def chunks_of_all(readers: Sequence[Reader], size: int) -> list[Iterable[Any]]:
    """Frame chunks of several readers that are read at once, and share the decoding threads."""
    threads = max(1, torch.get_num_threads() // max(1, len(readers)))
    return [reader.chunks(size, threads=threads) for reader in readers]


def _nobody_asks(read: int, expected: int | None) -> None:
    pass


def report_frames(
    readers: list[Reader], on_frames: Callable[[int, int | None], None] | None
) -> Callable[[int], None] | None:
    """`on_frames` with the number of frames expected filled in."""
    if on_frames is None:
        return None
    expected = sum(reader.expected_frames for reader in readers)
    return lambda read: on_frames(read, expected)


def _current_device(model: Any) -> AbstractContextManager[object]:
    """Compiled kernels start on the current CUDA device, which is not always the model's."""
    device = execution_device(model.get_input_embeddings())
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
