"""Streams whose frames carry their own number as brightness, and a server that treats them badly."""

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest

STEP = 8  # grey levels from one frame to the next


def grey(number: int) -> np.ndarray:
    return np.full((32, 32, 3), number * STEP, np.uint8)


def numbers_of(pictures: list[np.ndarray]) -> list[int]:
    return [round(float(picture.mean()) / STEP) for picture in pictures]


@pytest.fixture(scope="session")
def grey_video(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Factory of videos of up to 30 grey frames, `rate` a second, each a key frame."""
    folder = tmp_path_factory.mktemp("grey")

    def make(name: str, frames: int = 20, rate: int = 2, first: int = 0, **options: str) -> Path:
        path = folder / f"{frames}-{rate}-{first}-{name}"
        if not path.exists():
            with av.open(str(path), "w", options=options) as container:
                stream = container.add_stream("libx264", rate=rate, options={"g": "1", "bf": "0", "crf": "1"})
                stream.width = stream.height = 32
                for number in range(first, first + frames):
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(grey(number), format="rgb24")))
                container.mux(stream.encode())
        return path

    return make


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Starts a server: `serve(answer)` gives its address; `answer(handler, n)` writes the n-th reply (from 0)."""
    servers = []

    def start(answer: Callable[[BaseHTTPRequestHandler, int], None]) -> str:
        asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(1)
                with suppress(BrokenPipeError, ConnectionResetError):  # the client had enough
                    answer(self, len(asked) - 1)

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/stream"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def reply(handler: BaseHTTPRequestHandler, data: bytes, length: int | None = None) -> None:
    """Send `data`, and by request a length that promises more."""
    handler.send_response(200)
    if length is not None:
        handler.send_header("Content-Length", str(length))
    handler.end_headers()
    handler.wfile.write(data)
