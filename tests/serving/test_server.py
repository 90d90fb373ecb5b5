"""One server in a process of its own: the openai client, plain HTTP, keys, limits, and what a crash leaves behind."""

import base64
import functools
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from video_ma2mba import VideoState
from video_ma2mba.loading import load_pipeline

pytest.importorskip("llguidance")
openai = pytest.importorskip("openai")

KEYS = ("first-key-0001", "second-key-0002")
QUESTIONS = ("What happens?", "Which colour is it in the end?", "How many?")


class Reply:
    """An answer of the server: `status`, `headers`, `body` (bytes) and `json`."""

    def __init__(self, status: int, headers: Any, body: bytes):
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """Plain HTTP with a key."""

    def __init__(self, url: str, key: str | None = KEYS[0]):
        self.url, self.key = url, key

    def __call__(self, method: str, path: str, body: Any = None, kind: str | None = None, **headers: str) -> Reply:
        if isinstance(body, dict | list):
            body, kind = json.dumps(body).encode(), "application/json"
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        headers |= {"Content-Type": kind} if kind else {}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        request = urllib.request.Request(self.url + path, data=body, method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return Reply(answer.status, answer.headers, answer.read())
        except urllib.error.HTTPError as error:
            return Reply(error.code, error.headers, error.read())

    def form(self, path: str, files: list[tuple[str, str, bytes]], **fields: object) -> Reply:
        """A form as browsers send it."""
        parts = [
            f'--XX\r\nContent-Disposition: form-data; name="{n}"\r\n\r\n{v}\r\n'.encode() for n, v in fields.items()
        ]
        for field, name, data in files:
            head = f'--XX\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n'
            parts.append(f"{head}Content-Type: application/octet-stream\r\n\r\n".encode() + data + b"\r\n")
        return self("POST", path, b"".join(parts) + b"--XX--\r\n", "multipart/form-data; boundary=XX")

    def upload(self, data: bytes, name: str = "film.mp4", **fields: object) -> dict[str, Any]:
        """A video, read to its end."""
        sent = self.form("/v1/videos", [("file", name, data)], **fields)
        assert sent.status == 200, sent.body
        return self.wait(sent.json["id"])

    def wait(self, video_id: str) -> dict[str, Any]:
        """A video when it has been read, by its events."""
        events = self("GET", f"/v1/videos/{video_id}/events").body.decode()
        name, data = re.findall(r"event: (\w+)\ndata: (.*)\n\n", events)[-1]
        assert name in ("completed", "failed"), events
        return json.loads(data)

    def ask(self, video: str | None, question: Any, **settings: Any) -> Reply:
        """A question about a video, greedily."""
        parts = [] if video is None else [{"type": "video_url", "video_url": {"url": video}}]
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
        return self(
            "POST", "/v1/chat/completions", {"temperature": 0, "max_tokens": 24, "messages": messages} | settings
        )


class Films(http.server.SimpleHTTPRequestHandler):
    """Serves a folder with validators, and redirects; counts whole answers."""

    whole = 0

    def do_GET(self) -> None:
        if self.path.startswith("/away?"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/away?"))
            self.end_headers()
            return
        super().do_GET()

    def copyfile(self, source: Any, outputfile: Any) -> None:
        Films.whole += 1
        super().copyfile(source, outputfile)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def films(tiny_video: Path) -> Iterator[str]:
    """A web server on this machine with a film."""
    handler = functools.partial(Films, directory=str(tiny_video.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


@pytest.fixture(scope="module")
def options(tiny_checkpoint: Path, films: str, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text("# two users\n\n" + "\n".join(KEYS) + "\n")
    folder = tmp_path_factory.mktemp("serving") / "states"
    limits = ["--max-upload-mb", 3, "--max-seconds", 1000, "--max-queue", 6, "--save-every", 0]
    allowed = ["--allow-url", films, "--allow-url", "localhost", "--allow-origin", films]
    return ["--model", tiny_checkpoint, "--states", folder, "--api-key-file", keys, *limits, *allowed]


@pytest.fixture(scope="module")
def server(start: Callable[..., Any], options: list[Any]) -> Any:
    return start(*options).wait()


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint: Path) -> Any:
    """The same model in this process: what it says by itself is what the server has to say."""
    return load_pipeline(str(tiny_checkpoint), device="cpu")


@pytest.fixture(scope="module")
def state(pipe: Any, tiny_video: Path) -> VideoState:
    return pipe.read(str(tiny_video), fps=2)


@pytest.fixture(scope="module")
def client(server: Any) -> Client:
    return Client(server.url)


@pytest.fixture(scope="module")
def film(client: Client, tiny_video: Path) -> dict[str, Any]:
    return client.upload(tiny_video.read_bytes(), fps=2)


@pytest.fixture(scope="module")
def ai(server: Any) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[0], max_retries=0)


def messages(video: dict[str, Any] | str, *turns: str) -> list[dict[str, Any]]:
    """A conversation about a video: question, answer, question, …"""
    address = video if isinstance(video, str) else f"state:{video['id']}"
    first = [{"type": "text", "text": turns[0]}, {"type": "video_url", "video_url": {"url": address}}]
    rest = [{"role": ("user", "assistant")[place % 2], "content": turn} for place, turn in enumerate(turns)][1:]
    return [{"role": "user", "content": first}, *rest]


def test_a_video_is_uploaded_read_and_described(client: Client, film: dict[str, Any]):
    assert film["status"] == "completed" and film["progress"] == 100 and film["name"] == "film.mp4"
    assert (film["frames"], film["fps"], film["seconds"]) == (12, 2.0, 6.0)
    assert client("GET", f"/v1/videos/{film['id']}").json == film
    listed = client("GET", "/v1/videos?limit=1&order=asc").json
    assert listed["data"] == [film] and listed["object"] == "list"
    assert client("GET", f"/v1/videos?after={film['id']}&order=asc&limit=1").json["data"] != [film]
    assert client("GET", f"/v1/models/state:{film['id']}").json["name"] == "film.mp4"


def test_answers_are_those_of_the_model(ai: Any, film: dict[str, Any], pipe: Any, state: VideoState):
    for question in QUESTIONS:
        expected = pipe.ask(state, question, max_new_tokens=40)
        settings = {"model": "checkpoint", "messages": messages(film, question), "max_tokens": 40, "temperature": 0}
        answer = ai.chat.completions.create(**settings)
        assert answer.choices[0].message.content == expected
        assert answer.video == {"id": film["id"], "name": "film.mp4", "frames": 12, "fps": 2.0, "seconds": 6.0,
                                "read_seconds": film["read_seconds"], "cached": True}  # fmt: skip
        usage = answer.usage
        assert usage.prompt_tokens_details.cached_tokens == state.seen_tokens < usage.prompt_tokens
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        chunks = list(ai.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
        assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].video == answer.video
        assert chunks[-2].choices[0].finish_reason == answer.choices[0].finish_reason == "length"
        assert chunks[-1].usage == usage and len(chunks) > 3


def test_conversations_and_system_messages(ai: Any, film: dict[str, Any], pipe: Any, state: VideoState):
    def ask(said: list[Any], model: str = "") -> str:
        made = ai.chat.completions.create(model=model, messages=said, max_completion_tokens=16, temperature=0)
        return made.choices[0].message.content

    turns = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(("One?", "two", "Three?"))
    ]
    assert ask(messages(film, "One?", "two", "Three?")) == pipe.ask(state, turns, max_new_tokens=16)
    assert ask(turns, f"state:{film['id']}") == pipe.ask(
        state, turns, max_new_tokens=16
    )  # pages that know only models
    ruled = [{"role": "system", "content": "Be brief."}, *messages(film, "One?")]
    assert ask(ruled) == pipe.ask(state, "Be brief.\n\nOne?", max_new_tokens=16)
    assert ask([{"role": "user", "content": "Hello"}]) is not None  # and no video at all


def test_many_questions_at_once_get_the_answers_that_each_gets_alone(client: Client, film, pipe, state, server):
    asked = [f"{question} {number}" for number in range(8) for question in QUESTIONS]
    expected = pipe.ask(state, asked, max_new_tokens=24)
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda text: client.ask(f"state:{film['id']}", text).json, asked))
    assert [reply["choices"][0]["message"]["content"] for reply in found] == expected
    metrics = client("GET", "/metrics").body.decode()
    rows = {float(bound): float(n) for bound, n in re.findall(r'batch_rows_bucket\{le="([\d.]+)"\} ([\d.]+)', metrics)}
    assert rows[128.0] > rows[2.0], "some were answered together"
    assert 'video_ma2mba_requests_total{method="POST",route="/v1/chat/completions",status="200"}' in metrics


def test_sampling_settings(client: Client, film: dict[str, Any]):
    def texts(**settings: Any) -> list[str]:
        reply = client.ask(f"state:{film['id']}", "What?", **settings)
        assert reply.status == 200, reply.body
        return [choice["message"]["content"] for choice in reply.json["choices"]]

    drawn = texts(temperature=1.5, seed=5, n=3, max_tokens=40)
    assert len({*drawn}) == 3
    assert texts(temperature=1.5, seed=5, n=3, max_tokens=40) == drawn
    assert texts(temperature=1.5, seed=6, max_tokens=40) == [drawn[1]]  # alone as beside others
    (greedy,) = texts()
    assert texts(temperature=1.5, top_p=0.0, seed=1) == [greedy]
    stop = greedy[3:5]
    assert texts(stop=[stop, "never there"]) == [greedy.partition(stop)[0].rstrip()]
    assert texts(max_tokens=1)[0] == greedy[:1] or greedy[0] == "\ufffd"
    (other,) = texts(logit_bias={str(6 + ord(greedy[0])): -100}) if greedy[0].isascii() else [""]
    assert other[:1] != greedy[0]


def test_subtitles_are_read_and_times_asked_for(client: Client, film: dict[str, Any], tiny_video: Path, pipe: Any):
    told = "1\n00:00:01,000 --> 00:00:02,000\nGrüß\n"
    alone = pipe.read(str(tiny_video), fps=2, subtitles=[(1.0, 2.0, "Grüß")])
    data, files = tiny_video.read_bytes(), [("subtitles", "film.srt", told.encode("utf-16"))]
    sent = client.form("/v1/videos", [("file", "film.mp4", data), *files], fps=2)
    for video in (client.wait(sent.json["id"]), client.upload(data, fps=2, subtitles=told)):
        reply = client.ask(f"state:{video['id']}", QUESTIONS[0])
        assert reply.json["choices"][0]["message"]["content"] == pipe.ask(alone, QUESTIONS[0], max_new_tokens=24)
        assert (
            reply.json["usage"]["prompt_tokens"]
            > client.ask(f"state:{film['id']}", QUESTIONS[0]).json["usage"]["prompt_tokens"]
        )
    silent = client.upload(data, fps=2, subtitles="auto")  # it has no track
    answers = [client.ask(f"state:{video['id']}", "What?").json["choices"] for video in (silent, film)]
    assert answers[0] == answers[1]
    for wrong, said in (("nothing", "there are no subtitles in it"), (told.replace("00:00:0", "05:00:0"), "")):
        refused = client.form("/v1/videos", [("file", "film.mp4", data)], subtitles=wrong)
        assert refused.status == (400 if said else 200) and said in refused.body.decode()
    late = client("GET", f"/v1/videos/{refused.json['id']}/events").body.decode()
    assert "the video lasts 0:06: they are shifted" in late
    refused = client.ask(f"state:{film['id']}", "What?", times=True)
    assert refused.status == 400 and "never learnt times" in refused.body.decode()


def test_log_probabilities(ai: Any, film: dict[str, Any]):
    settings = {"model": "", "messages": messages(film, "What?"), "max_tokens": 5, "logprobs": True, "top_logprobs": 2}
    content = ai.chat.completions.create(**settings, temperature=0).choices[0].logprobs.content
    assert len(content) == 5
    for token in content:
        assert len(token.top_logprobs) == 2 and token.logprob == token.top_logprobs[0].logprob < 0
        assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
    chunks = ai.chat.completions.create(**settings, temperature=0, stream=True)
    streamed = [t for chunk in chunks if chunk.choices[0].logprobs for t in chunk.choices[0].logprobs.content]
    assert [round(token.logprob, 3) for token in streamed] == [round(token.logprob, 3) for token in content]


def test_answers_follow_a_schema(client: Client, film: dict[str, Any]):
    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}, "sure": {"type": "boolean"}}}
    schema |= {"required": ["colour", "sure"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "seen", "strict": True, "schema": schema}}
    for settings in ({}, {"temperature": 1.5, "seed": 2}):
        reply = client.ask(f"state:{film['id']}", "What?", response_format=form, max_tokens=60, **settings).json
        found = json.loads(reply["choices"][0]["message"]["content"])
        assert found["colour"] in ("red", "blue") and isinstance(found["sure"], bool) and len(found) == 2
        assert reply["choices"][0]["finish_reason"] == "stop"
    form["json_schema"]["schema"] = {"type": "nonsense"}
    refused = client.ask(f"state:{film['id']}", "What?", response_format=form)
    assert refused.status == 400 and refused.json["error"]["param"] == "response_format"


def test_videos_in_messages_are_read_once(client: Client, films: str, tiny_video: Path, pipe: Any):
    expected = pipe.ask(pipe.read(str(tiny_video), fps=3), "What?", max_new_tokens=24)
    data = f"data:video/mp4;base64,{base64.b64encode(tiny_video.read_bytes()).decode()}"
    before = Films.whole
    for number, address in enumerate([data, data, f"{films}/brighter.mp4", f"{films}/away?/brighter.mp4"]):
        reply = client.ask(address, "What?", mm_processor_kwargs={"fps": 3})
        assert reply.status == 200, reply.body
        assert reply.json["choices"][0]["message"]["content"] == expected
        assert reply.json["video"]["cached"] == (number > 0)
        assert (reply.json["video"]["frames"], reply.json["video"]["fps"]) == (18, 3.0)
    fetched = Films.whole
    assert fetched == before + 2
    client.ask(f"{films}/brighter.mp4", "What?", mm_processor_kwargs={"fps": 3})
    assert Films.whole == fetched, "the address says that nothing has changed"
    other = client.ask(data, "What?", mm_processor_kwargs={"fps": 1}).json  # another sampling is another reading
    assert other["video"]["frames"] == 6 and not other["video"]["cached"]
    sent = client("POST", "/v1/videos", {"url": f"{films}/brighter.mp4", "end": 2, "fps": 1})
    assert client.wait(sent.json["id"])["frames"] == 2


def test_several_videos_and_pictures_in_one_conversation(client: Client, tiny_video: Path, pipe: Any):
    data = f"data:video/mp4;base64,{base64.b64encode(tiny_video.read_bytes()).decode()}"
    png = BytesIO()
    Image.new("RGB", (20, 20), (200, 0, 0)).save(png, "PNG")
    picture = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    parts = [{"type": "video_url", "video_url": {"url": data}}, {"type": "image_url", "image_url": {"url": picture}}]
    said = [{"role": "user", "content": [*parts, {"type": "text", "text": "And?"}]}]
    reply = client("POST", "/v1/chat/completions", {"messages": said, "max_tokens": 16, "temperature": 0})
    assert reply.status == 200, reply.body
    own = [{"type": "video", "video": str(tiny_video)}, {"type": "image", "image": Image.open(png)}]
    prefix, question, readers = pipe.processor.streaming_prompt([{"role": "user", "content": [*own, "And?"]}])
    read = pipe.model.read(prefix, [reader.chunks() for reader in readers])
    ids = pipe.model.generate(input_ids=question, past_key_values=read, max_new_tokens=16, do_sample=False)
    expected = pipe.processor.tokenizer.decode(ids[0, question.shape[1] :], skip_special_tokens=True).strip()
    assert reply.json["choices"][0]["message"]["content"] == expected
    assert reply.json["video"]["frames"] == 7


def test_states_go_out_and_in(client: Client, film: dict[str, Any], state: VideoState, tmp_path: Path, pipe: Any):
    reply = client("GET", f"/v1/videos/{film['id']}/state")
    assert 'filename="film.state"' in reply.headers["Content-Disposition"]
    (tmp_path / "film.state").write_bytes(reply.body)
    found = VideoState.load(tmp_path / "film.state")
    assert found.fingerprint() == state.fingerprint()  # of the file, as it was read in this process
    assert str(tmp_path) not in str(found.metadata) and "states" not in found.metadata["video"]
    pipe.check(found)
    again = client.form("/v1/videos", [("file", "copy.state", reply.body)]).json
    assert (again["status"], again["frames"]) == ("completed", 12)
    live = client("POST", "/v1/videos", {"live": True, "name": "kept"}).json
    replaced = client("POST", f"/v1/videos/{live['id']}/state", reply.body, "application/octet-stream").json
    assert (replaced["frames"], replaced["name"]) == (12, "kept")
    expected = client.ask(f"state:{film['id']}", "What?").json["choices"]
    for video in (again, replaced):
        assert client.ask(f"state:{video['id']}", "What?").json["choices"] == expected
    for bad in (reply.body[:-5], reply.body[:2000] + b"x" + reply.body[2001:]):
        refused = client("POST", f"/v1/videos/{live['id']}/state", bad, "application/octet-stream")
        assert refused.status == 400 and "uploaded file" in refused.json["error"]["message"], refused.body
    for fact, said in (("frames", "many"), ("frames", "9" * 99), ("seconds", "nan"), ("fps", "-1")):
        VideoState(found.layers, found.seen_tokens, {**found.metadata, fact: said}).save(tmp_path / "bad.state")
        refused = client("POST", "/v1/videos", (tmp_path / "bad.state").read_bytes(), "application/octet-stream")
        assert refused.status == 400 and fact in refused.json["error"]["message"], refused.body
    assert client("GET", f"/v1/videos/{live['id']}").json["frames"] == 12, "what was there stays"


def test_live_frames_are_added(client: Client, pipe: Any, tiny_video: Path):
    live = client("POST", "/v1/videos", {"live": True, "fps": 4, "name": "camera"}).json
    assert client.ask(f"state:{live['id']}", "What?").status == 409
    frames = np.random.default_rng(0).integers(0, 255, (6, 16, 16, 3), np.uint8)
    sent = []
    for frame in frames:
        png = BytesIO()
        Image.fromarray(frame).save(png, "PNG")
        sent.append(png.getvalue())
    path = f"/v1/videos/{live['id']}/frames"
    assert client("POST", path, sent[0], "image/png").json["frames"] == 1
    added = client.form(path, [("frames", f"{n}.png", data) for n, data in enumerate(sent[1:])]).json
    assert (added["frames"], added["seconds"], added["fps"]) == (6, 1.5, 4.0)
    expected = pipe.ask(pipe.read(frames, fps=4), "What?", max_new_tokens=24)
    assert client.ask(f"state:{live['id']}", "What?").json["choices"][0]["message"]["content"] == expected
    film = client("POST", f"{path}?fps=2", tiny_video.read_bytes(), "video/mp4").json
    assert (film["frames"], film["seconds"]) == (18, 7.5)
    assert client("POST", path, b"no picture", "image/png").status == 400
    assert client("GET", f"/v1/videos/{live['id']}").json["frames"] == 18
    assert client("DELETE", f"/v1/videos/{live['id']}").json["deleted"]
    assert client.ask(f"state:{live['id']}", "What?").status == 404


def test_keys_and_other_peoples_videos(server: Any, client: Client, film: dict[str, Any]):
    for key in (None, "wrong-key-9999", KEYS[0][:-1], KEYS[0] + "x", "é"):
        refused = Client(server.url, key)("GET", "/v1/videos")
        assert refused.status == 401 and refused.json["error"]["code"] == "invalid_api_key"
        assert refused.headers["WWW-Authenticate"] == "Bearer"
    other = Client(server.url, KEYS[1])
    path = f"/v1/videos/{film['id']}"
    tries = [("GET", path), ("DELETE", path), ("GET", f"{path}/state"), ("GET", f"{path}/events")]
    tries += [("POST", f"{path}/state"), ("POST", f"{path}/frames"), ("GET", f"/v1/models/state:{film['id']}")]
    for method, address in tries:
        reply = other(method, address, b"x" if method == "POST" else None)
        assert reply.status == 404, (method, address)
        assert film["name"] not in reply.body.decode()
    assert other("POST", path, {"pinned": True}).status == 404
    assert other.ask(f"state:{film['id']}", "What?").status == 404
    assert other("GET", "/v1/videos").json["data"] == []
    assert [model["id"] for model in other("GET", "/v1/models").json["data"]] == ["checkpoint"]
    assert client("GET", path).json["id"] == film["id"]
    assert Client(server.url, None)("GET", "/health").json == {"status": "ok", "model": "checkpoint"}
    assert Client(server.url, None)("HEAD", "/health").status == 200
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong-key-9999", max_retries=0).models.list()


BAD_IDS = ["../../etc", "..%2f..%2findex.sqlite", "video_" + "0" * 31, "video_" + "g" * 32, "%00", "video_*", "."]


@pytest.mark.parametrize("video_id", BAD_IDS)
def test_ids_lead_nowhere_else(client: Client, video_id: str):
    for suffix in ("", "/state"):
        reply = client("GET", f"/v1/videos/{video_id}{suffix}")
        assert reply.status in (404, 405) and reply.json["error"]["type"] == "invalid_request_error"
    assert client.ask(f"state:{video_id}", "What?").status in (400, 404)


def test_file_names_lead_nowhere_else(client: Client, tiny_video: Path, options: list[Any]):
    folder = Path(options[3])
    video = client.upload(tiny_video.read_bytes(), "../../../out\x07side.mp4")
    assert video["name"] == "outside.mp4"
    for name, kept in (("a/../b\ud800\x07c", "bc"), ("", "video"), ("x" * 100_000, "x" * 200)):
        assert client("POST", f"/v1/videos/{video['id']}", {"name": name}).json["name"] == kept
    assert client("GET", f"/v1/videos/{video['id']}/state").status == 200
    assert {path.name for path in folder.iterdir()} - {"index.sqlite-wal", "index.sqlite-shm"} == {
        *("index.sqlite", "videos", "incoming")
    }
    assert not list(folder.parent.glob("*side*"))
    assert oct(folder.stat().st_mode & 0o777) == "0o700"


def bad_requests(film: str) -> dict[str, tuple[Any, int]]:
    """What is wrong, and the status that says so."""
    good = messages(f"state:{film}", "What?")

    def with_video(url: str, **more: Any) -> dict[str, Any]:
        return {
            "messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": url, **more}}, "x"]}]
        }

    return {
        "no messages": ({"messages": []}, 400),
        "no JSON": (b"{", 400),
        "nested": (b"[" * 100_000, 400),
        "another model": ({"model": "gpt-4o", "messages": good}, 404),
        "temperature": ({"messages": good, "temperature": 3}, 400),
        "too many answers": ({"messages": good, "n": 65}, 400),
        "tools": ({"messages": good, "tools": [{}]}, 400),
        "role": ({"messages": [{"role": "tool", "content": "x"}]}, 400),
        "empty question": ({"messages": [{"role": "user", "content": " "}]}, 400),
        "nothing to answer": ({"messages": [*good, {"role": "assistant", "content": "x"}]}, 400),
        "file": (with_video("/etc/passwd"), 400),
        "file address": (with_video("file:///etc/passwd"), 400),
        "frames of a state": (with_video(f"state:{film}", fps=2), 400),
        "bad data": (with_video("data:video/mp4;base64,!!"), 400),
        "no video": (with_video("data:video/mp4;base64,AAAA"), 400),
        "fps": (with_video("data:video/mp4;base64,AAAA", fps="many"), 400),
        "kind of a part": (
            {"messages": [{"role": "user", "content": [{"type": ["text"], "text": "x"}]}]},
            400,
        ),
        "no number of a host": (with_video("http://\ud800/a.mp4"), 400),
        "endless number": (with_video("data:,x", fps=10**400), 400),
        "no frames at all": (with_video("data:,x", fps=0), 400),
        "settings of videos": ({"messages": good, "media_io_kwargs": {"video": "x"}}, 400),
        "bias": ({"messages": good, "logit_bias": {"9" * 5000: 1}}, 400),
        "state second": ({"messages": [*messages("data:,x", "x", "y"), *good]}, 400),
    }


def test_errors_have_openais_form(client: Client, film: dict[str, Any]):
    for name, (body, status) in bad_requests(film["id"]).items():
        reply = client("POST", "/v1/chat/completions", body, "application/json")
        assert reply.status == status, (name, reply.body)
        assert reply.json["error"].keys() == {"message", "type", "param", "code"}, name
        assert reply.json["error"]["message"], name
    for method, path in (("GET", "/v1/nothing"), ("PUT", "/v1/videos"), ("POST", "/health")):
        reply = client(method, path, b"x" if method != "GET" else None)
        assert reply.status in (404, 405) and "error" in reply.json
    for path in ("/v1/videos?limit=many", "/v1/videos?order=new", "/v1/videos?limit=0"):
        reply = client("GET", path)
        assert reply.status == 400 and reply.json["error"]["param"] in ("limit", "order"), path
    beyond = client("GET", f"/v1/videos/{film['id']}/state", Range="bytes=999999999-")
    assert beyond.status == 416 and beyond.json["error"]["type"] == "invalid_request_error"  # a library's own answer


def test_addresses_are_fetched_only_where_allowed(client: Client, films: str, server: Any):
    port = films.rpartition(":")[2]
    refused = {
        "http://169.254.169.254/latest/meta-data": 403,
        f"http://127.0.0.2:{port}/brighter.mp4": 403,
        f"http://localhost:{port}/brighter.mp4": 403,  # on the list, but a name that leads into this machine
        f"{films}/away?http://127.0.0.1:{server.url.rpartition(':')[2]}/metrics": 403,
        f"{films}/away?http://169.254.169.254/": 403,
        f"{films}/away?file:///etc/passwd": 400,
        f"{films}/missing.mp4": 400,
        "ftp://localhost/film.mp4": 400,
        "http://127.0.0.1:99999/": 400,
    }
    for address, status in refused.items():
        for reply in (client("POST", "/v1/videos", {"url": address}), client.ask(address, "What?")):
            assert reply.status == status, (address, reply.body)


def test_what_is_too_large_or_no_video_is_refused(client: Client, tmp_path: Path):
    import av

    assert client.form("/v1/videos", [("file", "a.mp4", bytes(5_000_000))]).status == 413
    assert client("POST", "/v1/videos", bytes(5_000_000), "video/mp4").status == 413
    path = tmp_path / "long.mkv"
    with av.open(str(path), "w") as container:  # two frames, an hour apart
        stream = container.add_stream("mpeg4", rate=1)
        stream.width = stream.height = 16
        for second in (0, 3000):
            frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
            frame.pts = second
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"
    bomb = BytesIO()
    Image.new("1", (12_000, 12_000)).save(bomb, "PNG")
    assert len(bomb.getvalue()) < 200_000
    for data, words in (
        (path.read_bytes(), "reads up to 1000 s"),
        (playlist, "no video that can be uploaded"),
        (b"ffconcat version 1.0\nfile /etc/hostname\n", "no video that can be uploaded"),
        (b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\nm=video 9 RTP/AVP 96\r\n", "no video that can be uploaded"),
        (bomb.getvalue(), ""),
    ):
        failed = client.upload(data)
        assert failed["status"] == "failed" and words in failed["error"]["message"], failed
    live = client("POST", "/v1/videos", {"live": True}).json
    refused = client("POST", f"/v1/videos/{live['id']}/frames", bomb.getvalue(), "image/png")
    assert refused.status == 400 and "pixels" in refused.json["error"]["message"]


def test_pages_from_elsewhere_are_refused(server: Any, client: Client, films: str):
    assert client("GET", "/v1/models", Host="evil.example").status == 403  # a name that was led to this machine
    assert client("GET", "/v1/models", Host="localhost").status == 200
    assert client("POST", "/v1/videos", b"x", "text/plain", Origin="http://evil.example").status == 403
    allowed = client("GET", "/v1/models", Origin=films)
    assert allowed.headers["Access-Control-Allow-Origin"] == films


PAGE = """<!doctype html><title>Chat</title><select></select><input><ol></ol><script>
const api = new URLSearchParams(location.search).get("api"), headers = {Authorization: "Bearer KEY"};
const select = document.querySelector("select"), input = document.querySelector("input"), said = [];
fetch(api + "/models", {headers}).then(answer => answer.json()).then(list => {
  for (const model of list.data) select.add(new Option(model.name || model.id, model.id));
});
input.onchange = async () => {
  said.push({role: "user", content: input.value});
  const item = document.querySelector("ol").appendChild(document.createElement("li"));
  const body = JSON.stringify({model: select.value, messages: said, stream: true, temperature: 0, max_tokens: 20});
  const answer = await fetch(api + "/chat/completions",
    {method: "POST", headers: {...headers, "Content-Type": "application/json"}, body});
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", text = "";
  for (let part; !(part = await reader.read()).done;) {
    const events = (rest + part.value).split("\\n\\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") { item.className = "whole"; continue; }
      text += (JSON.parse(data).choices[0] || {delta: {}}).delta.content || "";
      item.textContent = JSON.stringify(text);
    }
  }
  said.push({role: "assistant", content: text});
};
</script>""".replace("KEY", KEYS[0])


def test_a_chat_page_in_a_browser(
    films: str, server: Any, film: dict[str, Any], pipe: Any, state: VideoState, tiny_video
):
    """A page of another origin that knows OpenAI's API alone: it picks a video as its model, and asks twice."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)
    if chromium is None or subprocess.run([chromium, "--version"], capture_output=True).returncode:
        pytest.skip("needs Chromium on the PATH")
    (tiny_video.parent / "chat.html").write_text(PAGE, encoding="utf-8")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(
            executable_path=shutil.which(chromium), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        page = running.new_page()
        page.set_default_timeout(120_000)
        page.goto(f"{films}/chat.html?api={server.url}/v1")
        page.locator(f"option[value='state:{film['id']}']").wait_for(state="attached")
        assert "film.mp4" in page.locator("option").all_inner_texts()
        page.locator("select").select_option(f"state:{film['id']}")
        said: list[dict[str, str]] = []
        for number, question in enumerate(QUESTIONS[:2], 1):
            page.locator("input").fill(question)
            page.locator("input").press("Enter")
            page.locator("li.whole").nth(number - 1).wait_for()
            said.append({"role": "user", "content": question})
            said.append({"role": "assistant", "content": pipe.ask(state, said, max_new_tokens=20)})
            assert json.loads(page.locator("li").nth(number - 1).inner_text()) == said[-1]["content"]
        running.close()


def test_our_own_page_asks_a_server(server: Any, tiny_video: Path, pipe: Any, tmp_path: Path):
    """What `demo --web --server` does behind its page."""
    from video_ma2mba.hub_cards.space.web.session import Session
    from video_ma2mba.serving.remote import ServerPipeline

    film, beside, empty = (tmp_path / name for name in ("film.mp4", "film.srt", "empty.srt"))
    shutil.copy(tiny_video, film)
    beside.write_text("1\n00:00:01,000 --> 00:00:03,000\nA voice: größer!\n", encoding="utf-8")
    empty.write_text("nothing", encoding="utf-8")
    told = pipe.read(str(film), fps=1, subtitles="auto")
    remote = ServerPipeline(server.url, KEYS[0])
    assert remote.processor.frame_times == "none"
    expected = pipe.ask(pipe.read(str(tiny_video), fps=1), "What?", max_new_tokens=128)
    session = Session()
    assert all(seen <= of for seen, of in session.read(remote, str(tiny_video), 1.0))
    assert session.state.metadata["frames"] == "6"
    assert list(session.ask(remote, "What?"))[-1].strip() == expected
    file = session.save(tmp_path)
    other = Session()
    other.open(remote, file)
    assert list(other.ask(remote, "And?"))[-1] == list(session.ask(remote, "And?"))[-1]
    for given in ("auto", str(beside)):  # what is said is read here, and sent along
        spoken = Session()
        list(spoken.read(remote, str(film), 1.0, given))
        assert spoken.state.seen_tokens == told.seen_tokens > session.state.seen_tokens
        assert list(spoken.ask(remote, "What?"))[-1].strip() == pipe.ask(told, "What?", max_new_tokens=128)
    with pytest.raises(ValueError, match="there are no subtitles in it"):
        list(Session().read(remote, str(film), 1.0, str(empty)))
    with pytest.raises(ValueError, match="never learnt times"):
        list(session.ask(remote, "What?", times=True))
    with pytest.raises(ValueError, match="no video that can be uploaded"):
        list(Session().read(remote, __file__, 1.0))
    with pytest.raises(ValueError, match="not one of this server's"):
        ServerPipeline(server.url, "wrong-key-9999")
    with pytest.raises(ConnectionError, match="does not answer"):
        ServerPipeline("http://127.0.0.1:9")


def test_long_video_data_is_made_with_a_server(server: Any, tiny_video: Path, monkeypatch: pytest.MonkeyPatch):
    """A server as captioner and writer of `data make-long`: frames go as pictures, questions come as JSON."""
    from video_ma2mba.processing.frame_times import Cue
    from video_ma2mba.trainer.data import long_models

    properties = {name: {"type": "string", "maxLength": 8} for name in ("question", "answer")}
    monkeypatch.setattr(long_models, "_SCHEMA", {**long_models._SCHEMA, "properties": properties})
    monkeypatch.setattr(long_models, "_TOKENS", {"caption": 12, "writing": 100})
    # The random model comes to no end of a sentence: its cut captions would be refused (tests of model_replies).
    monkeypatch.setattr(long_models, "whole_sentences", lambda text: text)
    model = long_models.Endpoint(f"{server.url}/v1", KEYS[0])
    assert model.model == "checkpoint"
    assert model.caption(tiny_video, 0.0, 2.0) == model.caption(tiny_video, 0.0, 2.0) != ""
    question, answer = model.write(tiny_video, [Cue(0.0, 2.0, "It gets brighter.")], "attribute")
    assert 0 < len(question) <= 8 and len(answer) <= 8
    with pytest.raises(ConnectionError, match="names no model"):
        long_models.Endpoint(f"{server.url}/v1", "wrong-key-9999")


def test_the_log_tells_no_secrets(server: Any, client: Client):
    client("GET", "/v1/videos?token=secret-in-the-query&limit=1")
    text = server.log.read_text()
    assert '"GET /v1/videos" 200' in text
    assert not [secret for secret in (*KEYS, "secret-in-the-query") if secret in text]


def test_slow_and_broken_clients_cost_nothing(server: Any, client: Client, film: dict[str, Any]):
    """Half requests and clients that leave hold nobody up, and what they asked for ends."""
    host, port = "127.0.0.1", int(server.url.rpartition(":")[2])
    body = json.dumps({"messages": messages(film, "What?"), "max_tokens": 4096, "temperature": 0, "stream": True})
    head = f"Host: {host}\r\nAuthorization: Bearer {KEYS[0]}\r\nContent-Type: application/json\r\n"
    request = f"POST /v1/chat/completions HTTP/1.1\r\n{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()
    left = []
    for data in [request] * 8 + [request[:-10]] * 8 + [b"GET / HT"] * 8 + [b"\x16\x03\x01\x02\x00"] * 4:
        connection = socket.create_connection((host, port))
        connection.sendall(data)
        left.append(connection)
    for connection in left[:8]:
        assert connection.recv(64).startswith(b"HTTP/1.1 200")
    began = time.monotonic()
    assert client.ask(f"state:{film['id']}", "What?").status == 200
    assert time.monotonic() - began < 5
    for connection in left:
        connection.close()
    deadline = time.monotonic() + 10
    while 'waiting{what="answers"} 0.0' not in client("GET", "/metrics").body.decode():
        assert time.monotonic() < deadline, "answers nobody listens to go on"
        time.sleep(0.05)


def test_two_hundred_uploads_at_once_are_bounded(client: Client, tiny_video: Path):
    data = tiny_video.read_bytes()
    with ThreadPoolExecutor(200) as pool:
        replies = list(pool.map(lambda n: client.form("/v1/videos", [("file", f"{n}.mp4", data)], fps=1), range(200)))
    taken = [reply.json["id"] for reply in replies if reply.status == 200]
    refused = [reply for reply in replies if reply.status != 200]
    assert taken and refused and {reply.status for reply in refused} == {429}
    for reply in refused:
        assert reply.json["error"]["type"] == "rate_limit_error" and int(reply.headers["Retry-After"]) > 0
    for video_id in taken:
        assert client.wait(video_id)["status"] == "completed"
        client("DELETE", f"/v1/videos/{video_id}")


def test_a_crash_loses_nothing(
    server: Any,
    start: Callable[..., Any],
    client: Client,
    film: dict[str, Any],
    options: list[Any],
    pipe: Any,
    tmp_path,
):
    """Killed in the middle of a reading: what was finished is there, the reading goes on from where it was saved."""
    import av

    path = tmp_path / "long.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 32
        for number in range(1200):
            picture = np.full((32, 32, 3), number % 251, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    expected = client.ask(f"state:{film['id']}", "What?").json["choices"]
    sent = client.form("/v1/videos", [("file", "long.mp4", path.read_bytes())], fps=25, pinned="true").json
    partial = Path(options[3]) / "videos" / sent["id"] / "partial"
    deadline = time.monotonic() + 60
    while not partial.exists():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    server.stop(signal.SIGKILL)
    saved = int(VideoState.load(partial).metadata["reading_frames"])
    assert 0 < saved < 1200

    second = start(*options, "--workers", 2).wait()
    again = Client(second.url)
    assert again.ask(f"state:{film['id']}", "What?").json["choices"] == expected
    found = again.wait(sent["id"])
    assert (found["status"], found["frames"], found["pinned"]) == ("completed", 1200, True)
    read = float(re.search(r"frames_read_total ([\d.]+)", again("GET", "/metrics").body.decode())[1])
    assert 0 < read <= 1200 - saved
    (tmp_path / "found.state").write_bytes(again("GET", f"/v1/videos/{sent['id']}/state").body)
    whole = pipe.read(str(path), fps=25)
    assert VideoState.load(tmp_path / "found.state").fingerprint() == whole.fingerprint()
    file = (tmp_path / "found.state").read_bytes()
    workers = workers_of(second) if sys.platform == "linux" else []
    for one, other in permutations(workers):  # each alone takes a state, and the other is asked about it
        os.kill(other, signal.SIGSTOP)
        taken = again("POST", "/v1/videos", file, "application/octet-stream").json["id"]
        os.kill(other, signal.SIGCONT)
        os.kill(one, signal.SIGSTOP)
        asked = [again.ask(f"state:{video}", "What?").json["choices"] for video in (taken, sent["id"])]
        assert asked[0] == asked[1] and again("DELETE", f"/v1/videos/{taken}").status == 200
        os.kill(one, signal.SIGCONT)
        assert again.ask(f"state:{taken}", "What?").status == 404
    with ThreadPoolExecutor(4) as pool:
        pool.submit(again.ask, f"state:{film['id']}", "What?", max_tokens=200)
        assert second.stop() == 0, "told to stop, it ends in peace"
    assert os.listdir(Path(options[3]) / "incoming") == []


def workers_of(server: Any) -> list[int]:
    """The processes that answer, of a server with several, as soon as both do."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    while server.log.read_bytes()[server.began :].count(b"serves at") < 2:
        time.sleep(0.05)
    found = map(int, children.read_bytes().split())
    return [child for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
