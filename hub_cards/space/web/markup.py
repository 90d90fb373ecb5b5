"""Small pieces of HTML. Whatever comes from a visitor or a file is escaped."""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Sequence
from typing import Any


def progress(seen: int, expected: int | None) -> str:
    """A bar over the frames read; without a known number, one that only shows movement."""
    known = f' value="{min(seen, expected)}" max="{expected}"' if expected else ""
    of = f" of {expected:,}" if expected else ""
    return f'<progress aria-label="frames read"{known}></progress><p>{seen:,}{of} frames read</p>'


def note(text: str) -> str:
    """Something to know, read out by screen readers when they are free."""
    return f'<p role="status">{html.escape(text)}</p>' if text else ""


def warning(text: str) -> str:
    """A sentence that speaks against what is shown beside it; nothing for no text."""
    return f'<p role="status" class="warning">{html.escape(text[:1].upper() + text[1:])}.</p>' if text else ""


def problem(error: BaseException) -> str:
    """What went wrong, as one sentence, read out at once."""
    said = textwrap.shorten(str(error), 400, placeholder=" …") or type(error).__name__
    return f'<p role="alert" class="problem">{html.escape(said[:1].upper() + said[1:])}</p>'


def what_was_read(session: Any) -> str:
    """What a `Session` has in mind."""
    seen = session.state.metadata
    took = f" in {session.seconds:.1f} s" if session.video else ""
    of = f" of {float(seen['seconds']):g} s of video" if "seconds" in seen else ""
    now = "Stopped: ask about these, or go on." if session.unfinished else "Now ask."
    return f"{int(seen.get('frames', 0)):,} frames{of} read{took}; kept in {size(session.state.nbytes)}. {now}"


def filmstrip(frames: Sequence[Any], question: str, answer: str) -> str:
    """Pictures in the order of the video, each over a bar for its part of it; a click on one shows its second in the
    page's video.

    Args:
        frames: with `second`, `value` and `picture` (a PIL image) each.
    """
    largest = max((abs(frame.value) for frame in frames), default=0.0) or 1.0
    best = max(frames, key=lambda frame: frame.value)
    items = []
    for frame in frames:
        raw = io.BytesIO()
        frame.picture.convert("RGB").save(raw, "JPEG", quality=80)
        source = base64.b64encode(raw.getvalue()).decode()
        kind = ' class="best"' if frame is best and frame.value > 0 else ""
        side, share = ("for" if frame.value >= 0 else "against"), round(100 * abs(frame.value) / largest)
        items.append(
            f'<li{kind}><button type="button" onclick="{_SEEK.format(second=frame.second)}" '
            f'title="Show second {frame.second:.0f} in the video"><img src="data:image/jpeg;base64,{source}" '
            f'alt="Second {frame.second:.0f}: {share} % of the strongest, {side} the answer">'
            f'<span class="bar {side}" style="width: {share}%"></span>{frame.second:.0f} s</button></li>'
        )
    return (
        f'<figure class="filmstrip"><figcaption>What speaks for “{html.escape(answer)}” as the answer to '
        f"“{html.escape(question)}” (integrated gradients of its log-probability; grey: against it)</figcaption>"
        f"<ol>{''.join(items)}</ol></figure>"
    )


_SEEK = (
    "const film = document.querySelector('video');"
    "if (film) {{ film.pause(); film.currentTime = {second:.3f}; film.scrollIntoView({{block: 'nearest'}}); }}"
)


def span(seconds: tuple[float, float] | None) -> str:
    """A button that shows in the page's video what an answer rests on; a sentence where the answer named no times."""
    if seconds is None:
        return note("The answer names no times.")
    start, end = seconds
    return (
        f'<p role="status" class="span">Shown from {clock(start)} to {clock(end)}. <button type="button" '
        f'onclick="{_SEEK.format(second=start)}">Show in the video</button></p>'
    )


def clock(seconds: float) -> str:
    """`0:07`, `1:02:03`; with tenths where there are any."""
    whole, tenth = divmod(round(seconds * 10), 10)
    hours, rest = divmod(whole, 3600)
    text = f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
    return f"{text}.{tenth}" if tenth else text


def size(nbytes: int) -> str:
    """Bytes for people."""
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.1f} kB"
