"""The conversation of `video-ma2mba ask STATE`: questions line by line, each answered with those before it in mind."""

import json
import sys
from contextlib import suppress

import typer

from .ask import stdout_streamer
from .errors import is_expected, one_line

_COMMANDS = "/new forgets the conversation, /save FILE keeps it with the state, /quit ends it"


def chat(pipe, state, max_new_tokens: int) -> None:
    """Answer questions from standard input until its end or `/quit`.

    A state saved by `/save` holds its conversation, which goes on where it is opened again.

    Args:
        pipe: the question-answering pipeline.
        state: what it has read; stays as it is.
        max_new_tokens: longest answer.
    """
    messages = json.loads(state.metadata.get("chat", "[]"))
    if messages:
        typer.echo(f"the conversation goes on after {len(messages) // 2} questions", err=True)
    typer.echo(_COMMANDS, err=True)
    while (line := _next_line()) is not None:
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
                typer.echo(f"saved {file}", err=True)
            elif line.startswith("/"):
                typer.echo(f"{line.split()[0]} is no command: {_COMMANDS}", err=True)
            elif line:
                asked = [*messages, {"role": "user", "content": line}]
                streamer = stdout_streamer(pipe.processor.tokenizer)
                answer = pipe.ask(state, asked, max_new_tokens=max_new_tokens, streamer=streamer)
                messages = [*asked, {"role": "assistant", "content": answer}]
        except Exception as error:  # a slip in one line is no reason to lose the conversation
            if not is_expected(error):
                raise
            typer.echo(f"error: {one_line(error)}", err=True)


def _next_line() -> str | None:
    """The next line without the spaces around it; None at the end of the input."""
    try:
        if sys.stdin.isatty():
            with suppress(ImportError):  # not on every system
                import readline  # noqa: F401 (arrow keys and history in input())
            return input("? ").strip()
        line = sys.stdin.readline()
    except EOFError:
        return None
    return line.strip() if line else None
