"""Progress on standard error: a bar on a terminal, elsewhere a line now and then; nothing where `TQDM_DISABLE` is set.

The bar is tqdm's. What stands around it always fits the terminal's width: names are shortened, figures are not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, Protocol, TextIO, TypeVar

from tqdm import tqdm
from tqdm.utils import disp_len

LINE_SECONDS = 10.0
"""Between two lines where standard error is no terminal; what is done sooner gives none."""
_SHORTEST_BAR, _SHORTEST_LABEL = 5, 8


Item = TypeVar("Item")


class Tell(Protocol):
    """Told by whoever does the work how much is done, how much there is in all (None: as before, or unknown), and what
    else is worth a word."""

    def __call__(self, done: int, total: int | None = None, remark: str = "") -> None: ...


@contextmanager
def progress(label: str, unit: str = "frames", total: int | None = None, *, at_once: bool = True) -> Iterator[Tell]:
    """Show how far something is, until the block ends; gives what is to be called with what is done.

    Args:
        label: what is being done, with the name of the file; shortened in the middle where there is no room for it.
        unit: what is counted, in the plural.
        total: None where it is told later, or never.
        at_once: show the label before anything is done.
    """
    with _Bar(label, unit, total, at_once) as bar:
        yield bar.tell


def counted(
    items: Iterable[Item], label: str, unit: str, total: int | None = None, shown: bool = True
) -> Iterator[Item]:
    """Yield the items, with a bar of how many are through."""
    if not shown:
        yield from items
        return
    total = len(items) if total is None and isinstance(items, Sized) else total
    with progress(label, unit, total) as tell:
        for number, item in enumerate(items, 1):
            yield item
            tell(number)


def clock_text(seconds: float) -> str:
    """A duration as `0:05` or `1:02:03`."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def rate_text(rate: float) -> str:
    """So many a second, a minute or an hour, as `240/s`, `1.5/min`."""
    for unit, seconds in (("s", 1), ("min", 60), ("h", 3600)):
        if rate * seconds >= 1 or unit == "h":
            return f"{rate * seconds:.3g}/{unit}" if rate * seconds < 1000 else f"{rate * seconds:,.0f}/{unit}"
    raise AssertionError


def shortened(text: str, room: int) -> str:
    """A text that takes `room` columns at most (wide characters take two), its middle left out for that."""
    if disp_len(text) <= room:
        return text
    head, tail = "", ""
    while True:  # more of the end, which tells files of a series apart
        more = len(tail) <= len(head)
        longer = (head, text[-len(tail) - 1] + tail) if more else (head + text[len(head)], tail)
        if disp_len("".join(longer)) + 2 > room:
            return f"{head}..{tail}"[: max(room, 0)]
        head, tail = longer


class _Bar(tqdm):
    monitor_interval = 0  # no thread: whoever works tells

    def __init__(self, label: str, unit: str, total: int | None, at_once: bool):
        self._remark = ""
        self._lines = not sys.stderr.isatty()
        encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
        label = "".join(letter if letter.isprintable() else "?" for letter in label)
        super().__init__(
            desc=label.encode(encoding, "replace").decode(encoding),
            unit=unit,
            total=total,
            file=_Lines(sys.stderr) if self._lines else sys.stderr,
            position=0 if self._lines else None,
            leave=False,
            dynamic_ncols=True,
            mininterval=LINE_SECONDS if self._lines else 0.1,
            delay=LINE_SECONDS if self._lines else 0 if at_once else 1e-6,
            miniters=1,
            disable=bool(os.environ.get("TQDM_DISABLE")),
        )

    def tell(self, done: int, total: int | None = None, remark: str = "") -> None:
        if self.disable:
            return
        self._remark = remark
        self.total = total or self.total
        begun = self.n > self.initial
        if not begun and done and self.format_dict["elapsed"] < 0.01:  # of an earlier run: that was not so fast
            self.initial = self.n = self.last_print_n = done
        self.update(done - self.n)

    def __str__(self) -> str:
        facts: dict[str, Any] = self.format_dict
        done, total, initial = facts["n"], facts["total"], facts["initial"]
        rate = facts["rate"] or (done - initial) / max(facts["elapsed"], 1e-9)
        amount = f"{done:,}" if total is None else f"{done:,}/{total:,}"
        figures = [f"{amount} {self.unit}"]
        if rate > 0 and total is not None:
            figures.append(f"{clock_text((total - done) / rate)} left")
        if rate > 0:
            figures.append(rate_text(rate))
        if self._remark:
            figures.append(self._remark)
        label, percent = facts["prefix"].removesuffix(": "), "" if total is None else f"{100 * done / total:3.0f}%"
        if self._lines:
            return f"{label}: {f'{percent.strip()}, ' if percent else ''}{', '.join(figures)}"
        columns = (facts["ncols"] or 80) - 1  # in the last one, some terminals break the line
        if total is None and done == 0:
            return shortened(f"{label} ...", columns)
        bar, around = ("", 2) if total is None else (" |{bar}|", len(percent) + _SHORTEST_BAR + 5)
        while len(", ".join(figures)) + around + _SHORTEST_LABEL > columns and len(figures) > 1:
            figures[:] = [amount, *figures[1:]] if figures[0] != amount else figures[:-1]
        text = ", ".join(figures)
        room = columns - around - len(text)
        if disp_len(label) > room:
            label = shortened(label.removeprefix("reading "), max(room, 0))
        facts |= {"prefix": label, "ncols": columns}
        return self.format_meter(**facts | {"bar_format": f"{{desc}} {percent}{bar} {text}"})


class _Lines:
    """Where there is no terminal: every state of the bar is a line."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.encoding = getattr(stream, "encoding", "utf-8")

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            self._stream.write(text + "\n")

    def flush(self) -> None:
        self._stream.flush()
