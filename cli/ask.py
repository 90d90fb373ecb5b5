"""`video-ma2mba ask`: answer questions from a video, read once, or from a state file; without questions, a chat."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated

import typer

from video_ma2mba.loading import check_loading

from .errors import is_expected, one_line
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
    check_video,
    chosen_frames,
)
from .terminal import echo_json, given_text, input_lines, note, warn

_COMMANDS = "/new forgets the conversation, /save FILE keeps it with the state, /quit ends it"


def ask(
    video: Annotated[
        str,
        typer.Argument(help="Video file, image, directory of images, URL, or state file.", show_default=False),
    ],
    questions: Annotated[
        list[str] | None, typer.Argument(help="Questions; none opens a conversation.", show_default=False)
    ] = None,
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
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per question and line.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Answer questions about a video. The video is read once, in memory that does not grow with it.

    A state file written by `read` needs no reading. Without a question, questions are read from standard input.
    Answers go to standard output as they are generated; progress and figures go to standard error.
    """
    questions = [given_text(question) for question in questions or []]
    if not all(questions):
        raise ValueError("a question is empty: ask something about the video")
    if as_json and not questions:
        raise ValueError("--json answers questions given on the command line: add one")
    from video_ma2mba.modeling_video_ma2mba.state_header import is_state_file, summarise
    from video_ma2mba.processing.video_source_names import is_address, local_path, shown_name

    check_loading(model, device, dtype)
    name, file = shown_name(video), video if is_address(video) else local_path(video)
    frames_wanted = chosen_frames(fps, num_frames, start, end, subtitles)
    is_state = is_state_file(file)
    if not is_state:
        check_video(video, frames_wanted)
    elif frames_wanted:
        raise ValueError(
            f"{name} is a state file, whose frames are read already: leave {', '.join(frames_wanted)} out"
        )
    else:
        summarise(file)
    if where and (is_state or not questions):
        what = f"{name} is a state file, which holds no frames to look at" if is_state else "there is no question"
        raise ValueError(f"--where looks at the frames again for an answer, and {what}: ask of the video itself")
    pipe = load_pipeline(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    if times:
        pipe.processor.times_question("")  # tells at once where a checkpoint never learnt them
    began = time.perf_counter()
    if is_state:
        from video_ma2mba import VideoState

        state = VideoState.load(file)
        pipe.check(state)
    else:
        with reading_progress(f"reading {name}") as on_frames:
            state = pipe.read(video, on_frames=on_frames, **frames_wanted)
    read_seconds = time.perf_counter() - began
    frames = int(state.metadata.get("frames", 0))
    strange = pipe.model.unfamiliar(state, questions[0] if questions else [])
    if strange is not None and strange.video_note:
        warn(f"note: {strange.video_note}")
    if not questions:
        chat(pipe, state, max_new_tokens, times)
        return

    for question in questions:
        if as_json:
            began = time.perf_counter()
            said = pipe.ask(state, question, max_new_tokens=max_new_tokens, times=times)
            record = {
                "video": name,
                "question": question,
                **(said if times else {"answer": said}),
                **unfamiliar_question(pipe, state, question),
                "frames": frames,
                "state_bytes": state.nbytes,
                "read_seconds": round(read_seconds, 3),
                "answer_seconds": round(time.perf_counter() - began, 3),
            }
            if where:
                record["where"] = _where(pipe, video, question, record["answer"], frames_wanted)
            echo_json(record)
        else:
            if len(questions) > 1:
                note(question)
            streamer = stdout_streamer(pipe.processor.tokenizer)
            said = pipe.ask(state, question, max_new_tokens=max_new_tokens, streamer=streamer, times=times)
            if times and "reason" in said:
                note(f"no times: {said['reason']}")
            unfamiliar_question(pipe, state, question)
            if where:
                second = _where(pipe, video, question, said["answer"] if times else said, frames_wanted)
                note("where: nothing was answered" if second is None else f"where: {second:.1f} s")
    if not as_json and not is_state:
        note(f"{frames} frames read in {read_seconds:.1f} s; state {size_text(state.nbytes)}")


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
    with reading_progress("frames, then percent") as report:
        found = relevance(
            pipe.model,
            pipe.processor,
            video,
            question,
            answer,
            on_frames=report,
            on_share=lambda share: report(100 * share, 100),
            **chosen,
        )
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
        except KeyboardInterrupt:
            typer.echo()  # the prompt stands in the line
            raise
        yield given_text(line)
