"""The server under load: the second question about an hour of film, many clients at once, and thousands of requests.

    OMP_NUM_THREADS=2 python benchmarks/serving.py first --film hour.mp4 --peer   # beside `transformers serve`
    python benchmarks/serving.py clients --clients 64                            # in batches, and one by one
    python benchmarks/serving.py soak --requests 10000                           # memory before, meanwhile and after
    python benchmarks/serving.py clients --preset 2.7b --device cuda             # CLIP-L + 2.7B with random weights

`video-ma2mba world render --out DIR --count 1 --frames 3600..3600` makes an hour of film with questions about it.
Without a film, a state of so many frames of noise is uploaded: that needs no decoder. "first": seconds from sending a
question to its first word, by server-sent events, of questions that follow the first one; `--peer` asks
`transformers serve` the same about the same file with the same checkpoint, at its own 32 frames and at all of them.
Servers and clients run on this machine and talk over its loopback alone. Appends to `results/serving.csv`.
"""

import argparse
import contextlib
import datetime
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from result_tables import append_rows, hardware

OUT = Path(__file__).parent / "results" / "serving.csv"
FIELDS = ("what", "server", "model", "frames", "clients", "requests", "failed", "questions a second")
FIELDS += ("first token ms p50", "first token ms p90", "latency ms p50", "latency ms p90", "latency ms p99")
FIELDS += ("server MB begin", "server MB most", "server MB end", "load", "hardware", "threads", "date")
QUESTIONS = ("How many squares are there?", "What is shown?", "Which came last?", "Which sign did the card show?")


@contextlib.contextmanager
def running(words: list[str], ready: str, log: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server in a process of its own, and what its log says behind `ready`."""
    with log.open("wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 300
        while (found := re.search(ready, log.read_text(encoding="utf-8", errors="replace"))) is None:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(log.read_text(encoding="utf-8", errors="replace"))
            time.sleep(0.1)
        yield process, found[1]
    except Exception:
        print(f"--- {log.name}", log.read_text(encoding="utf-8", errors="replace")[-3000:], sep="\n", flush=True)
        raise
    finally:
        process.terminate()
        process.wait(60)


def post(port: int, path: str, body: bytes, kind: str = "application/json") -> Any:
    """What a server answers, parsed."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3600)
    connection.request("POST" if body else "GET", path, body or None, {"Content-Type": kind})
    answer = connection.getresponse()
    text = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"{answer.status}: {text[:500]!r}")
    return json.loads(text) if text.startswith(b"{") else text


def first_words(port: int, request: dict[str, Any]) -> tuple[float, float, str]:
    """Seconds to the first word and to the end of a streamed answer, and the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3600)
    began, first, text = time.perf_counter(), None, ""
    connection.request("POST", "/v1/chat/completions", json.dumps(request), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(f"{answer.status}: {answer.read()[:500]!r}")
    for line in answer:
        if not line.startswith(b"data: {"):
            continue
        told = json.loads(line[6:])
        if "error" in told:
            raise RuntimeError(told)
        for choice in told["choices"]:
            piece = choice["delta"].get("content") or ""
            first = time.perf_counter() if piece and first is None else first
            text += piece
    ended = time.perf_counter()
    return (first or ended) - began, ended - began, text


def asked(video: str, question: str, **settings: Any) -> dict[str, Any]:
    """A request about a video."""
    parts = [{"type": "video_url", "video_url": {"url": video}}, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": parts}], "temperature": 0, **settings}


def spread(values: list[float], name: str, points: tuple[int, ...]) -> dict[str, float]:
    """Percentiles in milliseconds."""
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else values * 99
    return {f"{name} ms p{point}": round(cuts[point - 1] * 1e3, 1) for point in points}


def megabytes(process: subprocess.Popen) -> float:
    """Resident memory of a server's process."""
    with contextlib.suppress(OSError):
        pages = int(Path(f"/proc/{process.pid}/statm").read_text(encoding="utf-8").split()[1])
        return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)
    return 0.0


class Bench:
    """One run of this script."""

    def __init__(self, arguments: argparse.Namespace, scratch: Path):
        self.arguments, self.scratch = arguments, scratch
        self.model = arguments.model
        self.name = arguments.model or "bundled, fp32"
        if arguments.preset:
            self.model, self.name = str(scratch / "model"), f"CLIP-L + {arguments.preset}, random, bf16"
            self._make_model()

    def _make_model(self) -> None:
        from random_models import processor_of, video_model

        model = video_model(self.arguments.preset, device=self.arguments.device)
        head = model.lm_head.weight.data  # only letters, so that there are words to wait for
        printable = [6 + byte for byte in range(33, 127)]
        others = torch.ones(len(head), dtype=torch.bool, device=head.device)
        others[printable] = False
        head[others] = 0
        processor_of(model.config).save_pretrained(self.model)
        model.save_pretrained(self.model)
        del model
        if self.arguments.device != "cpu":
            torch.cuda.empty_cache()

    def note(self, **row: Any) -> None:
        """Print a row, and add it to the table."""
        about = {"model": self.name, "load": round(os.getloadavg()[0], 1), "date": datetime.date.today().isoformat()}
        about |= {"hardware": hardware(self.arguments.device), "threads": torch.get_num_threads()}
        print(row, flush=True)
        append_rows(self.arguments.out, [{name: {**about, **row}.get(name, "") for name in FIELDS}])

    @contextlib.contextmanager
    def ours(self, name: str, **options: Any) -> Iterator[tuple[subprocess.Popen, int]]:
        """`video-ma2mba serve`."""
        words = [sys.executable, "-m", "video_ma2mba", "serve", "--port", "0", "--states", str(self.scratch / name)]
        words += ["--device", self.arguments.device] + (["--model", self.model] if self.model else [])
        words += [word for option, value in options.items() for word in (f"--{option.replace('_', '-')}", str(value))]
        with running(words, r"serves at http://\S+?:(\d+)/v1", self.scratch / f"{name}.log") as (process, port):
            yield process, int(port)

    def video(self, port: int) -> dict[str, Any]:
        """The film, read by the server; or a state of noise."""
        if self.arguments.film is not None:
            sent = post(port, "/v1/videos?fps=1", self.arguments.film.read_bytes(), "video/mp4")
            began = time.monotonic()
            post(port, f"/v1/videos/{sent['id']}/events", b"")
            print(f"read in {time.monotonic() - began:.1f} s", flush=True)
            return post(port, f"/v1/videos/{sent['id']}", b"")
        return post(port, "/v1/videos", self._noise().read_bytes(), "application/octet-stream")

    def _noise(self) -> Path:
        """A file with a state of noise, made once."""
        file = self.scratch / "noise.state"
        if not file.exists():
            make = [sys.executable, __file__, "noise", "--device", self.arguments.device, "--state", str(file)]
            make += ["--frames", str(self.arguments.frames)] + (["--model", self.model] if self.model else [])
            subprocess.run(make, check=True)
        return file

    def first(self) -> None:
        """The second question and those that follow, one at a time."""
        with self.ours("first") as (_, port):
            video = self.video(port)
            self._first("video-ma2mba serve", port, video["frames"], f"state:{video['id']}", {})
        if self.arguments.peer:
            words = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve"]
            words += ["--port", "8499", "--device", self.arguments.device, "--trust-remote-code", "--dtype", "float32"]
            from video_ma2mba import BUNDLED_CHECKPOINT

            peers = {"model": self.model or str(BUNDLED_CHECKPOINT)}
            with self._peer(words):
                film = self.arguments.film.resolve().as_uri()
                self._first("transformers serve", 8499, 32, film, peers, self.arguments.repeats)
                everything = {"chat_template_kwargs": {"num_frames": None, "fps": 1.0}}
                self._first("transformers serve", 8499, video["frames"], film, peers | everything, 2)

    @contextlib.contextmanager
    def _peer(self, words: list[str]) -> Iterator[None]:
        log = (self.scratch / "peer.log").open("wb")
        process = subprocess.Popen(words, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while True:
                with contextlib.suppress(OSError, RuntimeError):
                    post(8499, "/health", b"")
                    break
                if time.monotonic() > deadline or process.poll() is not None:
                    said = (self.scratch / "peer.log").read_text(encoding="utf-8", errors="replace")
                    raise RuntimeError(said[-3000:])
                time.sleep(0.3)
            yield
        finally:
            process.terminate()
            process.wait(30)
            log.close()

    def _first(
        self, server: str, port: int, frames: int, video: str, more: dict[str, Any], repeats: int | None = None
    ) -> None:
        repeats = repeats or 4 * self.arguments.repeats
        firsts, wholes = [], []
        for number in range(repeats + 1):
            request = asked(video, QUESTIONS[number % len(QUESTIONS)], max_tokens=16, stream=True, **more)
            first, whole, answer = first_words(port, request)
            if number:  # the first loads what later ones find
                firsts.append(first)
                wholes.append(whole)
            print(server, round(first * 1e3, 1), answer, flush=True)
        self.note(what="second question", server=server, frames=frames, clients=1, requests=repeats, failed=0,
                  **spread(firsts, "first token", (50, 90)), **spread(wholes, "latency", (50, 90)))  # fmt: skip

    def clients(self) -> None:
        """The same load for a server that answers in batches and for one that answers one by one; before it, alone."""
        with ThreadPoolExecutor(3) as pool, contextlib.ExitStack() as stack:  # all start at the same time
            made = pool.submit(self._noise) if self.arguments.film is None else None
            servers = {
                batch: pool.submit(stack.enter_context, self.ours(f"b{batch}", max_batch=batch)) for batch in (64, 1)
            }
            if made is not None:
                made.result()
            for batch, started in servers.items():
                process, port = started.result()
                video = self.video(port)
                address, clients = f"state:{video['id']}", self.arguments.clients
                name = "video-ma2mba serve" + (", one by one" if batch == 1 else ", in batches")
                if batch > 1:
                    self._first(name, port, video["frames"], address, {})
                requests = self.arguments.requests or clients * 8
                for _ in range(2):  # graphs of every size are made
                    self._load(port, address, clients, clients)
                began = megabytes(process)
                row = self._load(port, address, clients, requests if batch > 1 else max(clients, requests // 8))
                memory = {"server MB begin": began, "server MB end": megabytes(process)}
                self.note(what="clients", server=name, frames=video["frames"], **row, **memory)

    def soak(self) -> None:
        """Thousands of requests of all kinds: memory stays what it was."""
        with self.ours("soak") as (process, port):
            video = self.video(port)
            self._load(port, f"state:{video['id']}", self.arguments.clients, 500)
            began, most = megabytes(process), [0.0]
            stop = threading.Event()

            def watch() -> None:
                while not stop.wait(0.5):
                    most[0] = max(most[0], megabytes(process))

            watcher = threading.Thread(target=watch)
            watcher.start()
            requests = self.arguments.requests or 10_000
            row = self._load(port, f"state:{video['id']}", self.arguments.clients, requests)
            stop.set()
            watcher.join()
            memory = {"server MB begin": began, "server MB most": most[0], "server MB end": megabytes(process)}
            self.note(what="soak", server="video-ma2mba serve", frames=video["frames"], **row, **memory)

    def _load(self, port: int, video: str, clients: int, requests: int) -> dict[str, Any]:
        """So many clients that ask one question after the other."""
        firsts: list[float] = []
        wholes: list[float] = []
        failed = 0
        numbers = iter(range(requests))
        lock = threading.Lock()
        deadline = time.monotonic() + self.arguments.longest

        def work() -> None:
            nonlocal failed
            while time.monotonic() < deadline:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                question = QUESTIONS[number % len(QUESTIONS)]
                request = asked(video, question, max_tokens=self.arguments.new_tokens, stream=True)
                try:
                    first, whole, _ = first_words(port, request)
                except (OSError, RuntimeError, http.client.HTTPException) as error:
                    failed += 1
                    print(f"request {number}: {error!r:.300}", flush=True)
                else:
                    firsts.append(first)
                    wholes.append(whole)

        began = time.perf_counter()
        threads = [threading.Thread(target=work) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - began
        row = {"clients": clients, "requests": len(wholes), "failed": failed}
        row["questions a second"] = round(len(wholes) / seconds, 2)
        return {**row, **spread(firsts, "first token", (50, 90)), **spread(wholes, "latency", (50, 90, 99))}

    def noise(self) -> None:
        """Write a state of frames of noise; a process of its own, which leaves the device to the server."""
        import numpy as np

        from video_ma2mba.loading import load_pipeline

        pipe = load_pipeline(self.model, device=self.arguments.device)
        frames = np.random.default_rng(0).integers(0, 255, (self.arguments.frames, 64, 64, 3), np.uint8)
        began = time.monotonic()
        pipe.read(frames).save(self.arguments.state)
        print(f"{self.arguments.frames} frames of noise read in {time.monotonic() - began:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("first", "clients", "soak", "noise"), nargs="+")
    parser.add_argument("--model", help="model directory (default: the bundled checkpoint)")
    parser.add_argument("--preset", help="random weights of this size")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--film", type=Path)
    parser.add_argument("--frames", type=int, default=3600, help="of noise, without a film")
    parser.add_argument("--peer", action="store_true", help="ask `transformers serve` as well")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--longest", type=float, default=900.0, help="seconds for a load")
    parser.add_argument("--state", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(arguments, Path(scratch))
        for what in arguments.what:
            getattr(bench, what)()


if __name__ == "__main__":
    main()
