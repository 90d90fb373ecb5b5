"""Small pieces of HTML. Whatever comes from a visitor or a file is escaped."""

from __future__ import annotations

import html
import textwrap
from typing import Any


def progress(seen: int, expected: int | None) -> str:
    """A bar over the frames read; without a known number, one that only shows movement."""
    known = f' value="{min(seen, expected)}" max="{expected}"' if expected else ""
    of = f" of {expected:,}" if expected else ""
    return f'<progress aria-label="frames read"{known}></progress><p>{seen:,}{of} frames read</p>'


def note(text: str) -> str:
    """Something to know, read out by screen readers when they are free."""
    return f'<p role="status">{html.escape(text)}</p>' if text else ""


def problem(error: BaseException) -> str:
    """What went wrong, as one sentence, read out at once."""
    said = textwrap.shorten(str(error), 400, placeholder=" …") or type(error).__name__
    return f'<p role="alert" class="problem">{html.escape(said[:1].upper() + said[1:])}</p>'


def what_was_read(session: Any) -> str:
    """What a `Session` has in mind."""
    seen = session.state.metadata
    took = f" in {session.seconds:.1f} s" if session.video else ""
    of = f" of {float(seen['seconds']):g} s of video" if "seconds" in seen else ""
    return f"{int(seen.get('frames', 0)):,} frames{of} read{took}; kept in {size(session.state.nbytes)}. Now ask."


def size(nbytes: int) -> str:
    """Bytes for people."""
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.1f} kB"
