"""Long-video data: what is made of rendered worlds is true, what is interrupted goes on, what is bad is refused."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from video_ma2mba.cli.main import app
from video_ma2mba.files.model_replies import UnusableReply
from video_ma2mba.loading import load_pipeline
from video_ma2mba.processing.byte_tokenizer import build_byte_tokenizer
from video_ma2mba.processing.frame_times import Cue
from video_ma2mba.trainer.data import VideoChatCollator, load_training_data
from video_ma2mba.trainer.data.long_models import (
    CAPTION_REQUEST,
    Endpoint,
    LocalCaptioner,
    LocalWriter,
    parse_pair,
    text_generator,
    writing_request,
)
from video_ma2mba.trainer.data.long_videos import (
    CAPTIONS,
    LONGVILA,
    OURS,
    QUESTION_KINDS,
    REFUSED,
    WRITTEN,
    LongSettings,
    LongVideos,
    caption_fault,
    clips_of,
    one_line,
    question_fault,
)
from video_ma2mba.world.dataset import WorldDataset
from video_ma2mba.world.long_truth import WorldTruth
from video_ma2mba.world.video_files import render_to_folder

CUES = [Cue(0.0, 10.0, "A man opens a door."), Cue(10.0, 20.0, "He sits down.")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rendered videos of 35 seconds."""
    folder = tmp_path_factory.mktemp("world")
    render_to_folder(folder, 3, frames=(35, 35), seed=4, progress=False)
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Address of a `Scripted` server."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Scripted) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}/v1"
        served.shutdown()


def run(*words: object) -> Any:
    return CliRunner().invoke(app, ["data", "make-long", *map(str, words)])


def test_the_truth_about_rendered_worlds(world: Path, tmp_path: Path, processor):
    (world / "broken.mp4").write_bytes(b"no video")
    out = tmp_path / "long"
    result = run(world, "--out", out, "--captioner", "truth", "--writer", "truth")
    assert result.exit_code == 1 and "broken.mp4" in result.stderr, result.output  # one could not be read
    (world / "broken.mp4").unlink()
    assert run(world, "--out", out, "--captioner", "truth", "--writer", "truth").exit_code == 0
    rows = [json.loads(line) for line in (out / OURS).read_text(encoding="utf-8").splitlines()]
    kinds = {row["kind"] for row in rows}
    assert kinds == {"summary", *QUESTION_KINDS}
    data = WorldDataset(size=3, frames=(35, 35), seed=4)
    captions = [json.loads(line) for line in (out / CAPTIONS).read_text(encoding="utf-8").splitlines()]
    assert [(one["start"], one["end"]) for one in captions[:4]] == [
        (0, 8.75),
        (8.75, 17.5),
        (17.5, 26.25),
        (26.25, 35),
    ]
    for row in rows:
        shown = data.world(int(Path(row["video"]).stem))
        assert row["made"] == {"captioner": "truth", "writer": "truth", "clips": 4, "clip_seconds": 10.0}
        asked, answer = row["messages"][0]["content"][1]["text"], row["messages"][1]["content"]
        if row["kind"] == "ocr":
            assert answer == shown.card.symbol.lower() or answer == shown.card.symbol
        if row["kind"] == "spatial":
            (thing,) = (thing for thing in shown.things if f"the {thing.name} " in asked)
            assert (answer == "right") == (thing.position(thing.start)[0] > 0.5)
        if row["kind"] == "summary":
            assert all(thing.name in answer for thing in shown.things)
    for one in captions:
        shown = data.world(int(Path(one["video"]).stem))
        for thing in shown.things:
            assert (thing.name in one["caption"]) == (thing.start < one["end"] and thing.end > one["start"])
    ours, theirs = load_training_data(str(out / OURS)), load_training_data(str(out / LONGVILA))
    collator = VideoChatCollator(processor, on_broken="raise", fps=0.2)
    for one, other in zip(ours, theirs, strict=True):  # the same samples in both forms, and trainable
        assert all(
            torch.equal(a, b) for a, b in zip(collator([one]).values(), collator([other]).values(), strict=True)
        )
    first = json.loads((out / LONGVILA).read_text(encoding="utf-8"))[0]
    assert first["conversations"][0]["value"].startswith("<video>\n") and not Path(first["video"]).is_absolute()


def test_what_is_interrupted_goes_on(world: Path, tmp_path: Path):
    """At most one unit is done twice, wherever it stops; a torn last line is cut off."""
    calls: list[Any] = []
    truth = WorldTruth()

    def caption(*given: Any) -> str:
        calls.append(given)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return truth.caption(*given)

    def write(*given: Any) -> tuple[str, str]:
        calls.append(given)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return truth.write(*given)

    settings, out = LongSettings("truth", "truth"), tmp_path / "long"
    video = world / "000000.mp4"
    for _ in range(40):
        calls.clear()  # one more unit each time
        data = LongVideos(out, settings)
        before = len(data.captions) + len(data.written)
        try:
            units = list(data.make(video, caption, write))
            break
        except KeyboardInterrupt:
            assert len(data.captions) + len(data.written) == before + 1
        finally:
            data.close()
        for log in (CAPTIONS, WRITTEN):
            with (out / log).open("ab") as file:
                file.write(b'{"video": "torn')
    assert len(units) == 4 + 1 + 7 == LongVideos(out, settings).units(video)
    fresh = LongVideos(tmp_path / "at once", settings)
    list(fresh.make(video, truth.caption, truth.write))
    for log in (CAPTIONS, WRITTEN):
        assert (out / log).read_bytes() == (tmp_path / "at once" / log).read_bytes()


def test_a_folder_is_one_data_set(world: Path, tmp_path: Path):
    out = tmp_path / "long"
    data = LongVideos(out, LongSettings("a", "b"))
    with pytest.raises(ValueError, match="another run"):
        LongVideos(out, LongSettings("a", "b"))
    data.close()
    with pytest.raises(ValueError, match="other settings"):
        LongVideos(out, LongSettings("a", "c"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ValueError, match="other files"):
        LongVideos(tmp_path / "full", LongSettings("a", "b"))
    for given, words in (({"clip_seconds": 0.5}, "at least 1 s"), ({"kinds": ("colour",)}, "spatial")):
        with pytest.raises(ValueError, match=words):
            LongSettings("a", "b", **given)
    with pytest.raises(ValueError, match="world render"):
        WorldTruth().caption(tmp_path / "film.mp4", 0, 1)
    refused = run(world, "--out", tmp_path / "x", "--captioner", "nobody", "--writer", "truth")
    assert refused.exit_code and not (tmp_path / "x").exists()
    login = "http://me:secret@127.0.0.1:9/v1#m"
    refused = run(world, "--out", tmp_path / "y", "--captioner", "truth", "--writer", login)
    assert refused.exit_code == 2 and "http://127.0.0.1:9/v1: Connection error" in refused.output
    assert json.loads((tmp_path / "y" / "made_with.json").read_text())["writer"] == "http://127.0.0.1:9/v1#m"
    assert [len(clips_of(s, 10)) for s in (0.5, 14, 16, 3600)] == [1, 1, 2, 360]
    assert clips_of(25, 10) == [(0, 12.5), (12.5, 25)]


@pytest.mark.parametrize(
    ("question", "answer", "words"),
    [
        ("Who sits?", "The man.", ""),
        ("", "A man sits down.", ""),
        ("Who sits", "The man.", "no whole sentence"),
        ("Who sits?", " ", "empty"),
        ("Who sits?", "who sits?", "repeats"),
        ("Which caption names him?", "The first.", "'caption'"),
        ("Who sits?", "In clip 3 a man does.", "'clip'"),
        ("Who?", "As an AI I cannot say.", "'As an AI'"),
        ("Who?" * 200, "He.", "more than 400"),
        ("Who?", "he " * 40, "over and over"),
        ("Asked before?", "Yes.", "asked already"),
        ("?", "Yes.", "question is empty"),
        ("Who sits?", "I'm sorry, but I cannot say.", "cannot be told"),
    ],
)
def test_rows_that_are_bad_are_refused(question: str, answer: str, words: str):
    found = question_fault(question, answer, ["Asked before?"])
    assert (words in found) if words else found == ""
    assert one_line("A \ud83d sits\x00\n down 😀.") == "A ? sits down 😀."
    assert caption_fault("A man sits down.") == "" != caption_fault("...") and caption_fault("a" * 2001)


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ('{"question": "A?", "answer": "B"}', ("A?", "B")),
        ('Sure! ```json\n{"question": "A?", "answer": "B"}\n```', ("A?", "B")),
        ("Question: A?\nAnswer: B\nC", ("A?", "B\nC")),
        ("**question:** A? **answer:** B", ("A?", "B")),
        ("1. **Question**: A?\n2. **Answer**: B", ("A?", "B")),
        ("Q: Is Q: a sign?\n- A: B", ("Is Q: a sign?", "B")),
        ('I weigh {"a": 1}. {"Question": "A?", "Answer": 0} Right?', ("A?", "0")),
        ('[{"question": "A?", "answer": true}]', ("A?", "Yes")),
        ('{"question": "A?"', ("", "")),
        ('{"question": null, "answer": ["B"]}', ("", "['B']")),
        ("nothing", ("", "")),
    ],
)
def test_what_writers_write_is_taken_apart(text: str, pair: tuple[str, str]):
    assert parse_pair(text) == pair


def test_local_checkpoints(world: Path, tmp_path: Path, tiny_checkpoint: Path):
    """A Video-Ma2mba checkpoint describes and writes; a language model of transformers writes."""
    pipe = load_pipeline(str(tiny_checkpoint), device="cpu")
    video = world / "000001.mp4"
    seen = pipe.read(str(video), start=10, end=20)
    assert LocalCaptioner(pipe)(video, 10.0, 20.0) == pipe.ask(seen, CAPTION_REQUEST, max_new_tokens=128)
    tokenizer = build_byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}"
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=4096, **sizes))
    model.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    for source in (tmp_path / "llama", tiny_checkpoint):
        generate = text_generator(str(source), "cpu", torch.float32)
        found = LocalWriter(lambda request, most, say=generate: say(request, 8))(video, CUES, "summary")
        assert found[0] == "" and isinstance(found[1], str) and "captions, each" not in found[1]
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "llama")
    (tmp_path / "llama" / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="no chat template"):
        text_generator(str(tmp_path / "llama"), "cpu", torch.float32)


def _reply(content: Any, end: str = "stop", **more: Any) -> dict[str, Any]:
    return {
        "choices": [{"index": 0, "finish_reason": end, "message": {"role": "assistant", "content": content, **more}}]
    }


def _refusing(*names: str) -> Any:
    """A server that knows neither these settings nor, where None is one of them, pictures."""

    def answer(body: Any) -> tuple[int, Any]:
        for name in names:
            if name in body:
                hint = "use max_completion_tokens" if name == "max_tokens" else "is not supported"
                return 422 if name == "response_format" else 400, {"error": {"message": f"{name} {hint}"}}
        return 200, _reply("Q: Who sits?\nA: He.")

    return answer


def _too_long(body: Any) -> tuple[int, Any]:
    return (400, {"error": {"message": "too long"}}) if len(str(body)) > 500 else (200, _reply("Hello."))


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (_refusing("max_tokens", "temperature", "response_format"), ("Who sits?", "He.")),
        (lambda body: (200, _reply([{"type": "text", "text": '{"question": "A?", "answer": "B"}'}])), ("A?", "B")),
        (lambda body: (200, _reply("<think>{A?}</think>Question: A?\nAnswer: B")), ("A?", "B")),
        (lambda body: (200, _reply("Question: A?\nAnswer: B. And", "length")), ("A?", "B.")),
        (lambda body: (200, _reply("<think>Well", "length")), "was still thinking"),
        (lambda body: (200, _reply(None, refusal="No.")), "says nothing: No."),
        (_too_long, "refuses the request: .* too long"),
        (lambda body: (200, {"error": "busy"}), ConnectionError("gives no chat completion: busy")),
        (lambda body: (200, {"choices": []}), ConnectionError("gives no chat completion")),
        (lambda body: (200, "<html>"), ConnectionError("gives no chat completion: <html>")),
        (lambda body: (400, {"error": {"message": "broke"}}), ConnectionError("a plain question either: .* broke")),
    ],
)
def test_servers_that_differ(answer: Any, found: Any, server: str, monkeypatch: pytest.MonkeyPatch):
    """Settings that a server does not know are left away; what is no answer is told as what it is."""
    monkeypatch.setattr(Scripted, "answer", staticmethod(answer))
    writer = Endpoint(server)
    if isinstance(found, tuple):
        assert writer.write(Path("a.mp4"), CUES, "action") == found
        return
    with pytest.raises(UnusableReply if isinstance(found, str) else ConnectionError, match=str(found)):
        writer.write(Path("a.mp4"), CUES, "action")


class Scripted(http.server.BaseHTTPRequestHandler):
    """A server of OpenAI's API that knows no schemas, and is busy once."""

    asked: ClassVar[list[Any]] = []
    answer: ClassVar[Any] = None  # from a request to status and body, in place of the usual

    def do_GET(self) -> None:
        self._say(200, {"object": "list", "data": [{"id": "writer", "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.answer is not None:
            return self._say(*self.answer(body))
        self.asked.append((self.headers["Authorization"], body))
        if "response_format" in body:
            return self._say(400, {"error": {"message": "no schemas", "type": "invalid_request_error"}})
        if len(self.asked) == 2:
            return self._say(503, {"error": {"message": "busy"}})
        content = body["messages"][0]["content"]
        text = f"A picture of {len(content) - 1}." if isinstance(content, list) else "Question: Who sits?\nAnswer: He."
        message = {"role": "assistant", "content": text}
        self._say(200, {"id": "1", "object": "chat.completion", "choices": [{"index": 0, "message": message}]})

    def _say(self, status: int, body: Any) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if isinstance(body, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Retry-After-Ms", "1")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def test_any_server_of_openais_api(world: Path, tmp_path: Path):
    key = tmp_path / "key"
    key.write_text("secret-key-1\n")
    out = tmp_path / "long"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Scripted) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{served.server_port}/v1"
        words = (world / "000002.mp4", "--out", out, "--captioner", address, "--writer", f"{address}#writer")
        result = run(*words, "--api-key-file", key, "--clip", "0:18", "--kinds", "action,object,action")
        assert result.exit_code == 0, result.output
        served.shutdown()
    captions = [json.loads(line) for line in (out / CAPTIONS).read_text(encoding="utf-8").splitlines()]
    assert [one["caption"] for one in captions] == ["A picture of 10."] * 2 and captions[0]["by"] == address
    (row, *rest) = (json.loads(line) for line in (out / OURS).read_text(encoding="utf-8").splitlines())
    assert row["kind"] == "summary" and [one["kind"] for one in rest] == ["action"]
    (refused,) = (json.loads(line) for line in (out / REFUSED).read_text(encoding="utf-8").splitlines())
    assert refused["kind"] == "object" and "asked already" in refused["refused"]
    assert {auth for auth, _ in Scripted.asked} == {"Bearer secret-key-1"}
    assert sum("response_format" in body for _, body in Scripted.asked) == 1, "asked once for what it does not know"
    requests = [body["messages"][0]["content"] for _, body in Scripted.asked]
    assert any(request == writing_request([Cue(0, 17.5, "A picture of 10."), Cue(17.5, 35, "A picture of 10.")],
                                          "summary", "") for request in requests)  # fmt: skip
    assert "secret" not in "".join(path.read_text(encoding="utf-8") for path in out.iterdir())
    with pytest.raises(ConnectionError, match="does not answer"):
        Endpoint(address)
