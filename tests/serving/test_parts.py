"""Parts of the server by themselves: rows of a batch, the store, fetching, keys, and patience with clients."""

import asyncio
import errno
import hmac
import http.server
import itertools
import os
import queue
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers

from video_ma2mba import VideoMa2mbaProcessor, VideoMa2mbaVideoProcessor, VideoState
from video_ma2mba.loading import load_pipeline
from video_ma2mba.modeling_video_ma2mba.decode_graph import force_decoding
from video_ma2mba.processing.byte_tokenizer import build_byte_tokenizer

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from video_ma2mba.serving.answer_rows import AnswerRow, AnswerSettings, Ended, Piece, RowScores
from video_ma2mba.serving.answering import Answerer
from video_ma2mba.serving.conversations import conversation_of, sampling_of
from video_ma2mba.serving.errors import BadRequest, Forbidden, NotThere, ServingError, StoreFull, TooLarge
from video_ma2mba.serving.fetching import Fetcher, address_name, public_address
from video_ma2mba.serving.guard import Guard
from video_ma2mba.serving.service import Service
from video_ma2mba.serving.settings import Keys, ServerSettings
from video_ma2mba.serving.store import VideoStore, clean_name
from video_ma2mba.streaming.turns import Turns

TOKENIZER = build_byte_tokenizer()


def said(text: str | bytes, end: bool = False, **settings: Any) -> tuple[list[str], Ended | None]:
    """The pieces of an answer whose tokens are the bytes of a text."""
    found: list[Any] = []
    row = AnswerRow(None, [], AnswerSettings(**{"max_tokens": 1000, **settings}), TOKENIZER, [0], found.append)
    data = text.encode() if isinstance(text, str) else text
    for byte in data:
        row.put(torch.tensor([6 + byte]))
    if end:
        row.put(torch.tensor([0]))
    pieces = [what.text for what in found if isinstance(what, Piece)]
    return pieces, next((what for what in found if isinstance(what, Ended)), None)


def test_text_comes_in_whole_characters_and_without_spaces_around_it():
    pieces, ended = said("  Grüße 🎬 \n", end=True)
    assert "".join(pieces) == "Grüße 🎬" and pieces[0] == "G" and "ü" in pieces
    assert ended == Ended("stop", len("  Grüße 🎬 \n".encode()) + 1)
    assert "".join(said(b"a\xf0\x9f", end=True)[0]) == TOKENIZER.decode([6 + b for b in b"a\xf0\x9f"])


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one END two", ("END",), "one"),
        ("one EN two", ("END",), "one EN two"),
        ("aab", ("ab",), "a"),
        ("abcabd", ("abd", "zz"), "abc"),
        ("xyz", ("z", "xy"), ""),
    ],
)
def test_stop_strings_are_never_shown(text: str, stop: tuple[str, ...], expected: str):
    pieces, ended = said(text, end=True, stop=stop)
    assert "".join(pieces) == expected and ended.reason == "stop"
    for shown in itertools.accumulate(pieces):
        assert expected.startswith(shown)


def test_answers_end_at_their_length():
    pieces, ended = said("abcdef", max_tokens=4)
    assert ("".join(pieces), ended) == ("abcd", Ended("length", 4))


def test_rows_of_a_batch_are_drawn_by_their_own_settings():
    """Temperature and top_p against transformers' own processors, greedy rows beside them."""
    scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 3
    settings = [(0.7, 0.8), (0.0, 1.0), (1.5, 0.3), (1.0, 1.0)]
    rows = [AnswerRow(None, [], AnswerSettings(temperature=t, top_p=p), TOKENIZER, [0], print) for t, p in settings]
    found = RowScores(rows, "cpu")(torch.zeros(4, 1, dtype=torch.long), scores)
    for number, (temperature, top_p) in enumerate(settings):
        row = scores[number : number + 1]
        if temperature == 0:
            assert found[number].softmax(-1).argmax() == row.argmax() and found[number].isfinite().sum() == 1
            continue
        expected = transformers.TemperatureLogitsWarper(temperature)(None, row) if temperature != 1 else row
        expected = transformers.TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
        torch.testing.assert_close(found[number], expected[0])


def test_penalties_and_bias_are_openais():
    settings = AnswerSettings(frequency_penalty=0.5, presence_penalty=0.25, logit_bias=((9, 2.0),))
    row = AnswerRow(None, [], settings, TOKENIZER, [0], lambda what: None)
    for token in (7, 7, 8):
        row.put(torch.tensor([token]))
    found = row.adjusted(torch.zeros(12))
    assert found.tolist() == [0, 0, 0, 0, 0, 0, 0, -1.25, -0.75, 2.0, 0, 0]


@pytest.mark.parametrize("way", ["steps", "eager"])
def test_answers_by_the_decoder_are_those_of_the_model(way: str, make_model: Any):
    """The way of a GPU, without its graphs: batches filled up, states handed from slice to slice, rows that join."""
    model = make_model()
    states = []
    for seed in range(3):
        prompt = torch.randint(6, 200, (1, 40), generator=torch.Generator().manual_seed(seed))
        states.append(model.read(prompt))
    questions = [[7 + number, 100, 50 + number] + [9] * number for number in range(9)]
    lengths = [21, 3, 12, 30, 1, 17, 8, 25, 40]
    expected = []
    for number, (question, most) in enumerate(zip(questions, lengths, strict=True)):
        settings = {"max_new_tokens": most, "do_sample": False, "eos_token_id": 0, "pad_token_id": 1}
        ids = torch.tensor([question])
        found = model.generate(input_ids=ids, past_key_values=states[number % 3].fork(), **settings)[
            0, len(question) :
        ]
        expected.append(TOKENIZER.decode(found, skip_special_tokens=True).strip())
    with force_decoding(way):
        answerer = Answerer(model, TOKENIZER, Turns(), most_rows=6, buckets=(1, 4, 8))
        answers: queue.Queue[tuple[int, Any]] = queue.Queue()
        for number, (question, most) in enumerate(zip(questions, lengths, strict=True)):
            own = [AnswerSettings(temperature=0.0, max_tokens=most, top_logprobs=1 if number == 5 else None)]
            answerer.ask(states[number % 3], question, own, lambda _, what, n=number: answers.put((n, what)))
        texts, left = [""] * 9, 9
        while left:
            number, what = answers.get(timeout=60)
            assert not isinstance(what, Exception), what
            texts[number] += what.text if isinstance(what, Piece) else ""
            left -= isinstance(what, Ended)
        answerer.close()
    assert texts == expected


def test_seeds_are_an_answers_own():
    def seeds(seed: int | None) -> list[int | None]:
        row = AnswerRow(None, [], AnswerSettings(seed=seed), TOKENIZER, [0], print)
        found = []
        for row.slices in range(3):
            found.append(row.slice_seed)
        return found

    assert seeds(1) == seeds(1) and len({*seeds(1), *seeds(2)}) == 6 and seeds(None) == [None] * 3
    assert all(0 <= seed < 2**63 for seed in seeds(-5))


def test_conversations_are_taken_apart_by_many_threads_at_once():
    """A chat template that transformers has compiled serves one caller at a time."""
    processor = VideoMa2mbaProcessor(
        TOKENIZER, VideoMa2mbaVideoProcessor(size={"height": 16, "width": 16}), tokens_per_frame=4
    )
    told = [[{"role": "user", "content": f"{number} {'word ' * 200}"}] for number in range(200)]
    alone = [conversation_of(processor, messages, {}).question for messages in told]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads meet more often than they would
    try:
        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(lambda messages: conversation_of(processor, messages, {}).question, told)) == alone
    finally:
        sys.setswitchinterval(interval)


def test_a_question_asks_for_times_where_they_are_wanted():
    processor = VideoMa2mbaProcessor(
        TOKENIZER, VideoMa2mbaVideoProcessor(size={"height": 16, "width": 16}), tokens_per_frame=4, frame_times="text"
    )
    messages = [{"role": "user", "content": "What comes at 80 s?"}]
    asked = [
        TOKENIZER.decode(conversation_of(processor, messages, {}, None, times).question) for times in (False, True)
    ]
    assert "What comes at 1:20?" in asked[0] and "Give" not in asked[0]
    assert "What comes at 1:20? Give the times." in asked[1]


# the store


def small_state(make_text_config: Any, frames: int = 1) -> VideoState:
    state = VideoState.zeros(make_text_config())
    state.metadata |= {"frames": str(frames), "seconds": "2.5", "fps": "2.0"}
    return state


def test_the_store_keeps_to_its_size(tmp_path: Path, make_text_config):
    state = small_state(make_text_config)
    state.save(tmp_path / "one")
    size = (tmp_path / "one").stat().st_size
    store = VideoStore(tmp_path / "store", int(3.5 * size))
    made = [store.finish(store.create("me", f"{n}.mp4", None, pinned=n == 0), state) for n in range(3)]
    assert [video.bytes for video in made] == [size] * 3 and (made[0].frames, made[0].fps) == (1, 2.0)
    store.touch(made[1])
    newest = store.finish(store.create("me", "new.mp4", None), state)
    left = {video.id for video in store.listed("me", 100)}
    assert left == {made[0].id, made[1].id, newest.id}  # not the pinned one, not the one asked last
    assert not store.state_file(made[2]).exists() and store.totals() == (3, 3 * size)
    for video in (made[1], newest):
        store.update(video, pinned=True)
    with pytest.raises(StoreFull, match="unpin"):
        store.check_room(size)
    other = VideoStore(tmp_path / "store", int(3.5 * size))  # another process
    assert {video.id for video in other.listed("me", 100)} == left
    with pytest.raises(NotThere):
        other.get(newest.id, "you")
    with store.lock(newest) as mine, other.lock(newest) as theirs:
        assert mine and not theirs
    other.delete(newest)
    with pytest.raises(NotThere):
        store.finish(newest, state)


def test_videos_that_somebody_waits_for_are_seen_before_they_make_room(tmp_path: Path, make_text_config):
    store = VideoStore(tmp_path, 1)
    state = small_state(make_text_config)
    waited = store.finish(store.create("", "waited for", None, lease=time.time() + 9), state)
    other = store.finish(store.create("", "other", None), state)
    assert {video.id for video in store.listed("")} == {waited.id, other.id}
    store.update(waited, lease=time.time() - 1)
    last = store.finish(store.create("", "last", None), state)
    assert [video.id for video in store.listed("")] == [last.id]


def test_what_nobody_can_use_is_forgotten_after_a_day(tmp_path: Path, make_text_config):
    store, now = VideoStore(tmp_path), time.time()
    facts = {"failed": {"status": "failed"}, "empty": {"status": "completed"}, "queued": {}}
    for name, given in facts.items():
        for age in (10, 90_000):
            store.create("", f"{name} {age}", None, used=now - age, **given)
    store.create("", "kept", None, status="completed", pinned=True, used=now - 90_000)
    store.finish(store.create("", "read", None), small_state(make_text_config), used=now - 90_000)
    for number in range(3):
        store.remember_address("", f"http://films.example/{number}", "", "", "", 0)
    store.forget_abandoned()
    left = {video.name for video in store.listed("", 100)}
    assert left == {"failed 10", "empty 10", "queued 10", "queued 90000", "kept", "read"}
    assert store.remembered_address("", "http://films.example/0") is not None


def test_whose_fault_it_was_is_told(tmp_path: Path, tiny_checkpoint: Path, monkeypatch):
    """A reading that fails by the server's own mistake is none of the client's."""
    service = Service(load_pipeline(str(tiny_checkpoint), device="cpu"), ServerSettings(states=str(tmp_path)))
    faults = {
        TypeError("secret"): (500, "made a mistake (TypeError)"),
        OSError(errno.ENOSPC, "secret"): (507, "disk"),
        PermissionError(errno.EACCES, "secret"): (500, "PermissionError"),
        ValueError("no video"): (400, "no video"),
        TooLarge("too long"): (413, "too long"),
    }
    for fault, (status, words) in faults.items():

        def fail(*_: Any, fault: Exception = fault, **__: Any) -> None:
            raise fault

        monkeypatch.setattr(service.reader, "film", fail)
        (tmp_path / "film").write_bytes(b"film")
        video = service.store.create("", "a.mp4", tmp_path / "film")
        service.reader.wake()
        with pytest.raises(ServingError, match=re.escape(words)) as told:
            asyncio.run(service.until_read(video))
        assert told.value.status == status and "secret" not in str(told.value)
        assert service.store.get(video.id).public()["error"]["code"] == told.value.code
    service.close()


@pytest.mark.parametrize("name", ["../../etc/passwd", "C:\\films\\a.mp4", "", "a\nb\x00.mp4", "x" * 5000, "\ud800"])
def test_names_are_for_people_alone(name: str):
    found = clean_name(name)
    assert 0 < len(found) <= 200 and found.isprintable() and not {"/", "\\"} & {*found}


# addresses


@pytest.mark.parametrize(
    "number",
    ["127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1", "::1",
     "fe80::1%eth0", "fc00::1", "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b:1::1", "64:ff9b::10.0.0.1",
     "::127.0.0.1", "::ffff:0:127.0.0.1", "2001:0:7f00:1::", "100::1", "5f00::1"],
)  # fmt: skip
def test_names_that_lead_into_private_networks_are_refused(number: str, monkeypatch: pytest.MonkeyPatch):
    def found(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (n, port)) for n in ("93.184.215.14", number)]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    with pytest.raises(Forbidden, match="private network"):
        public_address("films.example", 443)


def test_the_number_that_was_checked_is_the_one_connected_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A name that answers with another number the second time gains nothing (DNS rebinding)."""
    answers = iter(["93.184.215.14", "127.0.0.1", "127.0.0.1"])
    connected = []

    def refuse(address: tuple[str, int], timeout: float) -> socket.socket:
        connected.append(address)
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, **_: [(2, 1, 6, "", (next(answers), port))])
    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(BadRequest, match="cannot be fetched"):
        Fetcher(["*"]).fetch("https://films.example/a.mp4", tmp_path / "a")
    assert connected == [("93.184.215.14", 443)]


class Faulty(http.server.BaseHTTPRequestHandler):
    """A web server that keeps no promise; it tells what it was asked for."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(302 if self.path == "/away" else 200)
        for name, value in {
            "/short": [("Content-Length", "100")],
            "/away": [("Location", "http://[")],
            "/odd": [("Content-Length", "many")],
        }.get(self.path, ()):
            self.send_header(name, value)
        self.end_headers()
        for _ in range(40 if self.path == "/drip" else 1):
            self.wfile.write(b"film")
            time.sleep(0.05 if self.path == "/drip" else 0)

    def log_message(self, *_: Any) -> None:
        pass


def test_web_servers_that_keep_no_promise(tmp_path: Path):
    """Half a film is none; one that trickles in is given up; addresses in any letters are asked for as browsers do."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Faulty) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{served.server_port}"
        fetcher = Fetcher([here], longest=0.3)
        for path, words in (("/short", "4 of 100 bytes"), ("/away", "no address"), ("/drip", "more than 0.3 s")):
            with pytest.raises(BadRequest, match=words):
                fetcher.fetch(here + path, tmp_path / "film")
        for path in ("/odd", "/f\u00eflm \u2713.mp4?a=%20b".replace(" ", "%20")):
            assert fetcher.fetch(here + path, tmp_path / "film").size == 4
        served.shutdown()
    assert Faulty.asked[-1] == "/f%C3%AFlm%20%E2%9C%93.mp4?a=%20b"
    assert address_name(f"{here}/f%C3%AFlm.mp4?token=x") == "f\u00eflm.mp4"
    assert address_name("https://user:word@films.example/") == "films.example"
    for host in ("a" * 64 + ".com", "a..b", "."):
        with pytest.raises(BadRequest, match="cannot be fetched"):
            Fetcher(["*"]).fetch(f"http://{host}/a.mp4", tmp_path / "film")


@pytest.mark.parametrize(
    ("entry", "address", "allowed"),
    [
        ("films.example", "https://films.example/a.mp4", True),
        ("films.example", "http://films.example:8080/a.mp4", True),
        ("films.example", "https://films.example.evil/a.mp4", False),
        ("films.example", "https://evil/films.example", False),
        ("films.example", "https://films.example@evil/a.mp4", False),
        ("https://films.example/pub", "https://films.example/pub/a.mp4", True),
        ("https://films.example/pub", "https://films.example/public/a.mp4", False),
        ("https://films.example/pub/", "https://films.example/pub/../secret", False),
        ("https://films.example/pub/", "https://films.example/pub/%2e%2e/secret", False),
        ("https://films.example/pub", "http://films.example/pub/a.mp4", False),
        ("https://films.example", "https://films.example:444/a.mp4", False),
        ("http://films.example:81/", "http://films.example:81/a.mp4", True),
    ],
)
def test_lists_of_addresses_mean_what_they_say(entry: str, address: str, allowed: bool):
    if allowed:
        assert Fetcher([entry]).check(address).hostname == "films.example"
    else:
        with pytest.raises(Forbidden):
            Fetcher([entry]).check(address)


# keys, settings, clients


def test_every_key_is_compared_whatever_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "keys"
    file.write_text("# mine\nfirst-key\n\nsecond-key\nthird-key\n")
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: bool(compared.append((len(a), len(b))) or a == b))
    keys = Keys(file)
    owners = [keys.owner(key) for key in ("first-key", "third-key", "first-ke", "", "\ud800")]
    assert owners[0] and owners[1] and owners[0] != owners[1] and owners[2:] == [None] * 3
    assert compared == [(32, 32)] * 15
    for text, words in (("short\n", "at least 8"), ("has a space\n", "no spaces"), ("# none\n", "holds no key")):
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            Keys(file)


@pytest.mark.parametrize(
    "given",
    [
        {"fps": "nan"},
        {"fps": 0},
        {"fps": 1001},
        {"fps": 10**400},
        {"num_frames": 0},
        {"max_frames": 0},
        {"start": "1:2:3:4"},
        {"fps": -1},
        {"fps": True},
        {"num_frames": 2.5},
        {"fps": 1, "num_frames": 2},
        {"start": 5, "end": 4},
    ],
)
def test_sampling_that_makes_no_sense_is_refused(given: dict[str, Any]):
    with pytest.raises(BadRequest):
        sampling_of(given, "")
    assert sampling_of({"fps": "2", "start": 0, "end": None, "num_frames": ""}, "") == {"fps": 2.0, "start": 0.0}
    assert sampling_of({"start": "1:30", "end": "0:02:00.5"}, "") == {"start": 90.0, "end": 120.5}


def talk(parts: list[bytes], pause: float, takes: bool = True, **settings: Any) -> list[dict[str, Any]]:
    """What a client hears that sends its request in parts, with pauses between them."""
    heard: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    async def run() -> None:
        left = [*parts]

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(pause if left else 3600)
            return {"type": "http.request", "body": left.pop(0), "more_body": True}

        async def send(message: dict[str, Any]) -> None:
            if not takes:
                await asyncio.sleep(3600)
            heard.append(message)

        guard = Guard(app, ServerSettings(**settings), Keys(None), lambda: False)
        headers = [(b"content-length", b"10000"), (b"host", b"localhost")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/videos",
            "headers": headers,
            "client": ("127.0.0.1", 1),
        }
        await asyncio.wait_for(guard(scope, receive, send), 30)

    asyncio.run(run())
    return heard


def test_clients_that_stop_or_drip_are_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("video_ma2mba.serving.guard._DRAIN_SECONDS", 0.05)
    for pause, parts in ((3600.0, [b"x"]), (0.02, [b"x"] * 1000)):  # stops, or sends fifty bytes a second
        heard = talk(parts, pause, idle_seconds=0.2, slowest=10_000.0)
        assert heard[0]["status"] == 408 and b"too slowly" in heard[1]["body"]
    assert talk([b"x" * 100] * 100 + [b""], 0.0, takes=False, idle_seconds=0.2, max_upload_bytes=100) == []


def test_a_server_that_stops_says_so():
    async def run() -> int:
        heard: list[dict[str, Any]] = []

        async def send(message: dict[str, Any]) -> None:
            heard.append(message)

        guard = Guard(None, ServerSettings(), Keys(None), lambda: True)
        scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": [], "client": None}
        await guard(scope, None, send)
        return heard[0]["status"]

    assert asyncio.run(run()) == 503


@pytest.mark.skipif(os.name != "posix", reason="who a process's parent is, is told by POSIX alone")
def test_a_worker_ends_with_its_parent():
    """Killed, a parent ends nobody; a worker left behind would hold the port."""
    worker = "import os, time; from video_ma2mba.serving.launch import _end_with; _end_with(os.getppid())"
    parent = f"""
import subprocess, sys, time
print(subprocess.Popen([sys.executable, "-c", {worker!r}]).pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        number = int(process.stdout.readline())
        time.sleep(1.0)
        os.kill(number, 0)  # as long as there is a parent, it stays
        process.kill()
    deadline = time.monotonic() + 30
    with suppress(ProcessLookupError):
        while True:
            os.kill(number, 0)
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_settings_travel_to_other_processes():
    settings = ServerSettings(model="x", allow_urls=["a"], max_states_bytes=5)
    assert ServerSettings.from_json(settings.as_json()) == settings
