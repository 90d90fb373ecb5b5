"""Reading a prompt with videos as a stream: frames pass through the model chunk by chunk and only the state stays."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .answering_familiarity import StrangeFrames
from .stack_protocols import VideoModel
from .stack_weights import execution_device
from .state_video import VideoState


def frames_of(chunk: Any) -> Tensor:
    """Pixels of a frame chunk as `(n, 3, h, w)`.

    A chunk is an object with `pixels` and `timestamps` (what the video reader yields), and maybe `texts`, or the
    pixels themselves: an array or tensor `(n, h, w, 3)` or `(n, 3, h, w)`; uint8 is raw RGB, floating point already
    normalised.
    """
    pixels = torch.as_tensor(getattr(chunk, "pixels", chunk))
    if pixels.ndim == 4 and pixels.shape[1] != 3 and pixels.shape[-1] == 3:
        pixels = pixels.permute(0, 3, 1, 2)
    return pixels


@torch.no_grad()
def read_prompt(
    model: VideoModel,
    input_ids: Tensor,
    videos: Iterable[Iterable[Any]] = (),
    state: VideoState | None = None,
    on_frames: Callable[[int], None] | None = None,
) -> VideoState:
    """Read text and videos in the order of the prompt, starting from `state` or from nothing.

    Peak memory is that of one chunk of frames: it does not depend on how many there are, and no chunk is asked for
    before the previous one has been read.

    Args:
        model: a `VideoMa2mbaModel`.
        input_ids: (1, S) with ONE `config.video_token_id` for each video.
        videos: for each of these tokens an iterable of frame chunks (see `frames_of`), of any number and size. Chunks
            with `texts`, a list of (place, token ids), are read with these in front of the frames of those numbers.
        state: continue from here; it is left unchanged. Of several rows, each reads on from where it is.
        on_frames: called after each chunk with the number of frames read so far by this call.

    Returns:
        A new state whose metadata count "frames" and "seconds" (the last frame's time, added up over videos, where the
        chunks carry timestamps), the given state's included, and tell the last frame's own "frame_time".

    Raises:
        ValueError: more than one row, as many videos as placeholders are not given, or a video without frames.
    """
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        raise ValueError(f"reading takes one prompt, input_ids of the shape (1, tokens), not {tuple(input_ids.shape)}")
    videos = list(videos)
    places = (input_ids[0] == model.config.video_token_id).nonzero()[:, 0].tolist()
    if len(places) != len(videos):
        raise ValueError(f"the prompt holds {len(places)} video placeholders, but {len(videos)} videos were given")

    language_model = model.language_model
    device = execution_device(language_model.embeddings)
    state_device, dtype = execution_device(language_model.norm_f), language_model.norm_f.weight.dtype
    if state is None:
        state = VideoState.zeros(language_model.config, 1, state_device, dtype)
    else:
        state = state.fork().to(state_device, dtype)
    frames_before = int(state.metadata.get("frames", 0))
    seconds_before = float(state.metadata.get("seconds", 0))
    frames_read, strange = 0, StrangeFrames(model.familiarity)

    def advance(name: str, tokens: Tensor) -> None:
        tokens = tokens.expand(state.batch_size, *tokens.shape[1:])
        # Nobody wants hidden states here, but one row keeps every kernel's input non-empty. The mask is on the host:
        # looking at it there does not make the next frames wait until the GPU has read these.
        last = torch.zeros(tokens.shape[:2], dtype=torch.bool)
        last[:, -1] = True
        language_model(**{name: tokens}, past_key_values=state, use_cache=True, output_positions=last)

    start = 0
    for place, video in zip(places, videos, strict=True):
        if place > start:
            advance("input_ids", input_ids[:, start:place].to(device))
        start = place + 1
        read_before, told = frames_read, False
        clips = WholeClips(model.config.clip_frames, model.config.read_chunk_frames)
        texts: deque[tuple[int, list[int]]] = deque()  # with numbers of the video's frames
        arrived = done = 0
        for chunk in itertools.chain(video, [None]):  # None: the video has ended
            pixels = None if chunk is None else frames_of(chunk)
            told |= bool(getattr(chunk, "texts", ()))
            texts.extend((arrived + place, ids) for place, ids in getattr(chunk, "texts", ()))
            arrived += 0 if pixels is None else len(pixels)
            for piece in clips.rest() if pixels is None else clips.add(pixels):
                rows = model.get_video_features(piece, on_features=strange)
                advance("inputs_embeds", among_texts(model, rows, take_texts(texts, done, len(piece))).unsqueeze(0))
                frames_read, done = frames_read + len(piece), done + len(piece)
            if chunk is None and texts:
                ending = [token for _, ids in texts for token in ids]
                advance("input_ids", torch.tensor([ending], device=device))
            timestamps = getattr(chunk, "timestamps", None)
            if timestamps is not None and len(timestamps):
                state.metadata["seconds"] = str(seconds_before + float(timestamps[-1]))
                state.metadata["frame_time"] = str(float(timestamps[-1]))
            state.metadata["frames"] = str(frames_before + frames_read)
            if on_frames is not None and chunk is not None:
                on_frames(frames_read)
        if frames_read == read_before and not told:
            raise ValueError(f"video {places.index(place)} of the prompt has no frames")
        seconds_before = float(state.metadata.get("seconds", 0))
    if start < input_ids.shape[1]:
        advance("input_ids", input_ids[:, start:].to(device))
    state.metadata.setdefault("frames", str(frames_before + frames_read))
    strange.add_to(state.metadata, frames_before)
    return state


def take_texts(texts: deque[tuple[int, list[int]]], first: int, count: int) -> list[tuple[int, list[int]]]:
    """Take out of `texts` what stands in front of `count` frames from number `first` on; places from that number."""
    taken = []
    while texts and texts[0][0] < first + count:
        place, ids = texts.popleft()
        taken.append((place - first, ids))
    return taken


def among_texts(model: VideoModel, rows: Tensor, texts: Sequence[tuple[int, list[int]]]) -> Tensor:
    """Rows of frames (n * T, D) with the embeddings of texts in front of the frames of their places, (N, D)."""
    if not texts:
        return rows
    size, start, parts = model.config.tokens_per_frame, 0, []
    embeddings = model.language_model.embeddings
    for place, ids in texts:
        words = torch.tensor(ids, device=execution_device(embeddings))
        parts += [rows[start * size : place * size], embeddings(words).to(rows)]
        start = place
    return torch.cat([*parts, rows[start * size :]])


class WholeClips:
    """Frames that arrive in any number, cut where a tower's clips end; at the end of the video a clip may be shorter.

    Args:
        clip: frames of a clip. most: frames of a piece, a multiple of `clip`.
    """

    def __init__(self, clip: int, most: int) -> None:
        self.clip, self.most = clip, most
        self._waiting: Tensor | None = None

    def add(self, pixels: Tensor) -> Iterator[Tensor]:
        """The pieces that `pixels` (n, 3, h, w) completes, of at most `most` frames."""
        if self._waiting is not None and len(self._waiting):
            pixels = torch.cat([self._waiting.to(pixels), pixels])
        whole = len(pixels) // self.clip * self.clip
        self._waiting = pixels[whole:]
        return (piece for piece in pixels[:whole].split(self.most) if len(piece))

    def rest(self) -> list[Tensor]:
        """What is left when the video has ended: a short clip, or nothing."""
        waiting, self._waiting = self._waiting, None
        return [] if waiting is None or not len(waiting) else [waiting]
