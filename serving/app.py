"""The routes: videos, their states and frames; chat completions; models, health and metrics."""

from __future__ import annotations

import asyncio
import json
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from ..files.text_files import parse_json
from ..modeling_video_ma2mba.state_header import is_state_file
from ..processing.picture_sources import is_image_bytes
from ..processing.video_subtitles import decoded_text
from . import metrics
from .answer_rows import AnswerSettings, Piece
from .conversations import STATE, conversation_of, sampling_of, subtitles_of
from .errors import BadRequest, Conflict, NotThere, ServingError, error_of
from .fetching import address_name
from .guard import LOG, Guard
from .reading import SAMPLING
from .service import Service
from .settings import ServerSettings
from .store import Video

_MEASURED = 2.0
_ALIVE = 10.0  # seconds after which a client that waits is told that somebody is there
_AT_ONCE = 1.0  # seconds for which a streamed answer is held back, so that errors have their own status
_MOST_PICTURES = 1024
_HEAD = 4096
_LARGEST_TEXT = 2**24


class ChatRequest(BaseModel):
    """OpenAI's request; fields that are not here ask for nothing that the server could do, and do not count."""

    model_config = ConfigDict(extra="ignore")

    messages: list[dict[str, Any]]
    model: str = ""
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=64)
    seed: int | None = None
    stop: str | list[str] | None = None
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    times: bool = False
    fps: float | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    media_io_kwargs: dict[str, Any] | None = None


class VideoRequest(BaseModel):
    """A video from an address, or one that begins without frames."""

    model_config = ConfigDict(extra="forbid")

    url: str | None = None
    name: str | None = None
    live: bool = False
    pinned: bool = False
    fps: Any = None
    num_frames: Any = None
    start: Any = None
    end: Any = None
    max_frames: Any = None
    subtitles: str | None = None


class VideoChange(BaseModel):
    """What may be changed of a video."""

    model_config = ConfigDict(extra="forbid")

    pinned: bool | None = None
    name: str | None = None


def build_app(settings: ServerSettings, load: Callable[[], Any], closing: Callable[[], bool] = lambda: False) -> Any:
    """The application, of ASGI.

    Args:
        load: makes the question-answering pipeline, once.
        closing: whether the server stops.
    """
    service = Service(load(), settings, closing)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        measuring = asyncio.ensure_future(_measure_often(service))
        yield
        measuring.cancel()
        await asyncio.get_running_loop().run_in_executor(None, service.close)

    app = FastAPI(title="video-ma2mba", lifespan=lifespan, docs_url=None, redoc_url=None)
    _add_errors(app)
    _add_status(app, service)
    _add_videos(app, service)
    _add_chat(app, service)
    if settings.allow_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.allow_origins, allow_methods=["*"], allow_headers=["*"]
        )
    return Guard(app, settings, service.keys, closing)


async def _measure_often(service: Service) -> None:
    """Whichever process is asked for metrics tells those of all: each writes its own down."""
    while metrics.shared():
        await service.quick(service.measure)
        await asyncio.sleep(_MEASURED)


def _add_errors(app: FastAPI) -> None:
    def answer(error: ServingError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(ServingError)
    async def told(request: Request, error: ServingError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(HTTPException)
    async def of_starlette(request: Request, error: HTTPException) -> JSONResponse:
        made = (
            NotThere(f"there is no {request.method} {request.url.path[:200]}")
            if error.status_code in (404, 405)
            else BadRequest(str(error.detail))
        )
        made.status = error.status_code
        return answer(made)

    @app.exception_handler(RequestValidationError)
    async def of_the_address(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(_invalid(error.errors()[0]))

    @app.exception_handler(Exception)
    async def own(request: Request, error: Exception) -> JSONResponse:
        LOG.error("unexpected error", exc_info=error)
        return answer(error_of(error))


def _add_status(app: FastAPI, service: Service) -> None:
    began = int(time.time())

    def described(model_id: str, **more: Any) -> dict[str, Any]:
        return {"id": model_id, "object": "model", "created": began, "owned_by": "video-ma2mba", **more}

    @app.api_route("/health", methods=["GET", "HEAD"])  # load balancers ask for the head
    async def health() -> JSONResponse:
        stops = service.closing()
        return JSONResponse({"status": "stopping" if stops else "ok", "model": service.name}, 503 if stops else 200)

    @app.get("/metrics")
    def show_metrics() -> Response:
        service.measure()
        text, kind = metrics.exposition()
        return Response(text, media_type=kind)

    @app.get("/v1/models")
    def models(request: Request) -> dict[str, Any]:
        found = [described(service.name, frame_times=service.processor.frame_times)]
        for video in service.store.listed(_owner(request), 100):
            if video.status == "completed" and video.bytes:  # for pages that can choose nothing but a model
                found.append(described(STATE + video.id, created=int(video.created), name=video.name))
        return {"object": "list", "data": found}

    @app.get("/v1/models/{model_id:path}")
    def model(request: Request, model_id: str) -> dict[str, Any]:
        if model_id.startswith(STATE):
            video = service.store.get(model_id.removeprefix(STATE), _owner(request))
            return described(model_id, created=int(video.created), name=video.name)
        _check_model(service, model_id)
        return described(service.name)


def _owner(request: Request) -> str:
    return request.scope["state"]["owner"]


def _check_model(service: Service, model_id: str) -> None:
    if model_id not in ("", "default", "video-ma2mba", service.name):
        raise NotThere(f"there is no model {model_id[:80]!r} here, only {service.name!r}", "model")


def _invalid(fault: Any) -> BadRequest:
    """What pydantic finds wrong."""
    param = ".".join(str(part) for part in fault["loc"] if part != "query")
    return BadRequest(f"{param or 'the request'}: {fault['msg']}", param or None)


async def _json(request: Request, kind: type[BaseModel]) -> Any:
    """A request's body as a model of pydantic. Raises BadRequest."""
    body = await request.body()
    try:
        value = await asyncio.to_thread(parse_json, body)
        return kind.model_validate(value)
    except ValidationError as error:
        raise _invalid(error.errors(include_url=False, include_input=False)[0]) from None
    except ValueError as error:
        raise BadRequest(f"the request is not JSON ({error})") from None


# videos


def _add_videos(app: FastAPI, service: Service) -> None:
    store = service.store

    @app.post("/v1/videos")
    async def create(request: Request) -> JSONResponse:
        owner = _owner(request)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "application/json":
            given = await _json(request, VideoRequest)
            if bool(given.url) == given.live:
                raise BadRequest("give either url, or live: true for a video whose frames come one by one", "url")
            return _created(await _from_json(service, owner, given))
        async with _received(service, request) as (files, fields):
            if len(files) != 1:
                raise BadRequest(f"one file is a video, not {len(files)}: send it as the field file", "file")
            wanted = await asyncio.to_thread(_fields, VideoRequest, fields)
            reading = await asyncio.to_thread(_reading_of, fields)
            ((path, name),) = files
            return _created(
                await service.slow(_take_file, service, owner, path, wanted.name or name, reading, wanted.pinned)
            )

    @app.get("/v1/videos")
    def listed(
        request: Request, limit: int = 20, after: str | None = None, order: Literal["asc", "desc"] = "desc"
    ) -> Any:
        if not 1 <= limit <= 100:
            raise BadRequest("limit must lie between 1 and 100", "limit")
        found = store.listed(_owner(request), limit + 1, after, order == "desc")
        shown = [video.public() for video in found[:limit]]
        ends = {"first_id": shown[0]["id"] if shown else None, "last_id": shown[-1]["id"] if shown else None}
        return {"object": "list", "data": shown, "has_more": len(found) > limit, **ends}

    @app.get("/v1/videos/{video_id}")
    def show(request: Request, video_id: str) -> dict[str, Any]:
        return store.get(video_id, _owner(request)).public()

    @app.post("/v1/videos/{video_id}")
    async def change(request: Request, video_id: str) -> dict[str, Any]:
        video = await service.quick(store.get, video_id, _owner(request))
        given = (await _json(request, VideoChange)).model_dump(exclude_none=True)
        if given.get("pinned"):
            await service.quick(store.check_room, 0 if video.pinned else video.bytes)
        video = await service.quick(lambda: store.update(video, **given)) if given else video
        return video.public()

    @app.delete("/v1/videos/{video_id}")
    def delete(request: Request, video_id: str) -> dict[str, Any]:
        video = store.get(video_id, _owner(request))
        store.delete(video)
        service.cache.forget(video.id)
        return {"id": video.id, "object": "video.deleted", "deleted": True}

    @app.get("/v1/videos/{video_id}/events")
    async def events(request: Request, video_id: str) -> StreamingResponse:
        video = await service.quick(store.get, video_id, _owner(request))
        return _event_stream(_progress(service, video))

    @app.get("/v1/videos/{video_id}/state")
    def download(request: Request, video_id: str) -> FileResponse:
        video = store.get(video_id, _owner(request))
        file = store.state_file(video)
        if video.status != "completed" or not file.is_file():
            raise Conflict(f"{video.id} has no state yet: it is {video.status}, with {video.frames} frames")
        store.touch(video)
        return FileResponse(file, media_type="application/octet-stream", filename=f"{Path(video.name).stem}.state")

    @app.post("/v1/videos/{video_id}/state")
    async def upload_state(request: Request, video_id: str) -> dict[str, Any]:
        video = await service.quick(store.get, video_id, _owner(request))
        async with _received(service, request) as (files, _):
            if len(files) != 1:
                raise BadRequest(f"one file is a state, not {len(files)}", "file")
            return (await service.slow(service.reader.take_state, video, files[0][0])).public()

    @app.post("/v1/videos/{video_id}/frames")
    async def append(request: Request, video_id: str) -> dict[str, Any]:
        video = await service.quick(store.get, video_id, _owner(request))
        async with _received(service, request) as (files, fields):
            return (await service.slow(_append, service, video, files, fields)).public()


def _created(video: Video) -> JSONResponse:
    return JSONResponse(video.public(), headers={"Location": f"/v1/videos/{video.id}"})


def _reading_of(fields: dict[str, Any]) -> dict[str, Any]:
    """How a video is to be read: its frames, and the subtitles between them."""
    told = subtitles_of(fields.get("subtitles"))
    return sampling_of(fields, "") | ({} if told is None else {"subtitles": told})


async def _from_json(service: Service, owner: str, given: VideoRequest) -> Video:
    """A new video from an address, or without frames."""
    reading = await asyncio.to_thread(_reading_of, given.model_dump())
    if given.live:
        if reading.keys() - {"fps"}:
            raise BadRequest("a live video takes fps alone: its frames are chosen by whoever sends them", "live")
        service.store.check_room(service.zero.nbytes)
        rate = reading.get("fps") or service.processor.video_processor.fps or 1.0
        return await service.quick(
            lambda: service.store.create(
                owner, given.name or "live", None, status="completed", fps=rate, pinned=given.pinned
            )
        )
    url = given.url or ""
    service.fetcher.check(url)

    def fetch() -> Video:
        path = service.store.incoming()
        try:
            found = service.fetcher.fetch(url, path)
            service.store.remember_address(owner, url, found.etag, found.modified, found.digest, found.size)
            return _take_file(
                service, owner, path, given.name or address_name(url), reading, given.pinned, found.digest
            )
        finally:
            path.unlink(missing_ok=True)

    with service.upload():
        return await service.slow(fetch)


def _take_file(
    service: Service, owner: str, path: Path, name: str, reading: dict[str, Any], pinned: bool, digest: str = ""
) -> Video:
    """A new video from a file that is here: a state, or a film that is queued to be read."""
    if is_state_file(path):
        if reading:
            raise BadRequest(f"the file is a state, whose frames are read already: leave {', '.join(reading)} out")
        video = service.store.create(owner, name, None, status="completed", pinned=pinned)
        try:
            return service.reader.take_state(video, path)
        except BaseException:
            service.store.delete(video)
            raise
    if not path.stat().st_size:
        raise BadRequest("the file is empty", "file")
    if not digest:
        import hashlib

        with path.open("rb") as file:
            whole = hashlib.sha256()
            while block := file.read(2**20):
                whole.update(block)
        digest = whole.hexdigest()
    key = service.reader.key("", service.reader.prefix[0].tolist(), "video", digest, reading)
    video = service.store.create(owner, name, path, key=key, settings=reading, pinned=pinned)
    service.reader.wake()
    return video


def _append(service: Service, video: Video, files: list[tuple[Path, str]], fields: dict[str, str]) -> Video:
    """Frames, or a chunk of video, read into a video's state."""
    if not files:
        raise BadRequest("there are no frames: send pictures (JPEG, PNG), or a chunk of video, as files", "frames")
    sampling = sampling_of(fields, "")
    if "num_frames" in sampling:
        raise BadRequest("frames that are added are chosen by fps: leave num_frames out", "num_frames")
    rate = sampling.get("fps") or video.fps or service.processor.video_processor.fps or 1.0
    heads = []
    for path, _ in files:
        with path.open("rb") as file:
            heads.append(is_image_bytes(file.read(_HEAD)))
    if all(heads):
        if len(files) > _MOST_PICTURES:
            raise BadRequest(f"{len(files)} pictures in a request are more than {_MOST_PICTURES}", "frames")
        names = [name for _, name in files]
        pictures = service.reader.pictures([path.read_bytes() for path, _ in files], names, rate)
        return service.reader.append(video, "frames", pictures, rate)
    if len(files) > 1:
        raise BadRequest("send pictures, or one chunk of video: not several chunks, and not both", "frames")
    ((path, name),) = files
    reader = service.reader.film(path, name, {"fps": rate, **sampling}, timed=False)
    try:
        return service.reader.append(video, name, reader.chunks(service.model.config.read_chunk_frames), rate)
    finally:
        reader.close()


@asynccontextmanager
async def _received(
    service: Service, request: Request
) -> AsyncIterator[tuple[list[tuple[Path, str]], dict[str, str]]]:
    """The files of an upload, each with its name, in the store's folder until the end of the block, and its fields.

    A body that is no form is one file, its fields stand in the address.
    """
    files: list[tuple[Path, str]] = []
    fields = dict(request.query_params)
    with service.upload():
        try:
            if request.headers.get("content-type", "").startswith("multipart/form-data"):
                async with request.form(max_files=_MOST_PICTURES, max_fields=64) as form:
                    for name, value in form.multi_items():
                        if name == "subtitles" and isinstance(value, UploadFile):
                            fields[name] = await service.quick(_text_of, value)
                        elif isinstance(value, UploadFile):
                            files.append((service.store.incoming(), value.filename or "video"))
                            await service.slow(_copied, value.file, files[-1][0])
                        else:
                            fields[name] = value
            else:
                files.append((service.store.incoming(), fields.pop("name", "video")))
                with files[0][0].open("wb") as file:
                    waiting = bytearray()
                    async for block in request.stream():
                        waiting += block
                        if len(waiting) >= 2**20:
                            await service.quick(file.write, bytes(waiting))
                            waiting.clear()
                    await service.quick(file.write, bytes(waiting))
            yield files, fields
        finally:
            for path, _ in files:
                path.unlink(missing_ok=True)


def _text_of(uploaded: UploadFile) -> str:
    if (uploaded.size or 0) > _LARGEST_TEXT:
        raise BadRequest(f"{uploaded.filename}: {uploaded.size} bytes are no subtitles", "subtitles")
    try:
        return decoded_text(uploaded.file.read(), uploaded.filename or "subtitles")
    except ValueError as error:
        raise BadRequest(str(error), "subtitles") from None


def _copied(source: Any, path: Path) -> None:
    with path.open("wb") as file:
        shutil.copyfileobj(source, file, 2**20)


def _fields(kind: type[BaseModel], fields: dict[str, str]) -> Any:
    """Fields of a form as a model of pydantic; those of other APIs do not count."""
    known = {name: value for name, value in fields.items() if name in kind.model_fields and name not in SAMPLING}
    try:
        return kind.model_validate(known)
    except ValidationError as error:
        raise _invalid(error.errors(include_url=False, include_input=False)[0]) from None


async def _progress(service: Service, video: Video) -> AsyncIterator[bytes]:
    """Events of a reading: `progress` with the video, and at last `completed`, `failed` or `deleted`."""
    said, when = None, time.monotonic()
    while True:
        shown = video.public()
        if video.status in ("completed", "failed"):
            yield _event(shown, video.status)
            return
        if shown != said or time.monotonic() - when > _ALIVE:
            said, when = shown, time.monotonic()
            yield _event(shown, "progress")
        if service.closing():
            return
        await asyncio.sleep(0.2)
        try:
            video = await service.quick(service.store.get, video.id)
        except NotThere as error:
            yield _event(error.body(), "deleted")
            return


def _event(data: Any, event: str | None = None) -> bytes:
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"{f'event: {event}' + chr(10) if event else ''}data: {text}\n\n".encode("utf-8", "replace")


def _event_stream(events: AsyncIterator[bytes]) -> StreamingResponse:
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


# chat completions


def _add_chat(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        began = time.monotonic()
        asked: ChatRequest = await _json(request, ChatRequest)
        video_id = None
        if asked.model.startswith(STATE):
            video_id = asked.model.removeprefix(STATE)
        else:
            _check_model(service, asked.model)
        settings = await service.quick(_answer_settings, service, asked)
        service.answerer.check_room(len(settings))
        usual = sampling_of(
            {
                "fps": asked.fps,
                **_of_videos(asked.media_io_kwargs),
                **(asked.mm_processor_kwargs or {}),
            },
            "",
        )
        own = (asked.messages, usual, video_id, asked.times)
        conversation = await service.quick(conversation_of, service.processor, *own)
        run = _Completion(service, asked, began)
        preparing = asyncio.ensure_future(service.prepare(_owner(request), conversation))
        answering = run.stream(preparing, conversation.question, settings)
        if not asked.stream:
            return await _unless_gone(request, run.whole(preparing, conversation.question, settings))
        await asyncio.wait([preparing], timeout=_AT_ONCE)
        if preparing.done():
            preparing.result()  # what is wrong is told with a status of its own
            service.answerer.check_room(len(settings))
        return _event_stream(answering)


async def _unless_gone(request: Request, work: Any) -> Response:
    """The result of `work`, which ends as soon as the client is gone."""
    task = asyncio.ensure_future(work)

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.ensure_future(gone())
    try:
        await asyncio.wait([task, watch], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            return Response(status_code=499)
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await one


def _of_videos(given: dict[str, Any] | None) -> dict[str, Any]:
    """What vLLM's `media_io_kwargs` say of videos."""
    found = (given or {}).get("video") or {}
    if not isinstance(found, dict):
        raise BadRequest(f"media_io_kwargs.video must hold settings, not {found!r:.60}", "media_io_kwargs.video")
    return found


def _answer_settings(service: Service, asked: ChatRequest) -> list[AnswerSettings]:
    """Settings of each of the answers wanted. Raises BadRequest."""
    if asked.tools:
        raise BadRequest("tools are not supported: leave them out", "tools")
    stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    if len(stop) > 4 or not all(0 < len(text) <= 256 for text in stop):
        raise BadRequest("stop takes up to 4 texts of 1 to 256 characters", "stop")
    if asked.top_logprobs is not None and not asked.logprobs:
        raise BadRequest("top_logprobs needs logprobs: true", "top_logprobs")
    vocabulary = service.model.config.text_config.vocab_size
    bias = []
    for token, value in (asked.logit_bias or {}).items():
        if not token.isdecimal() or len(token) > 20 or int(token) >= vocabulary or not -100 <= value <= 100:
            raise BadRequest(
                f"logit_bias: {token[:20]}: {value} is no token of this model with a bias up to 100", "logit_bias"
            )
        bias.append((int(token), value))
    own = service.model.generation_config
    usual = (own.temperature or 1.0) if own.do_sample else 0.0
    most = asked.max_completion_tokens or asked.max_tokens or 256
    settings = {
        "max_tokens": min(most, service.settings.max_new_tokens),
        "temperature": usual if asked.temperature is None else asked.temperature,
        "top_p": 1.0 if asked.top_p is None else asked.top_p,
        "stop": tuple(stop),
        "frequency_penalty": asked.frequency_penalty or 0.0,
        "presence_penalty": asked.presence_penalty or 0.0,
        "logit_bias": tuple(bias),
        "top_logprobs": (asked.top_logprobs or 0) if asked.logprobs else None,
        "grammar": service.grammar(asked.response_format),
    }
    seeds = [None if asked.seed is None else asked.seed + number for number in range(asked.n or 1)]
    return [AnswerSettings(**settings, seed=seed) for seed in seeds]


class _Completion:
    """Makes OpenAI's objects of an answer."""

    def __init__(self, service: Service, asked: ChatRequest, began: float):
        self.service, self.asked, self.began = service, asked, began
        self.tokenizer = service.processor.tokenizer
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self.model = asked.model or service.name
        self.tokens = 0
        self.first = True

    def _object(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        base = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**base, "system_fingerprint": None, "choices": choices, **more}

    async def _pieces(self, state: Any, question: list[int], settings: list[AnswerSettings]) -> AsyncIterator[Any]:
        async for number, what in self.service.answers(state, question, settings, self.asked.stream):
            if self.first:
                self.first = False
                metrics.FIRST_TOKEN.observe(time.monotonic() - self.began)
            yield number, what

    def _usage(self, state: Any, video: dict[str, Any] | None, question: list[int], rows: list[int]) -> dict[str, Any]:
        read = state.seen_tokens + len(question)
        made = sum(rows)
        metrics.TOKENS.labels("prompt").inc(len(question))
        metrics.TOKENS.labels("completion").inc(made)
        cached = state.seen_tokens if video is not None and video["cached"] else 0
        return {
            "prompt_tokens": read,
            "completion_tokens": made,
            "total_tokens": read + made,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    async def whole(self, preparing: Any, question: list[int], settings: list[AnswerSettings]) -> JSONResponse:
        """The answers, all at once."""
        try:
            state, video = await preparing
        finally:
            preparing.cancel()
        texts = [""] * len(settings)
        logs: list[list[Any]] = [[] for _ in settings]
        reasons = [""] * len(settings)
        counts = [0] * len(settings)
        async for number, what in self._pieces(state, question, settings):
            if isinstance(what, Piece):
                texts[number] += what.text
                logs[number] += what.tokens
            else:
                reasons[number], counts[number] = what
        choices = [
            {
                "index": number,
                "message": {"role": "assistant", **self._said(text), "refusal": None},
                "logprobs": self._logprobs(logs[number]) if self.asked.logprobs else None,
                "finish_reason": reasons[number],
            }
            for number, text in enumerate(texts)
        ]
        usage = self._usage(state, video, question, counts)
        return JSONResponse(self._object("chat.completion", choices, usage=usage, video=video))

    def _said(self, text: str) -> dict[str, Any]:
        """What a message says; with times also from which second to which, and why not where it does not."""
        if not self.asked.times:
            return {"content": text}
        found = self.service.processor.timed_answer(text)
        return {"content": found.pop("answer"), **found}

    async def stream(
        self, preparing: Any, question: list[int], settings: list[AnswerSettings]
    ) -> AsyncIterator[bytes]:
        """Events of the answers as they are made."""
        try:
            while not preparing.done():
                await asyncio.wait([preparing], timeout=_ALIVE)
                if not preparing.done():
                    yield b": the video is being read\n\n"
            state, video = preparing.result()
            everyone = [self._choice(number, {"role": "assistant", "content": ""}) for number in range(len(settings))]
            yield self._chunk(everyone, video=video)
            counts = [0] * len(settings)
            async for number, what in self._pieces(state, question, settings):
                if isinstance(what, Piece):
                    logs = self._logprobs(what.tokens) if self.asked.logprobs else None
                    yield self._chunk([self._choice(number, {"content": what.text}, logs)])
                else:
                    reason, counts[number] = what
                    yield self._chunk([self._choice(number, {}, None, reason)])
            usage = self._usage(state, video, question, counts)
            if (self.asked.stream_options or {}).get("include_usage"):
                yield self._chunk([], usage=usage, video=video)
            yield _event("[DONE]")
        except ServingError as error:
            yield _event(error.body())
        except Exception as error:
            LOG.error("unexpected error", exc_info=error)
            yield _event(error_of(error).body())
        finally:
            preparing.cancel()

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        return _event(self._object("chat.completion.chunk", choices, **more))

    def _choice(
        self, number: int, delta: dict[str, Any], logs: Any = None, reason: str | None = None
    ) -> dict[str, Any]:
        return {"index": number, "delta": delta, "logprobs": logs, "finish_reason": reason}

    def _logprobs(self, tokens: list[Any]) -> dict[str, Any]:
        def described(token: int, value: float) -> dict[str, Any]:
            text = self.tokenizer.decode([token])
            known = None if "\ufffd" in text else list(text.encode())
            return {"token": text, "logprob": max(value, -9999.0), "bytes": known}

        content = [
            {**described(token, value), "top_logprobs": [described(*pair) for pair in best]}
            for token, value, best in tokens
        ]
        return {"content": content, "refusal": None}
