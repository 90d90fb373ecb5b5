"""Fetching videos from addresses that the server allows, and from no others, whatever a name or a redirect says."""

from __future__ import annotations

import hashlib
import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from ..processing.video_source_names import shown_name
from .errors import BadRequest, Forbidden, TooLarge

_REDIRECTS = 5
_BLOCK = 2**18


@dataclass(frozen=True)
class Fetched:
    """What an address held: the digest of its bytes and their number; `etag` and `modified` as its server told them.

    `path` is None where the server said that nothing has changed.
    """

    path: Path | None
    digest: str
    size: int
    etag: str
    modified: str


class Fetcher:
    """Fetches what is allowed.

    Args:
        allowed: beginnings of addresses (`https://films.example/public/`), hosts (`films.example`), or `*`. An address
            of the server's own network is fetched only where it stands here by its number.
        most_bytes: of a file. timeout: seconds without data. longest: seconds for a whole file.
    """

    def __init__(
        self, allowed: Sequence[str], *, most_bytes: int = 2**32, timeout: float = 15.0, longest: float = 3600.0
    ):
        self.allowed = [entry.strip() for entry in allowed if entry.strip()]
        self.most_bytes, self.timeout, self.longest = most_bytes, timeout, longest

    def check(self, address: str) -> SplitResult:
        """The parts of an address that may be fetched.

        Raises:
            Forbidden: it may not. BadRequest: it is no address of a web server.
        """
        try:
            parts = urlsplit(address)
            port = parts.port
        except ValueError as error:
            raise BadRequest(f"{shown_name(address)[:200]!r} is no address: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            raise BadRequest(f"{shown_name(address)[:200]!r} is no address of a video: use http:// or https://")
        if any(ord(sign) <= 32 or ord(sign) == 127 or "\ud800" <= sign <= "\udfff" for sign in address):
            raise BadRequest("an address must not hold spaces or control characters: write them as %XX")
        if not self.allowed:
            raise Forbidden("this server fetches no addresses: upload the video, or start it with --allow-url")
        if not any(_matches(parts, entry) for entry in self.allowed):
            raise Forbidden(f"this server does not fetch from {parts.hostname}: it is not on its list (--allow-url)")
        return parts

    def fetch(self, address: str, path: Path, known: Mapping[str, str] | None = None) -> Fetched:
        """Fetch a file, following redirects to addresses that are allowed, too.

        Args:
            path: where to write it. known: `etag` and `modified` of what is there already.

        Raises:
            Forbidden, BadRequest: as `check`, and where a name leads into a private network, or its server gives no
                file. TooLarge.
        """
        deadline = time.monotonic() + self.longest
        validators = {"If-None-Match": (known or {}).get("etag"), "If-Modified-Since": (known or {}).get("modified")}
        for _ in range(_REDIRECTS + 1):
            parts = self.check(address)
            with self._asked(parts, {name: value for name, value in validators.items() if value}) as answer:
                told = answer.headers
                if answer.status in (301, 302, 303, 307, 308) and told.get("Location"):
                    try:
                        address = urljoin(address, told["Location"].encode("latin-1").decode("utf-8", "replace"))
                    except ValueError:
                        raise BadRequest(f"{shown_name(address)}: its server leads to what is no address") from None
                    continue
                if answer.status == 304 and known:
                    return Fetched(None, "", 0, known.get("etag") or "", known.get("modified") or "")
                if answer.status != 200:
                    raise BadRequest(f"{shown_name(address)}: its server answers {answer.status} {answer.reason}")
                digest, size = self._received(answer, path, shown_name(address), deadline)
                return Fetched(path, digest, size, told.get("ETag") or "", told.get("Last-Modified") or "")
        raise BadRequest(f"{shown_name(address)}: more than {_REDIRECTS} redirects")

    @contextmanager
    def _asked(self, parts: SplitResult, headers: dict[str, str]) -> Iterator[http.client.HTTPResponse]:
        secure = parts.scheme == "https"
        host = parts.hostname or ""
        port = parts.port or (443 if secure else 80)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        target = quote(target, safe="".join(map(chr, range(33, 127))))  # letters that are not ASCII, as browsers do
        named = any(_matches(parts, entry) and _host_of(entry) == host for entry in self.allowed)
        try:
            with closing(_connected(host, port, secure, self.timeout, named and _is_number(host))) as connection:
                connection.request(
                    "GET", target, headers={"User-Agent": "video-ma2mba", "Accept-Encoding": "identity"} | headers
                )
                with closing(connection.getresponse()) as answer:
                    yield answer
        except (OSError, http.client.HTTPException, UnicodeError) as error:  # the last: no name of a host
            raise BadRequest(
                f"{shown_name(parts.geturl())}: it cannot be fetched ({error or type(error).__name__})"
            ) from None

    def _received(self, answer: http.client.HTTPResponse, path: Path, name: str, deadline: float) -> tuple[str, int]:
        limit = f"{name}: the file is larger than this server takes ({self.most_bytes / 1e6:.0f} MB)"
        promised = answer.length  # None: not told
        if promised is not None and promised > self.most_bytes:
            raise TooLarge(limit)
        digest, size = hashlib.sha256(), 0
        with path.open("wb") as file:
            while block := answer.read1(_BLOCK):
                size += len(block)
                if size > self.most_bytes:
                    raise TooLarge(limit)
                if time.monotonic() > deadline:
                    raise BadRequest(f"{name}: fetching it took more than {self.longest:g} s")
                digest.update(block)
                file.write(block)
        if promised is not None and size < promised:
            raise BadRequest(f"{name}: its server sent {size:,} of {promised:,} bytes and no more: try again")
        return digest.hexdigest(), size


def address_name(address: str) -> str:
    """What a video of an address is called: the last part of its path, else its host."""
    parts = urlsplit(address)
    return unquote(parts.path.rstrip("/").rpartition("/")[2]) or parts.hostname or ""


def public_address(host: str, port: int, private_too: bool = False) -> str:
    """The number to connect to, looked up once: nothing is asked again after it was checked.

    Raises:
        Forbidden: one of the host's numbers belongs to a private network, this machine or no network at all.
        OSError: there is no such host.
    """
    found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not private_too and not all(map(_is_public, found)):
        raise Forbidden(f"{host} leads into a private network, from which this server fetches nothing")
    return found[0]


def _is_public(number: str) -> bool:
    """Whether a number is one of the internet; one of IPv6 that stands for one of IPv4 is judged by that, too."""
    parsed = ipaddress.ip_address(number.partition("%")[0])
    inner = [parsed]
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return _is_public(str(parsed.ipv4_mapped))
        if parsed in ipaddress.ip_network("64:ff9b::/96"):  # translated by the network
            inner.append(ipaddress.ip_address(int(parsed) & 0xFFFFFFFF))
        elif parsed not in ipaddress.ip_network("2000::/3"):  # all that is given out to the world, so far
            return False
        inner += [one for one in (parsed.sixtofour, *(parsed.teredo or ())) if one is not None]
    return all(one.is_global and not one.is_multicast for one in inner)


def _connected(host: str, port: int, secure: bool, timeout: float, private_too: bool) -> http.client.HTTPConnection:
    """A connection to a number that was checked; certificates are those of the name."""
    number = public_address(host, port, private_too)
    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    raw = socket.create_connection((number, port), timeout)
    connection.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=host) if secure else raw
    return connection


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _host_of(entry: str) -> str:
    return (urlsplit(entry).hostname or "") if "://" in entry else urlsplit(f"//{entry}").hostname or ""


def _matches(parts: SplitResult, entry: str) -> bool:
    """Whether an address begins as an entry of the list says; of a path, whole parts count."""
    if entry == "*":
        return True
    wanted = urlsplit(entry if "://" in entry else f"//{entry}")
    if wanted.hostname != parts.hostname or (wanted.scheme and wanted.scheme != parts.scheme):
        return False
    ports = {"http": 80, "https": 443}
    if (wanted.port or wanted.scheme) and (wanted.port or ports.get(wanted.scheme)) != (
        parts.port or ports.get(parts.scheme)
    ):
        return False
    path = wanted.path.rstrip("/")
    plain = ".." not in parts.path.replace("%2e", ".").replace("%2E", ".").split("/")
    return not path or (plain and (parts.path == path or parts.path.startswith(f"{path}/")))
