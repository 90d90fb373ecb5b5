"""Videos that a server keeps: an index in SQLite, a folder of files for each, a bound on their size.

Several processes share one store. Nothing that has been acknowledged is lost when one is killed: the index is
transactional, states are replaced whole, and whoever reads a video holds a lock that ends with its process.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import NotThere, StoreFull

ID = re.compile(r"video_[0-9a-f]{32}")
LEASE = 15.0
"""Seconds for which a reading goes on that a conversation asked for, after the last sign of somebody waiting."""
_STALE, _FORGOTTEN, _SWEPT = 3600.0, 86400.0, 60.0
_SEEN = 2.0
_NOTED = 5.0  # seconds between two notes of a video's use


@dataclass(frozen=True)
class Video:
    """What the index says of a video.

    Attributes:
        id: `video_` and 32 hexadecimal digits. owner: of which key (a digest of it), "" without keys.
        key: of content, sampling and all that was read before it; "" where frames were added one by one.
        status: queued, in_progress, completed or failed.
        created, used: seconds of the epoch. lease: until when it is worth reading; None: it is in any case.
        frames, expected, fps, seconds: read so far, expected, and of what sampling and length.
        version: counts up whenever the state is replaced. bytes: of its state.
        error, error_code: why it could not be read, as `errors.error_of` knows it.
        settings: how it is read, see `reading`.
    """

    id: str
    owner: str
    key: str
    name: str
    status: str
    created: float
    used: float
    lease: float | None
    pinned: bool
    frames: int
    expected: int | None
    fps: float | None
    seconds: float
    bytes: int
    version: int
    read_seconds: float
    error: str
    error_code: str
    settings: dict[str, Any]

    def public(self) -> dict[str, Any]:
        """As the server tells it: the fields of OpenAI's own video object, and ours."""
        share = min(1.0, self.frames / self.expected) if self.expected else 0.0
        return {
            "id": self.id,
            "object": "video",
            "status": self.status,
            "progress": 100 if self.status == "completed" else int(99 * share),
            "created_at": int(self.created),
            "name": self.name,
            "frames": self.frames,
            "expected_frames": self.expected,
            "fps": self.fps,
            "seconds": self.seconds,
            "bytes": self.bytes,
            "pinned": self.pinned,
            "read_seconds": round(self.read_seconds, 3),
            "error": {"code": self.error_code, "message": self.error} if self.error else None,
        }


_COLUMNS = {
    **{name: "TEXT NOT NULL DEFAULT ''" for name in ("owner", "key", "name", "status", "error", "error_code")},
    **{name: "REAL NOT NULL DEFAULT 0" for name in ("created", "used", "seconds", "read_seconds")},
    **{name: "INTEGER NOT NULL DEFAULT 0" for name in ("pinned", "frames", "bytes", "version")},
    **{"lease": "REAL", "expected": "INTEGER", "fps": "REAL", "settings": "TEXT NOT NULL DEFAULT '{}'"},
}
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS videos (id TEXT PRIMARY KEY, {", ".join(f"{n} {t}" for n, t in _COLUMNS.items())});
CREATE INDEX IF NOT EXISTS by_key ON videos (owner, key);
CREATE INDEX IF NOT EXISTS by_status ON videos (status, created);
CREATE TABLE IF NOT EXISTS addresses (owner TEXT, address TEXT, etag TEXT, modified TEXT, digest TEXT, bytes INTEGER,
    PRIMARY KEY (owner, address));
"""


class VideoStore:
    """A folder of videos.

    Args:
        folder: made where it does not exist; only its owner may look into it.
        most_bytes: of all states together; those not asked for the longest go, pinned ones stay. None: no bound.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], most_bytes: int | None = None):
        self.folder = Path(folder)
        self.most_bytes = most_bytes
        self.evicted = 0
        self._swept = 0.0
        self._local = threading.local()
        self._noted: dict[str, float] = {}
        for part in (self.folder, self.folder / "videos", self.folder / "incoming"):
            part.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._connection().executescript(_SCHEMA)
        self._clear_leftovers()

    def _clear_leftovers(self) -> None:
        """Remove uploads that broke off and folders of no video, if they are old: another process may be at it."""
        now = time.time()
        for path in (self.folder / "incoming").iterdir():
            with suppress(OSError):
                if now - path.stat().st_mtime > _STALE:
                    path.unlink()
        known = {row[0] for row in self._connection().execute("SELECT id FROM videos")}
        for path in (self.folder / "videos").iterdir():
            with suppress(OSError):
                if path.name not in known and now - path.stat().st_mtime > _STALE:
                    shutil.rmtree(path)

    def _connection(self) -> sqlite3.Connection:
        found = getattr(self._local, "connection", None)
        if found is None:
            found = sqlite3.connect(self.folder / "index.sqlite", timeout=60, isolation_level=None)
            found.row_factory = sqlite3.Row
            found.execute("PRAGMA journal_mode=WAL")
            self._local.connection = found
        return found

    @contextmanager
    def _index(self) -> Iterator[sqlite3.Connection]:
        """A transaction that nobody else writes in."""
        index = self._connection()
        if index.in_transaction:  # of the caller
            yield index
            return
        index.execute("BEGIN IMMEDIATE")
        try:
            yield index
        except BaseException:
            index.execute("ROLLBACK")
            raise
        index.execute("COMMIT")

    def _select(self, condition: str, values: Sequence[Any] = ()) -> list[Video]:
        rows = self._connection().execute(f"SELECT * FROM videos WHERE {condition}", values)
        names = [field.name for field in fields(Video)]
        return [
            Video(
                **{
                    n: json.loads(row[n]) if n == "settings" else bool(row[n]) if n == "pinned" else row[n]
                    for n in names
                }
            )
            for row in rows
        ]

    # files

    def incoming(self) -> Path:
        """A new name for a file that is being received."""
        return self.folder / "incoming" / secrets.token_hex(16)

    def state_file(self, video: Video) -> Path:
        """The file of its state."""
        return self.folder / "videos" / video.id / "state.safetensors"

    def source_file(self, video: Video) -> Path:
        """The file it is read from, until it has been read."""
        return self.folder / "videos" / video.id / "source"

    def partial_file(self, video: Video) -> Path:
        """The file of its unfinished state."""
        return self.folder / "videos" / video.id / "partial"

    @contextmanager
    def lock(self, video: Video, seconds: float = 0.0) -> Iterator[bool]:
        """The right to read it or to add to it; False where another thread or process has it for so long."""
        lock = FileLock(self.folder / "videos" / video.id / "lock", thread_local=False)
        try:
            lock.acquire(timeout=seconds)
        except (Timeout, OSError):  # held, or the video was deleted
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    # looking

    def get(self, video_id: str, owner: str | None = None) -> Video:
        """A video by its id.

        Args:
            owner: who asks; None is the server itself.

        Raises:
            NotThere: there is none, or it belongs to another.
        """
        found = self._select("id = ?", [video_id]) if ID.fullmatch(video_id) else []
        if not found or (owner is not None and found[0].owner != owner):
            raise NotThere(
                f"there is no video {video_id[:80]!r}: it was never here, was deleted, or made room for others"
            )
        return found[0]

    def listed(self, owner: str, limit: int = 20, after: str | None = None, newest_first: bool = True) -> list[Video]:
        """Videos of an owner, `limit` of them, from behind the video `after`.

        Raises:
            NotThere: there is no video `after`.
        """
        sign, order = ("<", "DESC") if newest_first else (">", "ASC")
        condition, values = "owner = ?", [owner]
        if after is not None:
            last = self.get(after, owner)
            condition, values = f"owner = ? AND (created, id) {sign} (?, ?)", [owner, last.created, last.id]
        return self._select(f"{condition} ORDER BY created {order}, id {order} LIMIT ?", [*values, limit])

    def of_key(self, owner: str, key: str) -> Video | None:
        """A video of an owner that was, or is being, read from the same content in the same way."""
        order = "CASE status WHEN 'completed' THEN 0 WHEN 'in_progress' THEN 1 ELSE 2 END, created"
        found = self._select(f"owner = ? AND key = ? AND status != 'failed' ORDER BY {order} LIMIT 1", [owner, key])
        return found[0] if found else None

    def waiting(self) -> list[Video]:
        """Videos to read, the oldest first; some may be read by others already."""
        return self._select(
            "status IN ('queued', 'in_progress') AND (lease IS NULL OR lease > ?) ORDER BY created", [time.time()]
        )

    def count_waiting(self) -> int:
        """Number of videos to read."""
        return len(self.waiting())

    def totals(self) -> tuple[int, int]:
        """Number of videos, and bytes of their states."""
        return tuple(self._connection().execute("SELECT COUNT(*), COALESCE(SUM(bytes), 0) FROM videos").fetchone())

    # changing

    def create(self, owner: str, name: str, source: Path | None, **facts: Any) -> Video:
        """A new video, from a file of `incoming` that it takes over.

        Args:
            facts: fields of `Video`; by default it is queued to be read.
        """
        now = time.time()
        video_id = f"video_{secrets.token_hex(16)}"
        folder = self.folder / "videos" / video_id
        folder.mkdir(mode=0o700)
        if source is not None:
            os.replace(source, folder / "source")
        given = {"status": "queued", "created": now, "used": now, **facts}
        values = {"id": video_id, "owner": owner, "name": clean_name(name), **_as_stored(given)}
        with self._index() as index:
            marks = ", ".join("?" * len(values))
            index.execute(f"INSERT INTO videos ({', '.join(values)}) VALUES ({marks})", list(values.values()))
        return self.get(video_id)

    def update(self, video: Video, **facts: Any) -> Video:
        """Change fields.

        Raises:
            NotThere: it was deleted meanwhile.
        """
        facts |= {"name": clean_name(facts["name"])} if "name" in facts else {}
        stored = _as_stored(facts)
        with self._index() as index:
            assigned = ", ".join(f"{name} = ?" for name in stored)
            index.execute(f"UPDATE videos SET {assigned} WHERE id = ?", [*stored.values(), video.id])
        return self.get(video.id)

    def extend_lease(self, video: Video) -> Video:
        """Somebody still waits for its reading. Raises NotThere."""
        return self.update(video, lease=time.time() + LEASE)

    def touch(self, video: Video) -> None:
        """Note that it was asked for."""
        now = time.time()
        if now - self._noted.get(video.id, 0.0) >= _NOTED:
            self._noted = {name: moment for name, moment in self._noted.items() if now - moment < _NOTED}
            self._noted[video.id] = now
            with self._index() as index:
                index.execute("UPDATE videos SET used = ? WHERE id = ?", [now, video.id])

    def finish(self, video: Video, state: Any, **facts: Any) -> Video:
        """Keep a state, and make room for it.

        Args:
            state: a `VideoState`, saved whole; its metadata tell frames, seconds and rate.

        Raises:
            NotThere: the video was deleted meanwhile. OSError: the disk is full, or the like.
        """
        self.get(video.id)
        file = self.state_file(video)
        state.save(file)
        seen = state.metadata
        now = time.time()
        lease = None if video.lease is None else now + _SEEN  # whoever waits for it sees it before it makes room
        facts = {"status": "completed", "error": "", "lease": lease, "used": now, **facts}
        facts |= {"frames": int(seen.get("frames", 0)), "seconds": float(seen.get("seconds", 0))}
        facts |= {"bytes": file.stat().st_size, "version": video.version + 1}
        if seen.get("fps") not in (None, "None"):
            facts["fps"] = float(seen["fps"])
        kept = self.update(video, **facts)
        for leftover in (self.partial_file(video), self.source_file(video)):
            leftover.unlink(missing_ok=True)
        self._make_room(kept)
        return kept

    def delete(self, video: Video) -> None:
        """Forget it, at once and whatever is being done with it."""
        with self._index() as index:
            index.execute("DELETE FROM videos WHERE id = ?", [video.id])
        shutil.rmtree(self.folder / "videos" / video.id, ignore_errors=True)

    def forget_abandoned(self) -> None:
        """Delete readings of conversations that failed, or that nobody has waited for in the last hour; and, after a
        day, failed uploads, videos without frames, and notes of addresses beyond the last ten thousand."""
        now = time.time()
        if now - self._swept > _SWEPT:
            self._swept = now
            abandoned = "status != 'completed' AND lease < ?"
            empty = "(status = 'failed' OR status = 'completed' AND bytes = 0) AND NOT pinned AND used < ?"
            for video in self._select(f"{abandoned} OR {empty}", [now - _STALE, now - _FORGOTTEN]):
                self.delete(video)
            with self._index() as index:
                newest = "SELECT rowid FROM addresses ORDER BY rowid DESC LIMIT 10000"
                index.execute(f"DELETE FROM addresses WHERE rowid NOT IN ({newest})")

    def check_room(self, nbytes: int) -> None:
        """See that a state of so many bytes can be kept.

        Raises:
            StoreFull: pinned states leave no room, or the disk has none.
        """
        pinned = self._connection().execute("SELECT COALESCE(SUM(bytes), 0) FROM videos WHERE pinned").fetchone()[0]
        if self.most_bytes is not None and pinned + nbytes > self.most_bytes:
            raise StoreFull("pinned videos take all the room for states: unpin or delete some")
        if shutil.disk_usage(self.folder).free < nbytes + 2**28:
            raise StoreFull("the disk of the server is full: delete videos, or try again later")

    def _make_room(self, newest: Video) -> None:
        """Delete what was not asked for the longest until the rest fits; the newest stays."""
        while self.most_bytes is not None and self.totals()[1] > self.most_bytes:
            found = self._select(
                "status = 'completed' AND NOT pinned AND bytes > 0 AND id != ? AND (lease IS NULL OR lease < ?) "
                "ORDER BY used LIMIT 1",
                [newest.id, time.time()],
            )
            if not found:
                return
            self.delete(found[0])
            self.evicted += 1

    # addresses

    def remembered_address(self, owner: str, address: str) -> sqlite3.Row | None:
        """What is known of the content of an address: etag, modified, digest, bytes."""
        return (
            self._connection()
            .execute("SELECT * FROM addresses WHERE owner = ? AND address = ?", [owner, _digest(address)])
            .fetchone()
        )

    def remember_address(self, owner: str, address: str, etag: str, modified: str, digest: str, size: int) -> None:
        """Note what an address held; the address itself, which may let somebody in, is not written down."""
        with self._index() as index:
            index.execute(
                "INSERT OR REPLACE INTO addresses VALUES (?, ?, ?, ?, ?, ?)",
                [owner, _digest(address), etag, modified, digest, size],
            )

    def close(self) -> None:
        """Close this thread's connection to the index."""
        if getattr(self._local, "connection", None) is not None:
            self._local.connection.close()
            self._local.connection = None


def clean_name(name: str) -> str:
    """A video's name for people: the last part of a path, without control characters, of at most 200 characters."""
    last = re.split(r"[/\\]", name.strip())[-1]
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "", last)[:200] or "video"


def _as_stored(facts: dict[str, Any]) -> dict[str, Any]:
    unknown = facts.keys() - _COLUMNS.keys()
    assert not unknown, unknown
    return {name: json.dumps(value) if name == "settings" else value for name, value in facts.items()}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
