"""What a server is started with."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..files.text_files import text_lines

_KEY = re.compile(r"[\x21-\x7e]{8,}")


@dataclass(frozen=True)
class ServerSettings:
    """See `video-ma2mba serve --help` for those that are options.

    Attributes:
        idle_seconds: without a byte from a client that is sending, or from one that should be receiving; its request
            ends then. slowest: bytes a second that a client has to send at least.
        most_connections: requests at once; most_uploads: of these, uploads. most_waiting: videos waiting to be read.
        most_json: bytes of a request that is no upload.
        stop_seconds: for answers to end when the server is told to stop.
    """

    model: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    states: str = "states"
    max_states_bytes: int | None = None
    memory_bytes: int = 2**31
    keys_file: str | None = None
    allow_urls: list[str] = field(default_factory=list)
    allow_origins: list[str] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)
    max_upload_bytes: int = 2**32
    max_seconds: float = 86400.0
    max_frames: int = 200_000
    max_new_tokens: int = 4096
    max_batch: int = 64
    most_questions: int = 256
    most_waiting: int = 64
    most_uploads: int = 16
    most_connections: int = 512
    most_json: int = 2**27
    save_seconds: float = 10.0
    idle_seconds: float = 30.0
    slowest: float = 10_000.0
    stop_seconds: float = 30.0

    def as_json(self) -> str:
        """For another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ServerSettings:
        """Of `as_json`."""
        return cls(**json.loads(text))


def read_keys(file: str | Path) -> list[str]:
    """Keys of a file, one a line; empty lines and lines that begin with # do not count.

    Raises:
        ValueError: it holds no key, or one of fewer than 8 characters. OSError: it cannot be read.
    """
    keys = []
    for number, line in enumerate(text_lines(file), 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if not _KEY.fullmatch(key):
            raise ValueError(f"{file}, line {number}: a key has at least 8 characters, and no spaces in it")
        keys.append(key)
    if not keys:
        raise ValueError(f"{file} holds no key: write one a line, for instance of `openssl rand -hex 24`")
    return keys


class Keys:
    """Who may use the server.

    Args:
        file: of keys; None: everybody may.

    Raises:
        ValueError, OSError: as `read_keys`.
    """

    def __init__(self, file: str | Path | None):
        digests = [] if file is None else [hashlib.sha256(key.encode()).digest() for key in read_keys(file)]
        self._owners = [(digest, digest.hex()[:32]) for digest in digests]

    @property
    def needed(self) -> bool:
        """Whether a key must be given."""
        return bool(self._owners)

    def owner(self, key: str) -> str | None:
        """Whose videos a key opens, or None. Takes as long for a wrong key as for a right one."""
        if not self._owners:
            return ""
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        found = None
        for known, owner in self._owners:
            if hmac.compare_digest(known, digest):
                found = owner
        return found
