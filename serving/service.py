"""One process of the server without HTTP: its model, store and threads, and what is done with a conversation."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from ..streaming.turns import Turns
from . import metrics
from .answer_rows import AnswerSettings, Ended, Piece
from .answering import Answerer, StateCache
from .conversations import Conversation, Medium, data_of, zero_state
from .errors import BadRequest, TooLarge, TooMany, Unavailable, error_with
from .fetching import Fetcher, address_name
from .reading import Limits, Reader
from .settings import Keys, ServerSettings
from .store import LEASE, Video, VideoStore

_LONGEST_GRAMMAR = 2**16


class Service:
    """What the routes use.

    Args:
        pipe: the question-answering pipeline.
        closing: whether the server stops.

    Raises:
        ValueError, OSError: keys or states cannot be read.
    """

    def __init__(self, pipe: Any, settings: ServerSettings, closing: Callable[[], bool] = lambda: False):
        self.settings, self.closing, self.pipe = settings, closing, pipe
        self.model, self.processor = pipe.model, pipe.processor
        if getattr(self.processor.tokenizer, "backend_tokenizer", None) is None:
            raise ValueError(
                "the model's tokenizer is none of the tokenizers library: the server cannot stream with it"
            )
        self.name = pipe.identity()["model"] or "video-ma2mba"
        self.keys = Keys(settings.keys_file)
        self.store = VideoStore(settings.states, settings.max_states_bytes)
        self.fetcher = Fetcher(settings.allow_urls, most_bytes=settings.max_upload_bytes)
        turns, self.cache = Turns(), StateCache(settings.memory_bytes)
        self.answerer = Answerer(
            self.model,
            self.processor.tokenizer,
            turns,
            most_rows=settings.max_batch,
            most_waiting=settings.most_questions,
            batched=metrics.BATCH.observe,
        )
        limits = Limits(settings.max_seconds, settings.max_frames)
        self.reader = Reader(
            pipe, self.store, turns, self.cache, limits, settings.save_seconds, read=metrics.FRAMES.inc
        )
        self.zero = zero_state(self.model)
        self._quick = ThreadPoolExecutor(8, "quick")
        self._slow = ThreadPoolExecutor(settings.most_uploads, "slow")
        self.uploads = 0
        self._grammars: Any = None

    def close(self) -> None:
        """Finish the answers, leave the readings."""
        self.reader.close()
        self.answerer.close(self.settings.stop_seconds)
        self._quick.shutdown(wait=False, cancel_futures=True)
        self._slow.shutdown(wait=False, cancel_futures=True)

    async def quick(self, call: Callable[..., Any], *given: Any) -> Any:
        """The result of a call that takes moments, made in another thread."""
        return await asyncio.get_running_loop().run_in_executor(self._quick, call, *given)

    async def slow(self, call: Callable[..., Any], *given: Any) -> Any:
        """The result of a call that may take minutes."""
        return await asyncio.get_running_loop().run_in_executor(self._slow, call, *given)

    def measure(self) -> None:
        """Bring the gauges up to date."""
        videos, nbytes = self.store.totals()
        metrics.STORED.labels("videos").set(videos)
        metrics.STORED.labels("bytes").set(nbytes)
        metrics.WAITING.labels("questions").set(self.answerer.waiting)
        metrics.WAITING.labels("answers").set(self.answerer.running)
        metrics.WAITING.labels("uploads").set(self.uploads)

    # videos

    @contextmanager
    def upload(self) -> Any:
        """The right to send a file.

        Raises:
            TooMany: as many are being sent already, or wait to be read. StoreFull.
        """
        if self.uploads >= self.settings.most_uploads:
            raise TooMany(f"{self.uploads} uploads are being received already: send yours in a moment")
        self.check_waiting()
        self.store.check_room(self.zero.nbytes)
        self.uploads += 1
        try:
            yield
        finally:
            self.uploads -= 1

    def check_waiting(self) -> None:
        """See that another video may be queued. Raises TooMany."""
        waiting = self.store.count_waiting()
        if waiting >= self.settings.most_waiting:
            raise TooMany(f"{waiting} videos wait to be read already: send yours when some of them are done")

    def address_to_file(self, owner: str, address: str, sampled: Callable[[str], str]) -> tuple[Any, str, str]:
        """Fetch an address, unless its content was read before.

        Args:
            sampled: from a digest of the content to the key of a reading.

        Returns:
            The file (None where a video of that key is there), the digest, and the key.
        """
        self.fetcher.check(address)
        known = self.store.remembered_address(owner, address)
        asked = None
        if known is not None and (known["etag"] or known["modified"]):
            key = sampled(known["digest"])
            asked = {"etag": known["etag"], "modified": known["modified"]} if self.store.of_key(owner, key) else None
        path = self.store.incoming()
        try:
            found = self.fetcher.fetch(address, path, asked)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        if found.path is None and known is not None:
            return None, known["digest"], sampled(known["digest"])
        self.store.remember_address(owner, address, found.etag, found.modified, found.digest, found.size)
        return found.path, found.digest, sampled(found.digest)

    def _medium_to_video(self, owner: str, medium: Medium, base: Video | None) -> Video:
        """The video that is, or will be, read of a medium behind `base`."""
        before = "" if base is None else base.key or f"{base.id}:{base.version}"

        def sampled(digest: str) -> str:
            return self.reader.key(before, medium.prefix, medium.kind, digest, medium.settings)

        path = None
        if medium.source.startswith("data:"):
            data = data_of(medium.source)
            if len(data) > self.settings.max_upload_bytes:
                raise TooLarge(f"the data of a {medium.kind} are larger than this server takes")
            import hashlib

            digest = hashlib.sha256(data).hexdigest()
            key, name = sampled(digest), f"{medium.kind} {digest[:8]}"
            if self.store.of_key(owner, key) is None:
                path = self.store.incoming()
                path.write_bytes(data)
        else:
            path, digest, key = self.address_to_file(owner, medium.source, sampled)
            name = address_name(medium.source)
        video = self.store.of_key(owner, key)
        if video is not None:
            if path is not None:
                path.unlink(missing_ok=True)
            return video
        if path is None:  # it has made room for others meanwhile
            return self._medium_to_video(owner, medium, base)
        try:
            self.check_waiting()
            self.store.check_room(self.zero.nbytes)
            settings = {**medium.settings, "kind": medium.kind, "prefix": medium.prefix}
            settings["base"] = None if base is None else base.id
            return self.store.create(owner, name, path, key=key, lease=time.time() + LEASE, settings=settings)
        finally:
            path.unlink(missing_ok=True)

    async def until_read(self, video: Video) -> Video:
        """The video when it has been read.

        Raises:
            ServingError: it could not be read, for a reason of any kind.
            NotThere: it was deleted. Unavailable: the server stops.
        """
        pause = 0.01
        while True:
            if video.status == "completed":
                return video
            if video.status == "failed":
                raise error_with(video.error_code, video.error, "messages")
            if self.closing():
                raise Unavailable("the server is stopping: ask again in a moment, and the reading goes on")
            if video.lease is not None and video.lease - time.time() < LEASE / 2:
                video = await self.quick(self.store.extend_lease, video)
                self.reader.wake()
            await asyncio.sleep(pause)
            pause = min(0.25, pause * 1.5)
            video = await self.quick(self.store.get, video.id)

    async def prepare(self, owner: str, conversation: Conversation) -> tuple[Any, dict[str, Any] | None]:
        """The state that a conversation is about, everything of it read; and what the answer says of that."""
        video: Video | None = None
        cached = True
        for medium in conversation.media:
            if medium.state_id is not None:
                video = await self.quick(self.store.get, medium.state_id, owner)
            else:
                video = await self.slow(self._medium_to_video, owner, medium, video)
                self.reader.wake()
            cached = cached and video.status == "completed"
            video = await self.until_read(video)
        if video is None:
            return self.zero, None
        state = await self.quick(self.reader.state_of, video)
        await self.quick(self.store.touch, video)
        metrics.CACHED.labels(str(cached).lower()).inc()
        names = ("id", "name", "frames", "fps", "seconds", "read_seconds")
        return state, {**{name: value for name, value in video.public().items() if name in names}, "cached": cached}

    # answers

    async def answers(
        self, state: Any, prompt: Sequence[int], settings: Sequence[AnswerSettings], stream: bool
    ) -> AsyncIterator[tuple[int, Piece | Ended]]:
        """Pieces of several answers to one question as they come, each with its number; `Ended` at the end of each.

        Whoever stops listening ends them.

        Args:
            stream: else all pieces come at the end of an answer.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        held: dict[int, list[Piece]] = {}

        def tell(entries: list[tuple[int, Any]]) -> None:
            for entry in entries:
                queue.put_nowait(entry)

        def deliver(number: int, what: Any) -> None:
            entries = [(number, what)]
            if not stream and isinstance(what, Piece):
                held.setdefault(number, []).append(what)
                return
            if not stream:
                entries = [(number, piece) for piece in held.pop(number, [])] + entries
            loop.call_soon_threadsafe(tell, entries)

        rows = self.answerer.ask(state, prompt, settings, deliver)
        left = len(rows)
        try:
            while left:
                number, what = await queue.get()
                if isinstance(what, Exception):
                    raise what
                left -= isinstance(what, Ended)
                yield number, what
        finally:
            for row in rows:
                row.finished = True

    def grammar(self, response_format: dict[str, Any] | None) -> Callable[[], Any] | None:
        """Makes what holds an answer to the form asked for; None where any text will do.

        Raises:
            BadRequest: there is no such form, or its schema makes no sense.
        """
        kind = (response_format or {}).get("type", "text")
        if kind == "text":
            return None
        if kind == "json_object":
            schema: Any = {"type": "object"}
        elif kind == "json_schema":
            given = (response_format or {}).get("json_schema")
            schema = given.get("schema") if isinstance(given, dict) else None
            if not isinstance(schema, dict):
                raise BadRequest("response_format.json_schema.schema is missing", "response_format")
        else:
            raise BadRequest(f"the response_format {kind!r:.40} is not supported", "response_format")
        try:
            import llguidance
            import llguidance.hf
        except ImportError:
            raise BadRequest(
                "this server was installed without llguidance: no response_format", "response_format"
            ) from None
        text = json.dumps(schema)
        if len(text) > _LONGEST_GRAMMAR:
            raise BadRequest(f"the schema is longer than {_LONGEST_GRAMMAR} characters", "response_format")
        if self._grammars is None:
            vocabulary = self.model.config.text_config.vocab_size
            self._grammars = llguidance.hf.from_tokenizer(
                self.processor.tokenizer, n_vocab=vocabulary, eos_token=list(self.answerer.ends) or None
            )
        tokenizer = self._grammars
        try:
            made = llguidance.LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_flexible": False})
            wrong = llguidance.LLMatcher.validate_grammar(made, tokenizer)
        except ValueError as error:
            wrong = str(error)
        if wrong:
            raise BadRequest(f"the schema cannot be followed: {wrong[:400]}", "response_format")
        return lambda: llguidance.LLMatcher(tokenizer, made)
