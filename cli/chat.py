"""The conversation of `video-ma2mba ask STATE`: questions line by line, each answered with those before it in mind."""

import json
import sys
from collections.abc import Iterator
from contextlib import suppress

import typer

from .ask import stdout_streamer
from .errors import is_expected, one_line
from .terminal import given_text, input_lines

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
