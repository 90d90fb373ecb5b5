"""A real server process, started as its users start it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


class Server:
    """`video-ma2mba serve` in a process of its own.

    Attributes:
        url: where it listens, without `/v1`.
    """

    def __init__(self, log: Path, *options: object):
        self.log = log
        words = [sys.executable, "-m", "video_ma2mba", "serve", "--port", "0", "--device", "cpu", *map(str, options)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with log.open("ab") as file:
            self.began = file.tell()
            self.process = subprocess.Popen(words, stdout=file, stderr=file, env=environment, start_new_session=True)
        self.url = ""

    def wait(self) -> "Server":
        """Until it is ready."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            text = self.log.read_bytes()[self.began :].decode()
            found = re.search(r"serves at (http://\S+)/v1", text)
            if found:
                self.url = found[1]
                return self
            assert self.process.poll() is None, text
            time.sleep(0.05)
        raise TimeoutError(self.log.read_text())

    def stop(self, sign: int = signal.SIGTERM) -> int:
        """End it; its exit code."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, sign)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Starts servers that end with the tests of a file."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    started: list[Server] = []

    def make(*options: object) -> Server:
        started.append(Server(log, *options))
        return started[-1]

    yield make
    for server in started:
        server.stop(signal.SIGKILL)
