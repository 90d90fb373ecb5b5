"""A server as a pipeline: what the page of `demo --web` asks of a model, asked of a server instead."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import torch

from ..modeling_video_ma2mba.state_video import VideoState
from ..processing.video_reader import open_video
from ..processing.video_source_names import local_path
from ..processing.video_subtitles import Subtitles, find_subtitles, srt_text
from .settings import read_keys

_ID = "server_video"
_BLOCK = 2**20


def first_key(file: str | Path | None) -> str | None:
    """The key to send, of a file of keys; None without a file. Raises what `read_keys` raises."""
    return None if file is None else read_keys(file)[0]


class ServerPipeline:
    """Reads videos on a server and asks it; states come from it and go to it.

    Args:
        address: of the server, `http://127.0.0.1:8000` (or with `/v1`). key: where it needs one.

    Raises:
        ValueError: this is no address. ConnectionError: nobody answers there, or it is no such server.
    """

    def __init__(self, address: str, key: str | None = None):
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--server {address} is no address of a server: write http://HOST:PORT")
        self._place = parts.scheme, parts.hostname, parts.port, parts.path.rstrip("/").removesuffix("/v1")
        self._key = key
        found = self._asked("GET", "/v1/models")["data"]
        self.device = torch.device("cpu")  # where its states are kept
        self.model = SimpleNamespace(name_or_path=found[0]["id"])
        self.processor = SimpleNamespace(tokenizer=None, frame_times=found[0].get("frame_times", "none"))

    def read(
        self,
        video: str,
        *,
        fps: float | None = None,
        subtitles: str | None = None,
        on_frames: Callable[[int, int | None], None] | None = None,
    ) -> VideoState:
        """Have a file read; the state that the server made of it.

        Args:
            subtitles: "auto" (a track inside, or a file beside the video), or a file; they are read here.

        Raises:
            FileNotFoundError, ValueError: as of `find_subtitles`; ValueError with the server's own words.
        """
        path = local_path(video)
        told = None
        if subtitles is not None:
            with open_video(path) as reader:
                told = find_subtitles(subtitles, reader)
        found = self._sent("/v1/videos" + (f"?fps={fps:g}" if fps else ""), path, "video/mp4", told)
        for event, told in self._events("GET", f"/v1/videos/{found['id']}/events"):
            if event == "progress" and on_frames is not None and told["expected_frames"]:
                on_frames(told["frames"], told["expected_frames"])
            elif event != "progress":
                found = told
        if found.get("status") != "completed":
            raise ValueError((found.get("error") or {}).get("message") or "the server stopped reading")
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "state"
            with self._opened("GET", f"/v1/videos/{found['id']}/state") as answer, file.open("wb") as kept:
                while block := answer.read(_BLOCK):
                    kept.write(block)
            state = VideoState.load(file)
        state.metadata[_ID] = found["id"]
        return state

    def check(self, state: VideoState) -> None:
        """Have the server keep a state of a file. Raises ValueError unless its model made it."""
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "state"
            state.save(file)
            state.metadata[_ID] = self._sent("/v1/videos", file, "application/octet-stream")["id"]

    def ask(
        self,
        state: VideoState,
        question: Any,
        *,
        streamer: Any = None,
        max_new_tokens: int = 256,
        times: bool = False,
    ) -> Any:
        """The answer to a question or a conversation; a `TextStreamer` is told it as it comes.

        With `times` at once, as the pipeline gives it: `{"answer": …, "start": …, "end": …}` in seconds.
        """
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
        body = {"model": f"state:{state.metadata[_ID]}", "messages": messages, "max_tokens": max_new_tokens}
        if times:
            said = json.dumps({**body, "temperature": 0, "times": True})
            with self._opened("POST", "/v1/chat/completions", said, {"Content-Type": "application/json"}) as answer:
                message = json.loads(answer.read())["choices"][0]["message"]
            kept = {name: message[name] for name in ("start", "end", "reason") if name in message}
            return {"answer": message["content"], **kept}
        text = ""
        for _, told in self._events("POST", "/v1/chat/completions", {**body, "stream": True, "temperature": 0}):
            for choice in told.get("choices", ()):
                piece = choice["delta"].get("content") or ""
                text += piece
                if streamer is not None and piece:
                    streamer.on_finalized_text(piece)
        if streamer is not None:
            streamer.on_finalized_text("", stream_end=True)
        return text

    def _opened(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
        """The server's answer, open. Raises ValueError with its message where it refuses."""
        scheme, host, port, prefix = self._place
        kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
        connection = kind(host, port, timeout=600)
        given = {**(headers or {}), **({"Authorization": f"Bearer {self._key}"} if self._key else {})}
        try:
            connection.request(method, prefix + path, body, given)
            answer = connection.getresponse()
        except OSError as error:
            connection.close()
            raise ConnectionError(f"the server {scheme}://{host}:{port} does not answer ({error})") from None
        if answer.status == 200:
            return closing(_Answer(connection, answer))
        try:
            said = json.loads(answer.read(2**16))["error"]["message"]
        except (ValueError, KeyError, TypeError):
            said = f"{scheme}://{host}:{port} answers {answer.status} {answer.reason}: it is no server of video-ma2mba"
        connection.close()
        raise ValueError(said)

    def _asked(self, method: str, path: str) -> Any:
        with self._opened(method, path) as answer:
            return json.loads(answer.read())

    def _sent(self, path: str, file: Path, kind: str, subtitles: Subtitles | None = None) -> Any:
        """What the server makes of a file, read with subtitles or without."""
        boundary = secrets.token_hex(16)
        name = file.name.replace('"', "'").encode("ascii", "replace").decode()
        part = f"--{boundary}\r\nContent-Disposition: form-data; name="
        text = "" if subtitles is None else srt_text(subtitles.cues)
        head = f'{part}"subtitles"; filename="subtitles.srt"\r\n\r\n{text}\r\n' if text else ""
        head += f'{part}"file"; filename="{name}"\r\n'
        parts = f"{head}Content-Type: {kind}\r\n\r\n".encode(), f"\r\n--{boundary}--\r\n".encode()
        size = str(sum(map(len, parts)) + os.path.getsize(file))

        def body() -> Iterator[bytes]:
            yield parts[0]
            with file.open("rb") as opened:
                while block := opened.read(_BLOCK):
                    yield block
            yield parts[1]

        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}", "Content-Length": size}
        with self._opened("POST", path, body(), headers) as answer:
            return json.loads(answer.read())

    def _events(self, method: str, path: str, body: Any = None) -> Iterator[tuple[str, Any]]:
        """Server-sent events, each with its name and what it says. Raises ValueError where one is an error."""
        data = None if body is None else json.dumps(body)
        with self._opened(method, path, data, {"Content-Type": "application/json"} if data else None) as answer:
            event = "message"
            for line in answer.lines():
                field, _, value = line.decode().rstrip("\n").partition(": ")
                if field == "event":
                    event = value
                elif field == "data" and value != "[DONE]":
                    told = json.loads(value)
                    if isinstance(told.get("error"), dict) and "status" not in told:
                        raise ValueError(told["error"]["message"])
                    yield event, told


class _Answer:
    """An answer and its connection, which are closed together."""

    def __init__(self, connection: http.client.HTTPConnection, answer: http.client.HTTPResponse):
        self._connection, self._answer = connection, answer
        self.read = answer.read

    def lines(self) -> Iterator[bytes]:
        """Line by line, as they come."""
        return iter(self._answer)

    def close(self) -> None:
        self._connection.close()
