"""The work of `video-ma2mba batch`: some videos read at once, their questions answered together, results as lines."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from video_ma2mba.files.remote_files import exists, is_remote, local_copy, put_file, version_of

from .batch_queue import Item, Source, by_video
from .errors import is_expected, one_line

Tell = Callable[[str, int, int], None]
_IDENTITY = ("model_config", "weights", "processor", "dtype")


def path_of(video: str, folder: str | None) -> str:
    """Where a video of the queue is: relative paths start from `folder`."""
    from video_ma2mba.processing.video_source_names import is_address, local_path

    return video if folder is None or is_address(video) else str(folder / local_path(video))


def note_contents(items: Iterable[Item], folder: str | None) -> None:
    """Give each item the digest of what its video holds now."""
    from video_ma2mba.eval.media import Medium

    known: dict[str, str | None] = {}
    for item in items:
        if item.error is None and item.shown is None:
            if item.video not in known:
                path = path_of(item.video, folder)
                try:
                    if is_remote(path):
                        known[item.video] = hashlib.sha256(version_of(path).encode()).hexdigest()[:16]
                    else:
                        known[item.video] = Medium(path).digest()[:16]
                except (ImportError, OSError, ValueError):  # what is wrong with it is told when it is read
                    known[item.video] = None
            item.shown = known[item.video]


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Items that are worked on together: whole videos, until there are `size` questions."""
    group: list[Item] = []
    for same in by_video(items):
        group += same
        if sum(max(len(item.questions), 1) for item in group) >= size:
            yield group
            group = []
    if group:
        yield group


@dataclass
class Worker:
    """Reads and answers.

    Args:
        pipe: the question-answering pipeline.
        frames: `fps`, `num_frames`, `start`, `end` for all videos; an item's own `start` and `end` come first.
        folder: where relative paths of videos start.
        size: questions that are answered together.
        max_new_tokens: longest answer.
        subtitles: of all videos, "auto", "off" or a file; an item's own come first.
        times: answers come with the span of the video that shows them.
        states: folder, or address that fsspec knows, in which the states of videos are kept, and found again.
    """

    pipe: Any
    frames: dict[str, Any]
    folder: str | None = None
    size: int = 8
    max_new_tokens: int = 64
    states: str | None = None
    subtitles: str = "off"
    times: bool = False
    _copies: ExitStack = field(default_factory=ExitStack, init=False)

    def settings(self) -> dict[str, Any]:
        """What all results of a file share. ValueError: frames that make no sense, or times that the model never
        learnt, once and not for every video."""
        self.pipe.processor.video_processor.sampling(**self.frames)
        self.pipe.processor.times_question("", self.times)
        identity = self.pipe.identity()
        shared = {name: identity[name] for name in _IDENTITY} | self.frames | {"max_new_tokens": self.max_new_tokens}
        told = {"subtitles": self.subtitles} if self.subtitles != "off" else {}
        return shared | told | ({"times": True} if self.times else {})

    def answered(self, group: list[Item], tell: Tell | None = None) -> Iterator[dict[str, Any]]:
        """The results of some items, whatever goes wrong with them.

        Args:
            tell: called with what is being read, and the frames that are read and will be.
        """
        with self._copies:
            states, facts = self._read([item for item in group if item.error is None], tell)
        asked: list[tuple[Item, str]] = []
        for item in group:
            if item.error is not None:
                yield item.result(error=item.error)
            elif isinstance(states[item.source], Exception):
                yield item.result(error=error_text(states[item.source]), **facts[item.source])
            elif not item.questions:
                yield item.result(**facts[item.source])
            else:
                asked += [(item, question) for question in item.questions]
        answers: dict[int, list[Any]] = {}
        for first in range(0, len(asked), self.size):
            part = asked[first : first + self.size]
            for (item, _), answer in zip(part, self._answers(part, states), strict=True):
                given = answers.setdefault(item.line, [])
                given.append(answer)
                if len(given) < len(item.questions):
                    continue
                wrong = next((answer for answer in given if isinstance(answer, Exception)), None)
                if wrong is not None:
                    found = {"error": error_text(wrong)}
                else:
                    told = [self._found(answer) for answer in given]
                    found = told[0]
                    if item.several:
                        found = {f"{name}s": [each[name] for each in told] for name in found}
                    found |= self._unfamiliar(states[item.source], item)
                yield item.result(**found, **facts[item.source])

    def _found(self, answer: str) -> dict[str, Any]:
        """What a result says of an answer: with times also its span, None where it ends in none."""
        if not self.times:
            return {"answer": answer}
        found = self.pipe.processor.timed_answer(answer)
        span = None if found["start"] is None else [found["start"], found["end"]]
        return {"answer": found["answer"], "span": span}

    def _unfamiliar(self, state: Any, item: Item) -> dict[str, Any]:
        """The field that says what of video and questions is unlike training; none where that is unknown."""
        found = [self.pipe.model.unfamiliar(state, question) for question in item.questions]
        told = [each.to_dict() for each in found if each is not None]
        if not told:
            return {}
        strange = [each["question"] for each in told]
        return {"unfamiliar": told[0] | ({"question": strange} if item.several else {})}

    def _read(self, items: list[Item], tell: Tell | None) -> tuple[dict[Source, Any], dict[Source, dict]]:
        """For each video its state, or what went wrong; and frames read and warnings, for the results."""
        from video_ma2mba.modeling_video_ma2mba.answering_questions import chunks_of_all, video_prefix

        model, processor = self.pipe.model, self.pipe.processor
        prefix, size = video_prefix(processor), model.config.read_chunk_frames
        states: dict[Source, Any] = {}
        places: dict[Source, str] = {}
        readers: dict[Source, Any] = {}
        for item in sorted(items, key=lambda item: str(item.source)):
            if item.source in states or item.source in readers:
                continue
            try:
                if self.states is not None:
                    places[item.source] = self._state_place(item)
                    if (kept := self._kept_state(places[item.source])) is not None:
                        states[item.source] = kept
                        continue
                readers[item.source] = self._open(item)
            except Exception as error:
                states[item.source] = error
        try:
            opened = list(readers)
            chunks = chunks_of_all(list(readers.values()), size)
            try:
                found = model.read_together(prefix, _counted(chunks, list(readers.values()), tell))
            except Exception:  # too much for the memory, say: one by one may do
                found = [_result_or_error(lambda s=s: model.read(prefix, [readers[s].chunks(size)])) for s in opened]
            states |= dict(zip(opened, found, strict=True))
            for source in opened:
                if self.states is not None and not isinstance(states[source], Exception):
                    states[source] = _result_or_error(
                        lambda s=source: self._keep_state(states[s], readers[s], places[s])
                    )
        finally:
            for reader in readers.values():
                reader.close()
        facts: dict[Source, dict] = {source: {} for source in states}
        for source, state in states.items():
            if not isinstance(state, Exception):
                facts[source]["frames"] = int(state.metadata["frames"])
                if self.states is not None:
                    facts[source]["state"] = places[source]
            if source in readers and readers[source].warnings:
                facts[source]["warnings"] = readers[source].warnings
        return states, facts

    def _chosen(self, item: Item) -> dict[str, Any]:
        own = {name: value for name in ("start", "end") if (value := getattr(item, name)) is not None}
        return {**self.frames, **own}

    def _open(self, item: Item) -> Any:
        from video_ma2mba.processing.video_source_names import shown_name

        path = path_of(item.video, self.folder)
        if not is_remote(path):
            reader = self.pipe.processor.video_processor.open(path, **self._chosen(item))
        else:
            copy = self._copies.enter_context(local_copy(path))
            reader = self.pipe.processor.video_processor.open(str(copy), **self._chosen(item))
            reader.name = shown_name(path)
        return self.pipe.processor.timed(reader, self._subtitles(item))

    def _subtitles(self, item: Item) -> str:
        told = item.subtitles or self.subtitles
        return path_of(told, self.folder) if item.subtitles and told not in ("auto", "off") else told

    def _state_place(self, item: Item) -> str:
        """Where the state of a video is kept: by its content, the frames chosen, its subtitles and what reads it."""
        from video_ma2mba.processing.video_subtitles import read_subtitles

        identity = self.pipe.identity()
        facts = [item.shown or item.video, self._chosen(item), [identity[name] for name in _IDENTITY]]
        if (told := self._subtitles(item)) != "off":  # states of before there were any stay where they are
            facts.append(told if told == "auto" else read_subtitles(told).digest)
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:40]
        return f"{self.states.rstrip('/')}/{name}.state"

    def _kept_state(self, place: str) -> Any:
        from video_ma2mba import VideoState

        try:
            if is_remote(place):
                if not exists(place):
                    return None
                with local_copy(place) as copy:
                    state = VideoState.load(copy)
            elif Path(place).is_file():
                state = VideoState.load(place)
            else:
                return None
            self.pipe.check(state)
        except (OSError, ValueError):  # torn, say: the video is read again, and its state written anew
            return None
        return state

    def _keep_state(self, state: Any, reader: Any, place: str) -> Any:
        from video_ma2mba.modeling_video_ma2mba.state_identity import record_source, source_facts

        state.metadata |= self.pipe.identity()
        record_source(state.metadata, {}, source_facts(reader), reader.duration)
        if is_remote(place):
            import tempfile

            with tempfile.TemporaryDirectory() as folder:
                draft = Path(folder) / "state"
                state.save(draft)
                put_file(draft, place)
        else:
            os.makedirs(os.path.dirname(place), exist_ok=True)
            state.save(place)
        return state

    def _answers(self, part: list[tuple[Item, str]], states: dict[Source, Any]) -> list[Any]:
        """The answer to each question, or what went wrong."""
        import torch

        from video_ma2mba.modeling_video_ma2mba.answering_batches import answer_together
        from video_ma2mba.modeling_video_ma2mba.answering_questions import question_ids

        pipe = self.pipe

        def together(rows: list[tuple[Item, str]]) -> list[str]:
            ids = [question_ids(pipe.processor, question, self.times) for _, question in rows]
            with pipe.device_placement(), torch.no_grad():
                found = answer_together(
                    pipe.model,
                    pipe.processor.tokenizer,
                    [states[item.source] for item, _ in rows],
                    ids,
                    max_new_tokens=self.max_new_tokens,
                )
            return [row[0]["answer"] for row in found]

        try:
            return together(part)
        except Exception:  # one of them, or too many for the memory
            return [_result_or_error(lambda r=row: together([r])[0]) for row in part]


def _counted(chunks: list[Iterable[Any]], readers: list[Any], tell: Tell | None) -> list[Iterable[Any]]:
    """The chunks of several videos; `tell` hears of every one that is taken."""
    if tell is None or not readers:
        return chunks
    total, done = 0, 0
    for reader in readers:
        if not isinstance(expected := _result_or_error(lambda r=reader: r.expected_frames), Exception):
            total += expected
    label = readers[0].name if len(readers) == 1 else f"{len(readers)} videos"

    def counting(some: Iterable[Any]) -> Iterator[Any]:
        nonlocal done
        for chunk in some:
            yield chunk
            done += len(chunk)
            tell(label, done, total)

    tell(label, 0, total)
    return [counting(some) for some in chunks]


def _result_or_error(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except Exception as error:
        return error


def error_text(error: Exception) -> str:
    """An error as a result tells it; what nobody expected with its kind."""
    return one_line(error) if is_expected(error) else f"{type(error).__name__}: {one_line(error)}"
