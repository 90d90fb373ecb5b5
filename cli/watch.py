"""`video-ma2mba watch`: read a stream while it runs and answer standing questions at an interval."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from video_ma2mba.loading import check_loading

from .loading import load_pipeline
from .options import (
    TIME,
    Device,
    Dtype,
    Fps,
    MaxNewTokens,
    Model,
    SaveEvery,
    Times,
    TrustRemoteCode,
    check_out_file,
    check_video,
)
from .terminal import echo_json, given_text, note, warn


def watch(
    source: Annotated[
        str,
        typer.Argument(
            help="Camera number, address (rtsp://, http://, …), file, or - for a pipe.", show_default=False
        ),
    ],
    ask: Annotated[
        list[str] | None, typer.Option("--ask", help="Standing question; may be given again.", show_default=False)
    ] = None,
    every: Annotated[float, typer.Option(help="Time of the stream between answers.", **TIME)] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per answer and line.")] = False,
    policy: Annotated[
        str,
        typer.Option(help="When reading falls behind: drop the oldest frames, queue them, or auto (drop if live)."),
    ] = "auto",
    waiting: Annotated[int, typer.Option(help="Frames that may wait to be read.")] = 32,
    remember: Annotated[
        float | None,
        typer.Option(help="Answer from the last so much time (up to twice as much).", show_default="all", **TIME),
    ] = None,
    realtime: Annotated[bool, typer.Option("--realtime", help="Read a file no faster than it plays.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="The file is still being written: wait for more.")] = False,
    seconds: Annotated[
        float | None, typer.Option("--for", help="Stop after so long.", show_default=False, **TIME)
    ] = None,
    state: Annotated[Path | None, typer.Option(help="Read on from this state file.", show_default=False)] = None,
    subtitles: Annotated[
        Path | None,
        typer.Option(help="File of subtitles of the stream, in its seconds: SRT, WebVTT, …", show_default=False),
    ] = None,
    times: Times = False,
    save: Annotated[Path | None, typer.Option(help="Keep the state in this file.", show_default=False)] = None,
    save_every: SaveEvery = 30.0,
    timeout: Annotated[float, typer.Option(help="Wait so long for a source that is silent.", **TIME)] = 15.0,
    retries: Annotated[int, typer.Option(help="Attempts in a row to connect again.", min=0)] = 10,
    model: Model = None,
    fps: Fps = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_new_tokens: MaxNewTokens = 64,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Read a stream in constant memory and answer standing questions at an interval.

    Ctrl-C ends it: the state is saved if asked for, and counters are printed. Answers go to standard output; what
    happens to the stream goes to standard error.
    """
    questions = [given_text(question) for question in ask or []]
    if not all(questions):
        raise ValueError("a question is empty: ask something about the video")
    if not questions and save is None:
        raise ValueError("there is nothing to do: give a question with --ask, or a file with --save")
    check_out_file("--save", save)
    if not every > 0 or (seconds is not None and not seconds > 0) or not timeout > 0:
        raise ValueError("--every, --for and --timeout must be more than 0 seconds")

    from video_ma2mba.streaming.live_sources import find_source

    check_loading(model, device, dtype, times, "video_ma2mba")
    found = find_source(source, follow)
    if found.kind == "file":
        check_video(source, {})
    if state is not None:
        from video_ma2mba.modeling_video_ma2mba.state_header import summarise

        summarise(state)
    pipe = load_pipeline(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    from video_ma2mba import VideoState
    from video_ma2mba.streaming.live_frames import Patience
    from video_ma2mba.streaming.session import VideoSession

    before = None if state is None else VideoState.load(state)
    if times:
        pipe.processor.times_question("")  # tells at once where a checkpoint never learnt them
    settings = {"fps": fps, "policy": policy, "waiting": waiting, "remember": remember, "state": before}
    settings["subtitles"] = subtitles
    with VideoSession(pipe.model, pipe.processor, **settings) as session:
        answer = _answering(questions, as_json, max_new_tokens, times)
        session.every(every, answer)
        patience = Patience(connect=timeout, data=timeout, retries=retries)
        terminated = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: services are ended so
        try:
            session.attach(found, realtime=realtime, follow=follow, patience=patience)
            _until_the_end(session, seconds, save, save_every)
            answer(session)
        except KeyboardInterrupt:
            note("stopped")
        finally:
            signal.signal(signal.SIGTERM, terminated)
        session.close()  # so that nothing more is read between what is saved and what is counted
        _save_state(session, save)
        counters = session.counters()
    if as_json:
        echo_json({"counters": counters})
    else:
        note(", ".join(f"{name} {value:g}" for name, value in counters.items()))


def _answering(questions: list[str], as_json: bool, max_new_tokens: int, times: bool) -> Callable[[Any], None]:
    """What answers all questions from what a session has seen, unless it has seen nothing since the last time."""
    from video_ma2mba.processing.frame_times import span_text

    until = None
    noted = {""}

    def answer(session: Any) -> None:
        nonlocal until
        seen = session.seen
        if seen is None or seen.until == until:
            return
        until = seen.until
        began = time.perf_counter()
        answers = session.ask(questions, max_new_tokens=max_new_tokens, times=times)
        spent = round(time.perf_counter() - began, 3)
        for question, text in zip(questions, answers, strict=True):
            record = {"seconds": round(seen.until, 3), "since": round(seen.since, 3), "frames": seen.frames}
            record |= {"question": question, **(text if times else {"answer": text})}
            unfamiliar = session.model.unfamiliar(seen.state, question)
            if unfamiliar is not None:
                record["unfamiliar"] = unfamiliar.to_dict()
                if unfamiliar.question_note not in noted:  # of a question the same every time
                    noted.add(unfamiliar.question_note)
                    warn(f"note: {unfamiliar.question_note}")
                if unfamiliar.strange_video and "video" not in noted:
                    warn(f"note: {unfamiliar.video_note}")
                (noted.add if unfamiliar.strange_video else noted.discard)("video")
            if as_json:
                record["answer_seconds"] = spent  # of all questions together
                echo_json(record)
            else:
                if times:
                    found = text["start"] is not None
                    text = f"{text['answer']} {span_text(text['start'], text['end'])}" if found else text["answer"]
                typer.echo(f"{clock_text(seen.until)}  {question if len(questions) > 1 else ''}  {text}")

    return answer


def _until_the_end(session: Any, seconds: float | None, save: Path | None, save_every: float) -> None:
    """Wait for the end of the stream, or of the time given; say meanwhile what happens, and save now and then."""
    began = saved = time.monotonic()
    told = 0
    while True:
        left = 1.0 if seconds is None else min(1.0, began + seconds - time.monotonic())
        ended = left <= 0 or session.wait(left)
        fresh, told = session.report.marks - told, session.report.marks
        for mark in list(session.report.timeline)[-fresh:] if fresh else ():
            if mark.event != "dropped frames":  # thousands of them say no more than their counter
                note(f"{clock_text(mark.seconds)}  {mark.event}: {mark.detail}".rstrip(": "))
        if ended:
            return
        if save is not None and time.monotonic() - saved >= save_every:
            _save_state(session, save)
            saved = time.monotonic()


def _save_state(session: Any, save: Path | None) -> None:
    if save is not None and session.seen is not None:
        session.fork().save(save)


def clock_text(seconds: float) -> str:
    """Seconds as `h:mm:ss`."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
