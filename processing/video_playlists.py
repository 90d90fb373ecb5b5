"""Videos on the web that come in pieces (HLS): the best variant of a finished one, every piece fetched once.

FFmpeg alone would fetch all variants, and all of it again for the second pass over the packets.
"""

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeGuard
from urllib.parse import urljoin, urlsplit

from .video_decoding import fetched

_LARGEST_PLAYLIST = 2**25
_URI = re.compile(r'URI="([^"]*)"')


def is_playlist(address: Any) -> TypeGuard[str]:
    """Whether this is the address of an HLS playlist, by its name."""
    return isinstance(address, str) and urlsplit(address).path.lower().endswith((".m3u8", ".m3u"))


class LocalCopy:
    """The best variant of a finished HLS video, copied to a temporary folder that lives as long as this object.

    Attributes:
        path: of the copy's playlist; None where there is none, as of a live stream, and the address itself must do.
        problems: pieces that could not be fetched.
    """

    def __init__(self, address: str):
        self.path: Path | None = None
        self.problems: list[str] = []
        self._folder = TemporaryDirectory(prefix="video-pieces-")
        try:
            lines, address = _best_variant(address)
        except (OSError, ValueError):  # FFmpeg tries again, and says what is wrong
            return
        if not any(line.startswith("#EXT-X-ENDLIST") for line in lines):
            return
        pieces = _Pieces(address, Path(self._folder.name))
        copied = [pieces.copied_line(line) for line in lines]
        if pieces.missing:
            self.problems.append(f"{pieces.missing} of {len(pieces.names)} pieces could not be fetched")
        if pieces.missing < len(pieces.names):
            self.path = Path(self._folder.name) / "copy.m3u8"
            self.path.write_text("\n".join(copied) + "\n", encoding="utf-8")


class _Pieces:
    """Fetches what a playlist names, each address once."""

    def __init__(self, playlist: str, folder: Path):
        self.names: dict[str, str] = {}
        self.missing = 0
        self._playlist, self._folder = playlist, folder

    def copied_line(self, line: str) -> str:
        """A line of the playlist with local names instead of addresses."""
        if line.startswith("#"):
            return _URI.sub(lambda match: f'URI="{self._name(match[1])}"', line)
        return self._name(line) if line else line

    def _name(self, reference: str) -> str:
        address = urljoin(self._playlist, reference)
        if urlsplit(address).scheme not in ("http", "https"):
            # A key in the playlist itself stays; a playlist from the web names no file of this machine.
            return reference if address.startswith("data:") else "refused"
        if address not in self.names:
            suffix = Path(urlsplit(address).path).suffix
            suffix = suffix if re.fullmatch(r"\.\w{1,5}", suffix) else ".ts"
            name = self.names[address] = f"piece{len(self.names)}{suffix}"
            try:
                with (self._folder / name).open("wb") as file:
                    for block in fetched(address):
                        file.write(block)
            except OSError:
                self.missing += 1
                (self._folder / name).unlink(missing_ok=True)
        return self.names[address]


def _best_variant(address: str) -> tuple[list[str], str]:
    """Lines of a playlist and its address; of one that lists variants, those of the variant with most pictures' bits.

    Raises:
        OSError: it cannot be fetched. ValueError: it is no playlist.
    """
    for _ in range(2):
        text = b""
        for block in fetched(address):
            text += block
            if len(text) > _LARGEST_PLAYLIST:
                raise ValueError("too large for a playlist")
        lines = [line.strip() for line in text.decode("utf-8-sig", "replace").splitlines()]
        if not lines or not lines[0].startswith("#EXTM3U"):
            raise ValueError("not a playlist")
        variants = [
            (_pixels(line), _number(r"[:,]BANDWIDTH=(\d+)", line), -place, following)
            for place, line in enumerate(lines)
            if line.startswith("#EXT-X-STREAM-INF")
            and (following := next((other for other in lines[place + 1 :] if other and other[0] != "#"), None))
        ]
        if not variants:
            return lines, address
        address = urljoin(address, max(variants)[-1])
        if urlsplit(address).scheme not in ("http", "https"):
            raise ValueError("a variant outside of the web")
    raise ValueError("variants of variants")


def _number(pattern: str, line: str) -> int:
    found = re.search(pattern, line)
    return int(found[1]) if found else 0


def _pixels(line: str) -> int:
    return _number(r"RESOLUTION=(\d+)x", line) * _number(r"RESOLUTION=\d+x(\d+)", line)
