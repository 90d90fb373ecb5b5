"""A judge on this machine: answers the harness's questions by a rule, or misbehaves."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def by_rule(system: str, text: str) -> str:
    """Compares predicted with correct answers. Each dimension has numbers of its own, so that they cannot be mixed up:
    right and wrong give 5 and 2 for correctness, 4 and 1 for detail, 3 and 0 for context, 5 and 1 elsewhere."""
    (correct,) = re.findall(r"Correct Answer: (.*)", text)
    predicted = re.findall(r"Predicted Answer(?: to Question \d)?: (.*)", text)
    right = all(given == correct for given in predicted)
    if "'pred'" in text:
        return str({"pred": "yes" if right else "no", "score": 5 if right else 1})
    pairs = {"detail orientation": (1, 4), "factual accuracy": (2, 5), "contextual understanding": (0, 3)}
    wrong_and_right = next((pair for name, pair in pairs.items() if name in text), (1, 5))
    return str({"score": wrong_and_right[right]})


class FakeJudge:
    """`asked`: the texts of all requests. `reply(system, text, number)` gives content, or a status as an int; where
    `whole`, `reply(payload)` gives status and body."""

    def __init__(self, reply: Callable[..., Any], whole: bool = False):
        self.reply, self.whole, self.asked, self.lock = reply, whole, [], threading.Lock()
        self.url = ""

    def respond(self, payload: dict) -> Any:
        text = payload["messages"][-1]["content"]
        with self.lock:
            self.asked.append(text)
            number = len(self.asked)
        if self.whole:
            return self.reply(payload)
        return self.reply(payload["messages"][0]["content"], text, number)


@contextmanager
def fake_judge(reply: Callable[..., Any] | None = None, delay: float = 0.0, whole: bool = False):
    judge = FakeJudge(reply or (lambda system, text, number: by_rule(system, text)), whole)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            said = judge.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            time.sleep(delay)
            if not isinstance(said, tuple):
                usual = (200, {"choices": [{"message": {"content": said}}]})
                said = (said, {}) if isinstance(said, int) else usual
            status, body = said
            data = json.dumps({**body, "model": "fake"}).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except BrokenPipeError:  # the other side did not wait
                pass

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    judge.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
