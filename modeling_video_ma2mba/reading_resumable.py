"""Reading a long video so that an interruption costs seconds: the unfinished state is kept in a file beside it."""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from .reading_shared import read_shared, reading_group
from .stack_protocols import Reader
from .stack_weights import execution_device
from .state_video import VideoState

UNFINISHED = "unfinished"
"""In a state's metadata where a reading was stopped: how many frames of its video were read."""


def read_resumably(
    model: Any,
    prefix: Tensor,
    reader: Reader,
    state: VideoState | None,
    *,
    partial: str | os.PathLike[str],
    request: Mapping[str, Any],
    save_seconds: float,
    on_frames: Callable[[int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> VideoState:
    """Read one video, saving the state reached to `partial` every `save_seconds`, and beginning there if it exists.

    The result has the same bits however often the reading was interrupted: it is cut between chunks of
    `config.read_chunk_frames` frames, where an uninterrupted reading hands over a state as well.

    Args:
        model: a `VideoMa2mbaForConditionalGeneration`.
        prefix: (1, S) token ids that end in the video's one token.
        reader: a `FrameReader`.
        state: continue this one; None begins.
        partial: file of the unfinished state, written whole or not at all. Left for the caller to remove once the
            result is safe.
        request: names and values that a reading must share to be continued; JSON.
        on_frames: called with the number of frames read, those before the interruption included.
        stop: asked between chunks; true ends the reading there, and `partial` holds what goes on.

    Returns:
        The state; where `stop` ended the reading, with "unfinished" among its metadata.

    Raises:
        ValueError: the video has no frames, or `partial` is damaged or belongs to another reading; names what differs.
    """
    size = model.config.read_chunk_frames
    at_once = [size, model.config.vision_chunk_frames]
    request = {**request, "number of frames at once": at_once, "state to continue": _mark(state)}
    done = 0
    if os.path.exists(partial):
        state = VideoState.load(partial)
        done = _frames_done(state, json.loads(json.dumps(request)), partial)
        if "frame_time" in state.metadata:
            reader.after = float(state.metadata["frame_time"])
        prefix = prefix[:, -1:]
    elsewhere = (0 if state is None else int(state.metadata.get("frames", 0))) - done

    chunks = reader.chunks(size, skip=done)
    following = next(chunks, None)
    while following is not None:
        report = None if on_frames is None else lambda read, before=done: on_frames(before + read)
        unread: list[Any] = []
        go = _until(time.monotonic() + save_seconds, following, chunks, unread, stop)
        state = model.read(prefix, [go], state, report)
        state.metadata.pop(UNFINISHED, None)
        prefix = prefix[:, -1:]
        done = int(state.metadata["frames"]) - elsewhere
        (following,) = unread
        if following is not None:
            unfinished = state.fork()
            unfinished.metadata |= {"reading": json.dumps(request), "reading_frames": str(done)}
            unfinished.save(partial)
            if stop is not None and stop():
                state.metadata[UNFINISHED] = str(done)
                break
    if state is None:
        raise ValueError(f"{reader.name}: not one frame could be read")
    return state


def read_shared_resumably(
    model: Any,
    prefix: Tensor,
    reader: Reader,
    state: VideoState | None,
    group: Any,
    *,
    partial: str | os.PathLike[str] | None,
    request: Mapping[str, Any],
    save_seconds: float,
    on_frames: Callable[[int], None] | None = None,
) -> VideoState:
    """`read_resumably` by all ranks of a process group together (`read_shared`), `partial` being the first rank's.

    What one process began, several may finish, and the other way round. `partial=None` saves nothing on the way.

    Raises:
        ValueError: on every rank, as in `read_resumably`.
    """
    stack = model.model.language_model
    link = reading_group(group, execution_device(stack.norm_f))
    size = model.config.read_chunk_frames
    at_once = [size, model.config.vision_chunk_frames]
    request = {**request, "number of frames at once": at_once, "state to continue": _mark(state)}
    done, error = 0, None
    if link.rank == 0 and partial is not None and os.path.exists(partial):
        try:
            state = VideoState.load(partial)
            done = _frames_done(state, json.loads(json.dumps(request)), partial)
        except (OSError, ValueError) as found:
            error = found
    facts = None if state is None else (state.seen_tokens, state.metadata)
    done, failed, facts = link.of_first((done, error and str(error), facts))
    if failed is not None:
        raise error or ValueError(failed)
    if done:
        prefix = prefix[:, -1:]
    if link.rank and facts is not None:  # the tensors are looked at on the first rank alone
        rows = 1 if state is None else state.batch_size
        state = VideoState.zeros(stack.config, rows, stack.norm_f.weight.device, stack.norm_f.weight.dtype)
        state.seen_tokens, state.metadata = facts

    def keep(reached: VideoState, frames: int) -> None:
        reached.metadata |= {"reading": json.dumps(request), "reading_frames": str(done + frames)}
        reached.save(partial or "")

    report = None if on_frames is None else lambda read: on_frames(done + read)
    chunks = reader.chunks(size, skip=done, turn=(link.rank, link.world))
    kept = None if partial is None else keep
    return read_shared(model.model, prefix, chunks, group, state, report, kept, save_seconds)


def _until(
    deadline: float, chunk: Any, chunks: Iterator[Any], unread: list[Any], stop: Callable[[], bool] | None
) -> Iterator[Any]:
    """Yield chunks until the deadline or `stop`, but at least `chunk`; leave the next one (None: end) in `unread`."""
    while chunk is not None:
        yield chunk
        chunk = next(chunks, None)
        if time.monotonic() >= deadline or (stop is not None and stop()):
            break
    unread.append(chunk)


def _frames_done(state: VideoState, request: Mapping[str, Any], partial: str | os.PathLike[str]) -> int:
    """Take the record of the unfinished reading out of the state's metadata, if it is the reading of `request`."""
    try:
        there, done = dict(json.loads(state.metadata.pop("reading"))), int(state.metadata.pop("reading_frames"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{os.fspath(partial)!r} is not an unfinished reading: name another file") from error
    differing = [name for name in {**request, **there} if there.get(name) != request.get(name)]
    if differing:
        raise ValueError(
            f"{os.fspath(partial)!r} holds an unfinished reading with another {' and another '.join(differing)}: "
            "finish that one, or delete the file to begin again"
        )
    return done


def _mark(state: VideoState | None) -> str:
    """Tells states apart by what they hold."""
    if state is None:
        return ""
    return f"{state.seen_tokens}:{state.fingerprint():08x}"
