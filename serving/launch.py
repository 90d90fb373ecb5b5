"""Starts the server's processes and stops them in peace."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from contextlib import suppress
from types import FrameType
from typing import Any

import uvicorn

from .guard import LOOPBACK, PatientProtocol
from .settings import Keys, ServerSettings
from .store import VideoStore

_SETTINGS, _READY, _PARENT = "VIDEO_MA2MBA_SERVER", "VIDEO_MA2MBA_SERVER_READY", "VIDEO_MA2MBA_SERVER_PARENT"
_CLOSING = threading.Event()


def application() -> Any:
    """The application of a process, by the settings that its parent left."""
    from video_ma2mba.loading import load_pipeline

    from .app import build_app

    log = logging.getLogger("video_ma2mba.serving")
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
    settings = ServerSettings.from_json(os.environ[_SETTINGS])

    def load() -> Any:
        return load_pipeline(
            settings.model,
            device=settings.device,
            dtype=settings.dtype,
            trust_remote_code=settings.trust_remote_code,
        )

    for sign in (signal.SIGINT, signal.SIGTERM):
        _also_close(sign)
    if _PARENT in os.environ:
        threading.Thread(target=_end_with, args=[int(os.environ[_PARENT])], daemon=True).start()
    app = build_app(settings, load, _CLOSING.is_set)
    threading.Thread(target=_say_when_ready, args=json.loads(os.environ[_READY]), daemon=True).start()
    return app


def _end_with(parent: int) -> None:
    """Stop when the process that watches over this one was killed: nobody else would, and the port stayed taken."""
    while not _CLOSING.wait(0.25):
        if os.name == "posix" and os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)
            return


def _say_when_ready(host: str, port: int, text: str) -> None:
    """Print a line as soon as somebody listens."""
    while not _CLOSING.wait(0.02):
        with suppress(OSError), socket.create_connection((host, port), 1.0):
            print(text, file=sys.stderr, flush=True)
            return


def _also_close(sign: signal.Signals) -> None:
    """Have the application know as soon as uvicorn is told to stop."""
    passed_on = signal.getsignal(sign)

    def stop(number: int, frame: FrameType | None) -> None:
        _CLOSING.set()
        if callable(passed_on):
            passed_on(number, frame)

    signal.signal(sign, stop)


def free_port(host: str, port: int) -> int:
    """The port to listen at; for 0 a free one. Raises OSError that says what to do where it is taken."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as bound:
            return bound.getsockname()[1]
    except OSError as error:
        raise OSError(
            f"{host}:{port} cannot be listened at ({error.strerror or error}): choose another --port"
        ) from None


def run(settings: ServerSettings, host: str, port: int, workers: int = 1) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        workers: processes, each with a model of its own; they share the states.

    Raises:
        OSError, ValueError: the port is taken, the folder of states or the keys cannot be used.
    """
    keys, port = Keys(settings.keys_file), free_port(host, port)
    VideoStore(settings.states, settings.max_states_bytes).close()
    if host not in LOOPBACK and not keys.needed:
        print("warning: everybody who reaches this address may use it: give --api-key-file", file=sys.stderr)
    shown = f"[{host}]" if ":" in host else host
    os.environ[_SETTINGS] = settings.as_json()
    text = f"video-ma2mba serves at http://{shown}:{port}/v1 (states: {settings.states})"
    os.environ[_READY] = json.dumps([{"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port, text])
    for sign in (signal.SIGINT, signal.SIGTERM):  # uvicorn passes on what it was sent when all is done
        signal.signal(sign, lambda *_: None)
    with tempfile.TemporaryDirectory(prefix="video-ma2mba-metrics-") as scratch:
        if workers > 1:
            os.environ |= {"PROMETHEUS_MULTIPROC_DIR": scratch, _PARENT: str(os.getpid())}
        uvicorn.run(
            f"{__name__}:application",
            factory=True,
            host=host,
            port=port,
            workers=workers,
            http=PatientProtocol,
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=15,
            timeout_worker_healthcheck=60,  # a large model that is being loaded answers late
            timeout_graceful_shutdown=int(settings.stop_seconds),
        )
