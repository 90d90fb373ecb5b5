"""The page: what is on it, and what happens on a click."""

from __future__ import annotations

import inspect
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import gradio as gr

from . import markup
from .background import Stopped
from .examples import Example
from .session import Session

STYLE = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none from the web
THEME = gr.themes.Default(primary_hue="blue", **_FONTS).set(  # the default greys and blues are too light to read
    body_text_color_subdued="*neutral_500",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_800",
)
_KEPT_SECONDS = 3600  # uploads, states and state files are forgotten after an hour
_ONE_AT_A_TIME = {"concurrency_limit": 1, "concurrency_id": "model"}
# Follows the link of a button that nobody sees, once it names the file just written.
_DOWNLOAD = "() => setTimeout(() => document.querySelector('#state_link')?.click(), 500)"
_log = logging.getLogger(__name__)


def build_page(
    pipe: Any, examples: list[Example], title: str, about: str, strip: Callable[..., list[Any]] | None = None
) -> gr.Blocks:
    """The page over a question-answering pipeline; `launch(css=STYLE, theme=THEME)` serves it.

    Args:
        pipe: of `pipeline("video-question-answering")`, by this package or by a checkpoint's own code.
        examples: videos to pick, with questions to try.
        title: heading. about: Markdown below it.
        strip: `strip(pipe, video, question, answer, fps, report)` gives the frames of a filmstrip of relevance (for
            `markup.filmstrip`) and calls `report(sentence)` as it goes on; None: the page has no such button.
    """
    scratch = tempfile.mkdtemp(prefix="video_states_")
    by_label = {example.label: example for example in examples}

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, _KEPT_SECONDS)) as page:
        session = gr.State(Session(), time_to_live=_KEPT_SECONDS)
        gr.Markdown(f"# {title}\n\n{about}")
        with gr.Row():
            with gr.Column(min_width=280):
                gr.Markdown("## 1. The video")
                picked = gr.Radio([*by_label], label="Pick one", visible=bool(by_label))
                video = gr.Video(label="or upload your own", sources=["upload"], include_audio=True, height=260)
                fps = gr.Slider(0.1, 8, value=1, step=0.1, label="Frames read per second of video")
                takes = inspect.signature(pipe.read).parameters.values()  # of a server, pictures alone are read here
                texts = any(one.name == "subtitles" or one.kind is one.VAR_KEYWORD for one in takes)
                own_text = gr.Checkbox(label="With the video's own subtitles, if it has any", visible=texts)
                told = gr.File(
                    label="or a file of subtitles",
                    file_types=[".srt", ".vtt", ".ass", ".json"],
                    height=140,
                    visible=texts,
                )
                with gr.Row():
                    read = gr.Button("Read the video", size="md", variant="primary", min_width=120)
                    stop_reading = gr.Button("Stop", size="md", interactive=False, min_width=80)
                    go_on = gr.Button("Go on reading", size="md", visible=False, min_width=120)
                reading = gr.HTML(elem_classes="notes")
            with gr.Column(min_width=280):
                gr.Markdown("## 2. Questions")
                chat = gr.Chatbot(label="Conversation", height=340, render_markdown=False, buttons=["copy_all"])
                tries = gr.Dataset(components=["textbox"], samples=[[""]], label="Questions to try", visible=False)
                question = gr.Textbox(label="Your question", placeholder="What is shown?", max_lines=3)
                with gr.Row():
                    ask = gr.Button("Ask", size="md", variant="primary", min_width=80)
                    stop_answer = gr.Button("Stop", size="md", interactive=False, min_width=80)
                    forget = gr.Button("Start over", size="md", min_width=120)
                tells_times = getattr(getattr(pipe, "processor", None), "frame_times", "none") != "none"
                timed = gr.Checkbox(tells_times, label="With the seconds that show the answer", visible=tells_times)
                where = gr.Button("Where in the video is that?", size="md", visible=strip is not None)
                answering = gr.HTML(elem_classes="notes")
        shown = gr.HTML()
        with gr.Accordion("State file: keep what was read, or go on from it", open=False):
            with gr.Row():
                save = gr.Button("Download the state", size="md", min_width=200)
                link = gr.DownloadButton("state", visible="hidden", elem_id="state_link")
                opened = gr.File(label="Open a state file", height=120)
            filed = gr.HTML(elem_classes="notes")

        def on_pick(label: str) -> dict[Any, Any]:
            questions = [[text] for text in by_label[label].questions]
            return {video: by_label[label].video, tries: gr.Dataset(samples=questions, visible=True), reading: ""}

        def on_read(
            now: Session, path: str | None, per_second: float, with_text: bool = False, text: str | None = None
        ) -> Iterator[dict[Any, Any]]:
            if not path:
                yield {reading: markup.problem(ValueError("pick a video or upload one first"))}
                return
            yield from as_it_goes(now, now.read(pipe, path, per_second, text or ("auto" if with_text else None)), path)

        def on_go_on(now: Session) -> Iterator[dict[Any, Any]]:
            yield from as_it_goes(now, now.go_on(pipe), now.video)

        def as_it_goes(
            now: Session, reports: Iterator[tuple[int, int | None]], path: str | None
        ) -> Iterator[dict[Any, Any]]:
            try:
                begun = {stop_reading: gr.Button(interactive=True), go_on: gr.Button(visible=False)}
                yield {reading: markup.progress(0, None), **begun}
                for seen, expected in reports:
                    yield {reading: markup.progress(seen, expected)}
                told = markup.note(markup.what_was_read(now)) + markup.warning(now.unfamiliar(pipe, asked=False))
                yield {reading: told, chat: [], answering: "", shown: ""}
            except Exception as error:
                yield {reading: _error_text(error, path)}
            ended = {stop_reading: gr.Button(interactive=False), go_on: gr.Button(visible=now.unfinished)}
            yield {session: now, **ended}

        def on_ask(now: Session, text: str, times: bool = False) -> Iterator[dict[Any, Any]]:
            before = now.messages
            try:
                begun = {question: "", answering: "", stop_answer: gr.Button(interactive=True)}
                for answer in now.ask(pipe, text, times):
                    said = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
                    yield {chat: [*before, *said], **begun}
                    begun = {}  # from now on, the next question may be typed
                told = markup.span(now.span) if times else ""
                told += markup.warning(now.unfamiliar(pipe, asked=True))
                yield {chat: now.messages, answering: told, **begun}
            except Exception as error:
                yield {chat: now.messages, answering: _error_text(error)}
            yield {stop_answer: gr.Button(interactive=False), session: now}

        def on_where(now: Session) -> Iterator[dict[Any, Any]]:
            yield {shown: "", answering: markup.note("Looking …"), stop_answer: gr.Button(interactive=True)}
            try:
                for said in now.explain(pipe, strip):
                    yield {answering: markup.note(said)}
                yield {shown: markup.filmstrip(now.strip, *now.last_answer()), answering: ""}
            except Exception as error:
                yield {answering: _error_text(error)}
            yield {stop_answer: gr.Button(interactive=False), session: now}

        def on_save(now: Session) -> dict[Any, Any]:
            try:
                file = now.save(scratch)
            except Exception as error:
                return {filed: _error_text(error), link: None}
            return {filed: markup.note(f"{file.name}, {markup.size(file.stat().st_size)}"), link: str(file)}

        def on_open(now: Session, path: str) -> dict[Any, Any]:
            try:
                now.open(pipe, path)
            except Exception as error:
                return {filed: _error_text(error, path)}
            told = markup.note(markup.what_was_read(now)) + markup.warning(now.unfamiliar(pipe, asked=False))
            return {filed: told, chat: now.messages, shown: "", session: now, go_on: gr.Button(visible=False)}

        def on_forget(now: Session) -> dict[Any, Any]:
            now.messages = []
            return {chat: [], answering: "", shown: "", session: now}

        def on_stop(now: Session) -> str:
            now.stopped = True
            return markup.note("Stopping …")  # the frames under way are read to their end

        picked.input(on_pick, picked, [video, tries, reading], api_name="pick")
        reports = [reading, chat, answering, shown, stop_reading, go_on, session]
        read.click(on_read, [session, video, fps, own_text, told], reports, api_name="read", **_ONE_AT_A_TIME)
        go_on.click(on_go_on, session, reports, api_name="go_on", **_ONE_AT_A_TIME)
        asking = [chat, question, answering, shown, stop_answer, session]
        asked = [session, question, timed]
        gr.on([ask.click, question.submit], on_ask, asked, asking, api_name="ask", **_ONE_AT_A_TIME)
        tries.click(lambda sample: sample[0], tries, question, api_name=False).then(
            on_ask, asked, asking, api_name=False, **_ONE_AT_A_TIME
        )
        if strip is not None:
            where.click(
                on_where, session, [shown, answering, stop_answer, session], api_name="where", **_ONE_AT_A_TIME
            )
        save.click(on_save, session, [filed, link], api_name="save").success(None, js=_DOWNLOAD)
        opened.upload(on_open, [session, opened], [filed, chat, shown, session, go_on], api_name="open")
        gr.on([forget.click, chat.clear], on_forget, session, [chat, answering, shown, session], api_name="forget")
        for button, said in ((stop_reading, reading), (stop_answer, answering)):
            button.click(on_stop, session, said, queue=False, api_name=False)
    return page


def _error_text(error: Exception, path: str | None = None) -> str:
    """What the page says about an error: the sentence of an expected one, without the folder of the file at `path` on
    this machine; others go to the log."""
    if isinstance(error, Stopped):
        return markup.note("Stopped.")
    if isinstance(error, ValueError | OSError) or "out of memory" in str(error):
        folder = f"{Path(path).parent}{os.sep}" if path else ""
        return markup.problem(ValueError(str(error).replace(folder, "")) if folder and str(error) else error)
    _log.exception("unexpected error", exc_info=error)
    return markup.problem(RuntimeError(f"this page made a mistake ({type(error).__name__}): its log says more"))


def serve(page: gr.Blocks, examples: list[Example], *, wait: bool = True, **settings: Any) -> None:
    """Serve the page until interrupted; the same look everywhere. Says where it is, and nothing of the framework.

    Args:
        examples: whose videos the page may show, wherever they lie.
        wait: until interrupted; else the page is served in the background.
        settings: of `launch`, such as `server_port` and `max_file_size`.
    """
    with suppress(AttributeError):
        sys.stdout.reconfigure(line_buffering=True)  # the address is seen at once in a log file or a pipe, too
    page.queue(max_size=20)
    page.launch(
        css=STYLE,
        theme=THEME,
        footer_links=["gradio"],
        run_history=False,
        state_session_capacity=200,
        allowed_paths=[example.video for example in examples],
        quiet=True,
        prevent_thread_lock=True,
        **settings,
    )
    if wait:
        print(f"Running on {page.local_url} (Ctrl-C ends it)")
        page.block_thread()


HOW = "A video is read once, into a state of constant size, and every question is answered from that state."


def about_model(checkpoint: Path) -> str:
    """How the page works, and the first paragraph between the marks for own words of `README.md`, where there is one.

    Args:
        checkpoint: folder of the model; a Hub id, which is none, has no words here.
    """
    card = checkpoint / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    found = re.search(r"<!-- own words -->\s*(.*?)\s*(?:\n\n|<!-- end of own words -->)", text, re.S)
    return f"{HOW}\n\n**This model.** {found[1]}\n\n" if found and found[1] else f"{HOW}\n\n"
