"""`pipeline("video-question-answering")`: questions about videos of any length, each video read once, as a stream."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import Pipeline

from .answering_batches import answer_together
from .answering_familiarity import asked_questions
from .answering_questions import VIDEO_SETTINGS, chunks_of_all, report_frames
from .parallel_dims import process_group_exists
from .stack_weights import execution_device
from .state_identity import check_times, identity_facts
from .state_video import VideoState

TASK = "video-question-answering"
CUSTOM_PIPELINES = {
    TASK: {
        "impl": "pipeline_video_ma2mba.VideoQuestionAnsweringPipeline",
        "pt": ["AutoModelForImageTextToText"],
        "type": "multimodal",
    }
}
"""Entry of a checkpoint's `config.json` by which transformers finds this file."""

_PREPROCESS_SETTINGS = (*VIDEO_SETTINGS, "on_frames")


class VideoQuestionAnsweringPipeline(Pipeline):
    """Answers questions about videos.

    A video is a path, a URL, bytes, a list of PIL images, an array or tensor `(F, H, W, 3)`, one image, or anything
    else that the processor's `open_video` takes. Memory does not grow with its length.

        pipe("clip.mp4", "What is shown?")                          # [{"answer": "..."}]
        pipe("clip.mp4", ["What is shown?", "How many?"])           # [[{"answer": ...}], [{"answer": ...}]], read once
        pipe(["a.mp4", "b.mp4"], "What is shown?", batch_size=2)    # one list for each video
        pipe({"video": frames, "question": "..."}, return_scores=True)  # [{"answer": "...", "score": 0.93}]
        pipe(messages)                                              # a conversation with a video in it

        state = pipe.read("two_hours.mp4", fps=1)                   # keep the video's state ...
        pipe.ask(state, "What is shown?")                           # ... and ask whenever

    Settings of a call, or of the pipeline: `fps`, `num_frames`, `start`, `end`, `max_frames` choose frames;
    `subtitles` ("auto", a file or cues) and `subtitle_tokens` what is read between them; `times` adds "start" and
    "end", in seconds; `on_frames(read, expected)` is called as frames are read; `return_scores` adds the mean
    probability of the answer's tokens; `batch_size` is the number of inputs whose questions are answered together;
    everything else goes to `generate()`.
    """

    _load_processor = True
    _load_tokenizer = _load_image_processor = _load_video_processor = _load_feature_extractor = False
    # The prompt is read before generate() starts: generation settings are passed on, not prepared by the base class.
    _pipeline_calls_generate = False

    def __init__(self, model: Any, *args: Any, device: Any = None, **kwargs: Any) -> None:
        if device is not None and process_group_exists() and getattr(model, "hf_device_map", None) is None:
            # Among several processes transformers takes the model's device for the pipeline's, whatever `device` says,
            # and the model would stay on the CPU.
            model.to("cpu" if isinstance(device, int) and device < 0 else device)
        super().__init__(model, *args, device=device, **kwargs)

    def _sanitize_parameters(
        self,
        return_scores: bool | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        times: bool | None = None,
        **settings: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess = {k: settings.pop(k) for k in _PREPROCESS_SETTINGS if k in settings} | {"times": times}
        forward = {**(generate_kwargs or {}), **settings}
        if return_scores is not None:
            forward["return_scores"] = return_scores
        return (
            {k: v for k, v in preprocess.items() if v is not None},
            forward,
            {} if times is None else {"times": times},
        )

    def __call__(self, inputs: Any = None, question: Any = None, *, video: Any = None, **settings: Any) -> Any:
        """Answer; see the class for what goes in and comes out.

        Args:
            inputs: a video; a dict with "video" (or "image") and "question"; a conversation; a list of these; or a
                generator or data set of these, for which an iterator comes back.
            question: one question or a list, for inputs that are videos. With a list of videos: one question for all,
                or one (or one list of questions) for each.

        Raises:
            ValueError: an empty or missing question, and what reading a video raises.
        """
        inputs = video if inputs is None else inputs
        if inputs is None and question is None:
            raise ValueError("there is nothing to answer: give a video and a question")
        batch_size = settings.pop("batch_size", None) or self._batch_size or 1
        settings.pop("num_workers", None)
        given = self._sanitize_parameters(**settings)
        kept = (self._preprocess_params, self._forward_params, self._postprocess_params)
        parameters = [{**a, **b} for a, b in zip(kept, given, strict=True)]

        def answers(requests: Any) -> Iterator[Any]:
            for group in _groups(requests, batch_size):
                yield from self.run_single(group, *parameters)

        if _is_stream(inputs):
            return answers(_request(item, question) for item in inputs)
        if _is_batch(inputs):
            inputs = list(inputs)
            return list(answers([_request(item, q) for item, q in zip(inputs, _deal(question, inputs), strict=True)]))
        return next(answers([_request(inputs, question)]))

    def preprocess(self, group: list[dict[str, Any]], **settings: Any) -> list[dict[str, Any]]:
        """Open each request's videos (nothing is decoded yet) and tokenize its questions."""
        on_frames, times = settings.pop("on_frames", None), settings.pop("times", False)
        check_times(self.model.config, self.processor)
        prepared = []
        for request in group:
            asked = [self.processor.times_question(messages, times) for messages in request["conversations"]]
            prompts = [self.processor.streaming_prompt(m, **settings) for m in asked]
            for _, _, unused in prompts[1:]:
                _close(unused)
            prefix, _, readers = prompts[0]
            if any(not torch.equal(other, prefix) for other, _, _ in prompts):
                raise ValueError("the questions of one input must differ only after the video")
            prepared.append(
                {
                    "prefix": prefix,
                    "readers": readers,
                    "questions": [question for _, question, _ in prompts],
                    "several": request["several"],
                    "on_frames": on_frames,
                    "asked": [asked_questions(messages) for messages in request["conversations"]],
                }
            )
        return prepared

    def _forward(self, group: list[dict[str, Any]], **settings: Any) -> list[dict[str, Any]]:
        states, questions, asked = [], [], []
        for request, state in zip(group, self._read_group(group), strict=True):
            states += [state] * len(request["questions"])
            questions += request["questions"]
            asked += request["asked"]
        found = answer_together(self.model, self.processor.tokenizer, states, questions, **settings)
        known = self.model.model.familiarity
        for state, texts, row in zip(states, asked, found, strict=True) if known is not None else ():
            if unfamiliar := known.unfamiliar(state.metadata, texts):
                row[:] = [{**answer, "unfamiliar": unfamiliar.to_dict()} for answer in row]
        answers = iter(found)
        return [
            {"several": request["several"], "answers": [next(answers) for _ in request["questions"]]}
            for request in group
        ]

    def postprocess(self, group: list[dict[str, Any]], times: bool = False, **_: Any) -> list[Any]:
        """One entry for each request: the list of its answers, or such a list for each of its questions."""
        for answer in (answer for item in group if times for answers in item["answers"] for answer in answers):
            answer |= self.processor.timed_answer(answer["answer"])
        return [item["answers"] if item["several"] else item["answers"][0] for item in group]

    def read(
        self,
        video: Any,
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

        `VideoQuestionsMixin.read_video` with the pipeline's processor; what was set for the pipeline holds where
        `video_settings` (`fps`, `num_frames`, `start`, `end`, `max_frames`) say nothing else. It also tells what the
        arguments are, and what it raises.
        """
        kept = {k: v for k, v in self._preprocess_params.items() if k in (*VIDEO_SETTINGS, "on_frames")}
        given = {k: v for k, v in {**video_settings, "on_frames": on_frames}.items() if v is not None}
        keeping = {"partial": partial, "save_seconds": save_seconds, "group": group, "stop": stop}
        return self.model.read_video(video, self.processor, state=state, **keeping, **{**kept, **given})

    def append(self, state: VideoState, video: Any, **settings: Any) -> VideoState:
        """A new state that has read more frames: `read(video, state=state, ...)`."""
        return self.read(video, state=state, **settings)

    def identity(self) -> dict[str, str]:
        """What the pipeline's states belong to, as their metadata say it."""
        return identity_facts(self.model, self.processor)

    def check(self, state: VideoState) -> None:
        """ValueError naming what differs, unless this pipeline's model and processor made the state."""
        self.model.check_state(state, self.processor)

    def ask(self, state: VideoState, question: Any, **settings: Any) -> Any:
        """Answer a question, a conversation, or a list of them from a state, which stays as it is.

        `VideoQuestionsMixin.answer` with the pipeline's processor and settings; it tells what comes back.
        """
        before, given, _ = self._sanitize_parameters(**settings)
        times = {**self._preprocess_params, **before}.get("times", False)
        return self.model.answer(state, question, self.processor, times, **{**self._forward_params, **given})

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Write model and processor, which is all that `pipeline(model=save_directory)` needs."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)

    def _read_group(self, group: list[dict[str, Any]]) -> list[VideoState]:
        """A state for each request: read together where only the videos differ, else one after the other."""
        first = group[0]["prefix"]
        together = len(group) > 1 and all(
            len(request["readers"]) == 1 and request["on_frames"] is None and torch.equal(request["prefix"], first)
            for request in group
        )
        if not together:
            return [self._read(request["prefix"], request["readers"], request["on_frames"]) for request in group]
        readers = [request["readers"][0] for request in group]
        try:
            found = self.model.read_together(first, chunks_of_all(readers, self.model.config.read_chunk_frames))
        finally:
            for request in group:
                _close(request["readers"])
        for state in found:
            if isinstance(state, Exception):
                raise state
        return found

    def _read(
        self,
        prefix: Tensor,
        readers: list[Any],
        on_frames: Callable[[int, int | None], None] | None,
    ) -> VideoState:
        model = self.model
        if prefix.shape[1] == 0:  # a question without a video
            embeddings = model.get_input_embeddings()
            device, dtype = execution_device(embeddings), embeddings.weight.dtype
            return VideoState.zeros(model.config.text_config, 1, device, dtype)

        try:
            chunks = [reader.chunks(model.config.read_chunk_frames) for reader in readers]
            return model.read(prefix, chunks, None, report_frames(readers, on_frames))
        finally:
            _close(readers)


def _conversation(video: Any, question: str, kind: str = "video") -> list[dict[str, Any]]:
    content = [{"type": "text", "text": question}]
    if video is not None:
        content.insert(0, {"type": kind, kind: video})
    return [{"role": "user", "content": content}]


def _request(item: Any, question: Any) -> dict[str, Any]:
    """One input as conversations that share their video, and whether several answers are wanted."""
    if (messages := _messages(item)) is not None:
        if question is not None:
            raise ValueError("a conversation holds its question: do not pass another one")
        return {"conversations": [messages], "several": False}
    kind = "video"
    if isinstance(item, dict):
        unknown = item.keys() - {"video", "image", "question"}
        if unknown or not item:
            raise ValueError(f"an input may hold 'video' or 'image' and 'question', not {sorted(item)}")
        kind = "image" if item.get("image") is not None else "video"
        question = item.get("question", question)
        item = item.get(kind)
    if hasattr(item, "read") and not hasattr(item, "chunks"):  # an open file
        item = item.read()
        if isinstance(item, str):
            raise ValueError("the video is a file that was opened as text: open it with mode 'rb', or give its path")
    if question is None:
        raise ValueError("there is no question: pass it after the video, or as 'question' in the input")
    questions = [question] if isinstance(question, str) else list(question)
    for text in questions:
        if not isinstance(text, str) or not text.strip():
            raise ValueError("the question is empty: say what you want to know about the video")
    if not questions:
        raise ValueError("the list of questions is empty")
    conversations = [_conversation(item, text, kind) for text in questions]
    return {"conversations": conversations, "several": not isinstance(question, str)}


def _messages(item: Any) -> list[dict[str, Any]] | None:
    """The messages of a conversation (a list of role/content dicts, or transformers' `Chat`), else None."""
    messages = getattr(item, "messages", item)
    is_chat = (
        isinstance(messages, list | tuple) and messages and isinstance(messages[0], dict) and "role" in messages[0]
    )
    return list(messages) if is_chat else None


def _is_frame(item: Any) -> bool:
    return isinstance(item, Image.Image) or (isinstance(item, np.ndarray | Tensor) and item.ndim == 3)


def _is_batch(inputs: Any) -> bool:
    """Whether a list is one of inputs, rather than one conversation or one video given as its frames."""
    if not isinstance(inputs, list | tuple) or _messages(inputs) is not None:
        return False
    return not (len(inputs) > 0 and all(_is_frame(item) for item in inputs))


def _is_stream(inputs: Any) -> bool:
    """Whether inputs come one by one: a generator, an iterator or a data set of dicts."""
    if isinstance(inputs, list | tuple | dict | str | bytes | Path | np.ndarray | Tensor | Image.Image):
        return False
    if any(hasattr(inputs, name) for name in ("chunks", "messages", "read")):  # a frame reader, a Chat, an open file
        return False
    return hasattr(inputs, "__iter__") or (hasattr(inputs, "__getitem__") and hasattr(inputs, "__len__"))


def _deal(question: Any, inputs: list[Any]) -> list[Any]:
    """The question of each input: one for all, or one for each."""
    if question is None or isinstance(question, str):
        return [question] * len(inputs)
    question = list(question)
    if len(question) != len(inputs):
        raise ValueError(f"{len(question)} questions were given for {len(inputs)} inputs: give one, or one for each")
    return question


def _groups(requests: Any, size: int) -> Iterator[list[Any]]:
    group: list[Any] = []
    for request in requests:
        group.append(request)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _close(readers: list[Any]) -> None:
    for reader in readers:
        reader.close()
