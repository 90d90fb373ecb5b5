"""What a source is called and where it is: addresses without passwords and tokens, `file:` addresses, `~`.

A name is printed, logged and saved; whatever lets somebody in must not be part of it. Where it is not certain which
part of an address is a password, all that could be one is left out.
"""

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes

IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".heic", ".heif", ".jfif", ".jpeg", ".jpg", ".mpo", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
_HARMLESS = re.compile(
    "channel|ch|codec|end|format|fps|height|id|index|lang|list|page|profile|quality|resolution|start|stream|subtype|t|"
    "track|v|width"
)
"""Parameters of an address that tell videos apart and let nobody in; the others are left out of names."""
_PLAIN_VALUE = re.compile(r"[\w.,:+-]{1,64}")
_SECRET_WORDS = (
    r"\w*(?:password|passwd|passphrase|pwd|token|secret|signature|credential|api_?key|access_?key)|sig|hmac"
)
_SCHEME = r"[A-Za-z][A-Za-z0-9+.\-]*"
_ADDRESS = re.compile(rf"\b{_SCHEME}://(?:\S*@)?[^\s\"'<>`]*")
_LOGIN = re.compile(rf"^((?:{_SCHEME}:/+)?)[^/:]*:.*@", re.DOTALL)
_ASSIGNED = re.compile(rf"(?i)(?<![\w-])((?:{_SECRET_WORDS})\s?=)\s?[^\s&;,'\")\]}}]+")
_REQUESTED = re.compile(r"(\burl: /[^\s?]*)\?[^\s'\"]*")  # in messages of urllib3
_HEADER = re.compile(r"(?i)(\b(?:proxy-)?authorization['\"]?: ?['\"]?\w+ )[^\s'\",]+")


def shown_name(source: Any) -> str:
    """What a source is called in messages, results and metadata: an address without login, tokens and the like."""
    text = os.fsdecode(source) if isinstance(source, bytes | os.PathLike) else str(source)
    if "://" in text:
        begin = re.search(rf"{_SCHEME}://", text)  # not always at 0: cache:http://...
        return text if begin is None else text[: begin.start()] + _masked_address(text[begin.start() :])
    if "@" in text and not os.path.lexists(text):  # an address whose scheme was forgotten or is half written
        return _LOGIN.sub(r"\1", text)
    return text


def without_secrets(text: str) -> str:
    """A message without what lets somebody in: every address in it masked, values of passwords and tokens left out."""

    def masked(match: re.Match[str]) -> str:
        address = match[0].rstrip(".,:;)]}")
        return shown_name(address) + match[0][len(address) :]

    if "://" in text:
        text = _ADDRESS.sub(masked, text)
    return _HEADER.sub(r"\1***", _ASSIGNED.sub(r"\1***", _REQUESTED.sub(r"\1", text)))


def _masked_address(address: str) -> str:
    scheme, rest = address.split("://", 1)
    rest = rest[_login_length(scheme, rest) :]
    place, _, fragment = rest.partition("#")
    place, _, query = place.partition("?")
    place = re.sub(r"([\w.~*%-]+?)(=|%3[dD])([^/&;]*)", _masked_value, place)
    place = re.sub(rf"(?i)(?<=/)({_SECRET_WORDS})/[^/]+", r"\1/***", place)
    for mark, text in (("?", query), ("#", fragment)):
        kept = [part for part in re.split("[&;]", text) if part == re.sub(r"([^=]*)(=)(.*)", _masked_value, part)]
        kept = [part for part in kept if "=" in part]
        place += mark + "&".join(kept) if kept else ""
    return f"{scheme}://{place}"


def _masked_value(match: re.Match[str]) -> str:
    name, mark, value = match.groups()
    return match[0] if _HARMLESS.fullmatch(name.lower()) and _PLAIN_VALUE.fullmatch(value) else f"{name}{mark}***"


def _authority(rest: str) -> str:
    """Login, host and port of what follows :// in an address."""
    return re.split(r"[/?#]", rest, maxsplit=1)[0]


def _login_length(scheme: str, rest: str) -> int:
    """Characters of the login in front of the host, its @ included; passwords may hold any of @, /, ? and #."""
    if "@" not in rest:
        return 0
    authority = _authority(rest)
    login, at, host = authority.rpartition("@")
    tail = rest[len(authority) :]
    later = [match.start() for match in re.finditer("@", tail)]
    name, _, port = host.partition(":") if not host.startswith("[") else (host, "", "")
    named = "." in name or name == "localhost" or name.startswith("[")  # rather a host than the half of a password
    in_path = [place for place in later if "?" not in tail[:place]]
    harmless = tail.startswith("/") and all(tail[place - 1] == "/" for place in in_path)  # https://host/@somebody
    if scheme.lower() in ("http", "https") and not at and ":" not in authority:  # no password
        return 0
    if not later or (named and (not port or port.isdecimal()) and harmless):
        return len(login) + len(at)
    return rest.rindex("@") + 1


def address_to_open(address: str) -> str:
    """The address with a login that FFmpeg reads as it was meant: what stands in a password is written as %XX."""
    scheme, rest = address.split("://", 1)
    authority = _authority(rest)
    host = authority.rpartition("@")[2]
    well_formed = re.fullmatch(r"(\[[^\]]*\]|[^:]*)(:\d*)?", host) and rest[len(authority) : len(authority) + 1] != "#"
    if "@" in authority and "#" in rest and "@" in rest.partition("#")[2]:
        well_formed = False
    length = len(authority) - len(host) if well_formed else _login_length(scheme, rest)
    if not length:
        return address
    login = quote(rest[: length - 1], safe="%:!$&'()*+,;=-._~")
    return f"{scheme}://{login}@{rest[length:]}"


def is_address(source: Any) -> bool:
    """Whether a source is an address that has to be fetched (`file:` addresses have not)."""
    return isinstance(source, str) and "://" in source and source[:5].lower() != "file:"


def check_source(source: str | os.PathLike[str]) -> None:
    """Refuse what can be no video without decoding anything; no address is asked.

    Raises:
        FileNotFoundError: no such file. ValueError: an address that is not fetched, a pipe or device, an empty file,
            a directory without pictures, a file of text.
    """
    name = shown_name(source)
    if is_address(source):
        scheme = str(source).split("://", 1)[0].lower()
        if scheme in ("http", "https"):
            return
        raise ValueError(
            f"{name}: addresses of the kind {scheme}:// are not supported; use a file or http(s) "
            "(or `watch`, for a stream)"
        )
    if not os.fspath(source):
        raise ValueError("the path of the video is empty")
    path = local_path(source)
    if not os.path.exists(path):  # unlike Path.exists, also for names that no file can have
        raise FileNotFoundError(f"{name}: no such file")
    if path.is_dir():
        list_directory(path)
        return
    if not path.is_file():
        raise ValueError(
            f"{name}: this is no file but a {'pipe' if path.is_fifo() else 'device'}, and a video is read more than "
            "once: write it into a file, or use `watch`"
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{name}: the file is empty (0 bytes)")
    if path.suffix.lower() not in IMAGE_SUFFIXES and _is_prose(path):
        raise ValueError(f"{name}: not a video, or its header is damaged (it holds text)")


def _is_prose(path: Path) -> bool:
    """Whether a file holds text that begins with a letter or a brace, and none in which FFmpeg or Pillow see pictures
    or a list of files."""
    with path.open("rb") as file:
        head = file.read(512)
    if re.match(rb"(?i)yuv4mpeg|ffconcat|webvtt|v=|p[1-7]\s|simple", head) or not re.match(rb"[A-Za-z{]", head):
        return False
    return re.fullmatch(rb"[\t\r\n -~]+", head) is not None


def list_directory(directory: Path) -> list[Path]:
    """Image files of a directory in natural order (`frame2` before `frame10`).

    Raises:
        ValueError: there is none.
    """

    def natural(path: Path) -> list[tuple[int, int, str]]:
        return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", path.name)]

    files = [path for path in directory.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "."]
    if not files:
        raise ValueError(f"{directory}: the directory contains no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return sorted((path for path in files if path.is_file()), key=natural)


def local_path(source: str | os.PathLike[str]) -> Path:
    """Where a file is that was named by a path, by `~/path` or by a `file:` address.

    A name that exists as it is written is taken so, whatever it begins with.

    Raises:
        ValueError: the address names a file of another computer.
    """
    text = os.fspath(source)
    if text[:5].lower() == "file:" and not os.path.lexists(text):
        return _path_of_address(text)
    if text.startswith("~") and not os.path.lexists(text):
        try:
            return Path(text).expanduser()
        except RuntimeError:  # ~name, and there is no user of that name
            pass
    return Path(text)


def _path_of_address(address: str) -> Path:
    rest = address[5:]
    if rest.startswith("//"):
        host, _, path = rest[2:].partition("/")
        if host.lower() in ("", "localhost", "127.0.0.1"):
            rest = f"/{path}"
        elif re.match(r"[A-Za-z]:", host) or os.path.lexists(rest[2:]):  # file://C:/films, file://films/one.mp4
            rest = rest[2:]
        elif os.name != "nt":
            raise ValueError(f"{address}: this address names a file of another computer ({host}): give its path here")
    if os.name == "nt":
        rest = re.sub(r"^/+(?=[A-Za-z]:)", "", rest)
    bare = re.split("[?#]", rest, maxsplit=1)[0]
    candidates = [os.fsdecode(unquote_to_bytes(rest)), rest, os.fsdecode(unquote_to_bytes(bare))]
    return Path(next(filter(os.path.lexists, candidates), candidates[0]))
