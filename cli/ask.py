"""`video-ma2mba ask`: answer questions from a video, read once, or from a state file; without questions, a chat."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from video_ma2mba.loading import check_loading
from video_ma2mba.processing.video_source_names import is_address, local_path, shown_name

from .ask_words import STDIN, split_words, standard_input
from .errors import is_expected, one_line, tell_failed
from .loading import load_pipeline
from .options import (
    Device,
    Dtype,
    End,
    Fps,
    MaxNewTokens,
    Model,
    NumFrames,
    Start,
    Subtitles,
    Times,
    TrustRemoteCode,
    check_frames,
    check_video,
    chosen_frames,
)
from .terminal import echo_json, given_text, input_lines, note, printable, step, warn

_BEHIND = "video_ma2mba.questions"
_COMMANDS = "/new forgets the conversation, /save FILE keeps it with the state, /quit ends it"


class AskCommand(TyperCommand):
    """What stands behind `--` are questions."""

    def parse_args(self, ctx, args):
        if "--" in args:
            place = args.index("--")
            ctx.meta[_BEHIND] = args[place + 1 :]
            args = args[:place]
        return super().parse_args(ctx, args)


def ask(
    context: typer.Context,
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="VIDEO... [[--] QUESTION...]",
            help="Videos, images, state files, addresses, - (standard input), directories of videos or of images; "
            "then questions. Without a question, a conversation about one video.",
            show_default=False,
        ),
    ],
    model: Model = None,
    fps: Fps = None,
    num_frames: NumFrames = None,
    start: Start = None,
    end: End = None,
    subtitles: Subtitles = "off",
    times: Times = False,
    where: Annotated[
        bool, typer.Option("--where", help="Add the second of the video that speaks most for the answer.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_new_tokens: MaxNewTokens = 64,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object and line per question and video.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Answer questions about videos. Each is read once, in memory that does not grow with it.

    Questions begin with the first word that is no file or address, or behind --. A state file written by `read` needs
    no reading. Without a question, questions are read from standard input. Answers go to standard output as they are
    generated, for several videos with the video's name in front; progress and figures go to standard error. Of several
    videos, those that cannot be read stop nothing, and the exit code is 1.
    """
    check_loading(model, device, dtype, times, "video_ma2mba")
    videos, questions = split_words(words, context.meta.get(_BEHIND))
    several = len(videos) > 1
    if as_json and not questions:
        raise ValueError("--json answers questions given on the command line: add one")
    if not questions and several:
        raise ValueError(f"a conversation is about one video, and these are {len(videos)}: add a question")
    if not questions and videos == [STDIN]:
        raise ValueError("-: standard input is the video, so it has no questions: add one to the command")
    frames_wanted = chosen_frames(fps, num_frames, start, end, subtitles)
    for video in videos:
        if not several or video == STDIN:
            _check(video, questions, frames_wanted, where)
    if several:
        check_frames(frames_wanted)
        if subtitles not in ("auto", "off"):
            raise ValueError(f"--subtitles {subtitles} belongs to one video, and these are {len(videos)}: use auto")
    with ExitStack() as stack:
        files = {STDIN: stack.enter_context(standard_input())} if STDIN in videos else {}
        pipe = load_pipeline(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        if times:
            pipe.processor.times_question("")  # tells at once where a checkpoint never learnt them
        asking = _Asking(pipe, questions, frames_wanted, max_new_tokens, times, where, as_json, several)
        failed = 0
        for number, video in enumerate(videos, 1):
            name = "standard input" if video == STDIN else printable(shown_name(video))
            try:
                if several and video != STDIN:
                    _check(video, questions, frames_wanted, where)
                asking.about(files.get(video, video), name, f" ({number} of {len(videos)})" if several else "")
            except Exception as error:
                if not several or not is_expected(error):
                    raise
                failed += 1
                tell_failed(name, error, as_json)
    if failed:
        note(f"{len(videos) - failed} of {len(videos)} videos answered, {failed} failed")
        raise typer.Exit(1)


def _check(video: str, questions: list[str], frames_wanted: dict, where: bool) -> None:
    """Refuse what cannot be answered before anything is loaded."""
    from video_ma2mba.modeling_video_ma2mba.state_header import is_state_file, summarise

    name = shown_name(video)
    is_state = video != STDIN and not is_address(video) and is_state_file(local_path(video))
    if is_state and frames_wanted:
        raise ValueError(
            f"{name} is a state file, whose frames are read already: leave {', '.join(frames_wanted)} out"
        )
    if is_state:
        summarise(local_path(video))
    elif video == STDIN:
        check_frames(frames_wanted)
    else:
        check_video(video, frames_wanted)
    if where and (is_state or not questions):
        what = f"{name} is a state file, which holds no frames to look at" if is_state else "there is no question"
        raise ValueError(f"--where looks at the frames again for an answer, and {what}: ask of the video itself")


@dataclass
class _Asking:
    """What is asked of every video, and how answers are printed."""

    pipe: Any
    questions: list[str]
    frames_wanted: dict
    max_new_tokens: int
    times: bool
    where: bool
    as_json: bool
    several: bool

    def about(self, video: str, name: str, place: str) -> None:
        """Read one video and answer all questions about it, or chat where there is none."""
        from video_ma2mba.modeling_video_ma2mba.state_header import is_state_file

        pipe, began = self.pipe, time.perf_counter()
        is_state = not is_address(video) and is_state_file(local_path(video))
        if is_state:
            from video_ma2mba import VideoState

            state = VideoState.load(local_path(video))
            pipe.check(state)
        else:
            with reading_progress(f"reading {name}{place}") as on_frames:
                state = pipe.read(video, on_frames=on_frames, **self.frames_wanted)
        read_seconds = time.perf_counter() - began
        frames = int(state.metadata.get("frames", 0))
        step(f"{name}: {frames} frames, ready after {read_seconds:.2f} s")
        strange = pipe.model.unfamiliar(state, self.questions[0] if self.questions else [])
        if strange is not None and strange.video_note:
            warn(f"note: {f'{name}: ' if self.several else ''}{strange.video_note}")
        if not self.questions:
            chat(pipe, state, self.max_new_tokens, self.times)
            return
        asked = {"max_new_tokens": self.max_new_tokens, "times": self.times}
        for question in self.questions:
            if self.as_json:
                began = time.perf_counter()
                said = pipe.ask(state, question, **asked)
                record = {
                    "video": name,
                    "question": question,
                    **(said if self.times else {"answer": said}),
                    **unfamiliar_question(pipe, state, question),
                    "frames": frames,
                    "state_bytes": state.nbytes,
                    "read_seconds": round(read_seconds, 3),
                    "answer_seconds": round(time.perf_counter() - began, 3),
                }
                if self.where:
                    record["where"] = _where(pipe, video, question, record["answer"], self.frames_wanted)
                echo_json(record)
                continue
            if len(self.questions) > 1:
                note(question)
            if self.several:
                typer.echo(f"{name}: ", nl=False)
            said = pipe.ask(state, question, **asked, streamer=stdout_streamer(pipe.processor.tokenizer))
            if self.times and "reason" in said:
                note(f"no times: {said['reason']}")
            unfamiliar_question(pipe, state, question)
            if self.where:
                second = _where(pipe, video, question, said["answer"] if self.times else said, self.frames_wanted)
                note("where: nothing was answered" if second is None else f"where: {second:.1f} s")
        if not self.as_json and not is_state:
            named = f"{name}: " if self.several else ""
            unit = "frame" if frames == 1 else "frames"
            note(f"{named}{frames} {unit} read in {read_seconds:.1f} s; state {size_text(state.nbytes)}")


def unfamiliar_question(pipe, state, question: str | list[dict]) -> dict:
    """Say in a line whether a question is unlike those that the model was trained on; the field for JSON, if any."""
    found = pipe.model.unfamiliar(state, question)
    if found is None:
        return {}
    if found.question_note:
        warn(f"note: {found.question_note}")
    return {"unfamiliar": found.to_dict()}


def _where(pipe, video: str, question: str, answer: str, chosen: dict) -> float | None:
    """The second of the frame that speaks most for an answer; None for one of no words."""
    from video_ma2mba.explain import relevance

    if not answer.strip():
        return None
    with relevance_progress(shown_name(video)) as told:
        found = relevance(pipe.model, pipe.processor, video, question, answer, **told, **chosen)
    return round(found.peak, 3)


def size_text(nbytes: int) -> str:
    """Bytes for people: `1.1 MB`, `26.0 kB`."""
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.1f} kB"


def stdout_streamer(tokenizer):
    """Writes the generated text to standard output token by token."""
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def reading_progress(label: str, unit: str = "frames"):
    """A progress bar on standard error, as a context; gives the `on_frames(seen, expected)` callback."""
    from video_ma2mba.files.progress import progress

    return progress(label, unit)


@contextmanager
def relevance_progress(name: str):
    """Bars for both halves of `explain.relevance`, as a context; gives what it calls, by name."""
    from video_ma2mba.files.progress import progress

    with progress(f"reading {name}") as on_frames, progress("weighing frames", "parts", at_once=False) as on_share:
        yield {"on_frames": on_frames, "on_share": lambda share: on_share(round(100 * share), 100)}


def chat(pipe, state, max_new_tokens: int, times: bool = False) -> None:
    """Answer questions from standard input until its end or `/quit`.

    A state saved by `/save` holds its conversation, which goes on where it is opened again.

    Args:
        pipe: the question-answering pipeline.
        state: what it has read; stays as it is.
        max_new_tokens: longest answer.
        times: answers end in the span that shows them.
    """
    messages = json.loads(state.metadata.get("chat", "[]"))
    if messages:
        note(f"the conversation goes on after {len(messages) // 2} questions")
    note(_COMMANDS)
    for line in _lines():
        try:
            if line == "/quit":
                return
            if line == "/new":
                messages = []
            elif line.startswith("/save ") and line.split(maxsplit=1)[1:]:
                file = line.split(maxsplit=1)[1]
                kept = state.fork()
                kept.metadata["chat"] = json.dumps(messages, ensure_ascii=False)
                kept.save(file)
                note(f"saved {file}")
            elif line.startswith("/"):
                warn(f"{line.split()[0]} is no command: {_COMMANDS}")
            elif line:
                asked = [*messages, {"role": "user", "content": line}]
                streamer = stdout_streamer(pipe.processor.tokenizer)
                answer = pipe.ask(state, asked, max_new_tokens=max_new_tokens, streamer=streamer, times=times)
                unfamiliar_question(pipe, state, asked)
                if times and "reason" in answer:
                    note(f"no times: {answer['reason']}")
                messages = [*asked, {"role": "assistant", "content": answer["answer"] if times else answer}]
        except Exception as error:  # a slip in one line is no reason to lose the conversation
            if not is_expected(error):
                raise
            warn(f"error: {one_line(error)}")


def _lines() -> Iterator[str]:
    """Lines without the spaces around them, up to the end of the input."""
    if not sys.stdin.isatty():
        yield from map(given_text, input_lines())
        return
    with suppress(ImportError):  # not on every system
        import readline  # noqa: F401 (arrow keys and history in input())
    sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        try:
            line = input("? ")
        except EOFError:
            return
        yield given_text(line)
