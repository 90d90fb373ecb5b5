"""Reading one video with several processes: its segments are dealt out, and states pass from neighbour to neighbour.

A segment is what one process reads at a time as well (`config.read_chunk_frames` frames), and segment j belongs to
rank j mod W. Every rank decodes and encodes only frames of its own segments and takes each through the blocks of
layers, one after the other; a block starts from the state that the left neighbour's segment ended it with. So rank r
runs a block one step after rank r - 1, and ranks wait for each other only while this wave fills and drains. The
cells, their inputs and the order in which states pass through them are those of one process: so is the result.

Legend: W ranks, B batch, S tokens, D width, K blocks.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from .answering_familiarity import StrangeFrames, add_strange
from .mixer_mamba2 import run_blocks
from .parallel_dims import reading_blocks
from .parallel_sequence import Like, SequenceGroup
from .parallel_shards import is_unit
from .reading_prompt import WholeClips, among_texts, frames_of, take_texts
from .stack_protocols import TextStack, VideoModel
from .stack_weights import execution_device
from .state_layers import LayerState, flatten, layer_kinds, regroup
from .state_video import VideoState

BEFORE_ERRORS = "another process could not read its part of the video: "


class _Told(NamedTuple):
    """What every rank tells the others about its segment, before any of them is read."""

    frames: int
    seconds: float | None
    error: str | None
    texts: int = 0  # tokens between the frames
    strange: int | None = None


class ReadingGroup:
    """The ranks that read together: states go to the right neighbour (`SequenceGroup`), words (numbers, errors) over a
    group of CPUs, so that no GPU is waited for.

    Args:
        group: a process group of `torch.distributed`. device: where this rank's stack is.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        ranks = distributed.get_process_group_ranks(group)
        few = len(ranks) < distributed.get_world_size()  # then the others need not be asked
        down = distributed.new_group(ranks, use_local_synchronization=few)
        self.link = SequenceGroup(group, down, device)
        self.rank, self.world, self.first = self.link.rank, self.link.size, ranks[0]
        self._words = group
        if device.type != "cpu":
            self._words = distributed.new_group(ranks, backend="gloo", use_local_synchronization=few)

    def everyone(self, mine: Any) -> list[Any]:
        """`mine` of every rank, by rank."""
        found: list[Any] = [None] * self.world
        distributed.all_gather_object(found, mine, group=self._words)
        return found

    def of_first(self, value: Any) -> Any:
        """The first rank's `value`."""
        box = [value]
        distributed.broadcast_object_list(box, self.first, group=self._words)
        return box[0]

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Hand tensors to the right neighbour, without waiting."""
        self.link.send(tensors, _like(tensors), (self.rank + 1) % self.world)

    def receive(self, like: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Begin to take tensors of such shapes and types from the left neighbour; a call waits, and returns them."""
        return self.link.receive(_like(like), (self.rank - 1) % self.world).wait


def _like(tensors: Sequence[Tensor]) -> Like:
    return [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]


@lru_cache(maxsize=8)
def reading_group(group: Any, device: torch.device) -> ReadingGroup:
    """The `ReadingGroup` of a process group; all its ranks call this, in the same order as other collectives."""
    return ReadingGroup(group, device)


class SharedStack:
    """Reads segments with several ranks into the state that one would reach.

    Args:
        stack: a `Ma2mbaTextModel`, the same on every rank.
        link: the ranks.
        start: the state before the first token, which stays as it is; looked at on the first rank.

    Raises:
        ValueError: the layers are FSDP units, which all ranks would have to gather at the same time.
    """

    def __init__(self, stack: TextStack, link: ReadingGroup, start: VideoState) -> None:
        if is_unit(stack.layers[0]):
            raise ValueError("a video cannot be shared out among processes while layers are FSDP units: unshard them")
        self.stack, self.link, self.kinds = stack, link, layer_kinds(stack.config)
        self.blocks = reading_blocks(len(stack.layers), link.world)
        self.start, self.begun, self.tokens = start.layers, False, start.seen_tokens

    def states_so_far(self) -> VideoState:
        """On the first rank the state that the rounds so far have reached; to be called once between two rounds."""
        if self.begun:
            arriving = [self.link.receive(flatten(self._like(block))) for block in self.blocks]
            tensors = [tensor for wait in arriving for tensor in wait()]
            self.start, self.begun = regroup(self.kinds, tensors), False
        return VideoState(self.start, self.tokens)

    def drop(self) -> None:
        """Take what is under way to the first rank, and wait for what was sent: nothing is left behind."""
        if self.link.rank == 0:
            self.states_so_far()
        self.link.link.finish()

    def round(self, pieces: Sequence[Tensor], tokens: int) -> None:
        """Read one segment on every rank, that of rank 0 first.

        Args:
            pieces: this rank's segment, rows (B, S, D) that follow one another; each is a pass of its own, as in one
                process. None: the state passes through. tokens: those of all ranks' segments.
        """
        stack, link = self.stack, self.link
        first = link.rank == 0 and not self.begun
        device, most = execution_device(stack.norm_f), stack.longest_pass(self.start[0][0].shape[0])
        streams: list[tuple[Tensor, Tensor | None]] = [
            (part.to(device, stack.stream_dtype), None) for piece in pieces for part in piece.split(most, dim=1)
        ]
        arriving = None if first else link.receive(flatten(self._like(self.blocks[0])))
        for number, block in enumerate(self.blocks):
            states: Sequence[LayerState] = [self.start[i] for i in block]
            if arriving is not None:
                following = None
                if number + 1 < len(self.blocks):  # ahead of the computation, which it does not wait for
                    following = link.receive(flatten(self._like(self.blocks[number + 1])))
                states = regroup((self.kinds[i] for i in block), arriving())
                arriving = following
            layers = [stack.layers[i] for i in block]
            for place, (x, delta) in enumerate(streams):
                x, delta, states = run_blocks(layers, x, states, delta=delta, reading=True)
                streams[place] = x, delta
            link.send(flatten(states))
        self.begun = True
        self.tokens += tokens

    def end(self) -> VideoState:
        """The state after the last round, on every rank."""
        reached = self.states_so_far() if self.link.rank == 0 else VideoState(self.start, self.tokens)
        found = reached.fork()
        self.link.link.finish()
        for tensor in chain(*(found.stacked(kind) for kind in dict.fromkeys(self.kinds))):
            distributed.broadcast(tensor, self.link.first, group=self.link.link.group)
        return found

    def _like(self, block: range) -> list[LayerState]:
        return [self.start[i] for i in block]


@torch.no_grad()
def read_shared(
    model: VideoModel,
    prefix: Tensor,
    chunks: Iterable[Any],
    group: Any,
    state: VideoState | None = None,
    on_frames: Callable[[int], None] | None = None,
    on_state: Callable[[VideoState, int], None] | None = None,
    state_seconds: float = 30.0,
) -> VideoState:
    """Read one video with all ranks of a process group; the state is that of `read_prompt`, on every rank.

    Args:
        model: a `VideoMa2mbaModel`, the same on every rank.
        prefix: (1, S) token ids that end in the video's one token.
        chunks: this rank's frames, `config.read_chunk_frames` at a time: chunks r, r + W, r + 2 W, … of the video (see
            `frames_of`), where W ranks take part and this is number r. Fewer chunks than ranks are fine.
        group: a process group of `torch.distributed`.
        state: continue from here; left unchanged. Of several rows, each reads on from where it is.
        on_frames: called on every rank after each round with the number of frames that all have read.
        on_state: called on the first rank every `state_seconds` with the state reached and its frames.

    Raises:
        ValueError: on all ranks: one cannot decode its frames, there are no frames, or the prefix holds no video.
    """
    if (prefix == model.config.video_token_id).sum() != 1 or prefix[0, -1] != model.config.video_token_id:
        raise ValueError("sharing a video out takes a prompt that ends in a video and holds no other")
    language_model = model.language_model
    device, dtype = execution_device(language_model.norm_f), language_model.norm_f.weight.dtype
    if state is None:
        state = VideoState.zeros(language_model.config, 1, device, dtype)
    else:
        state = state.fork().to(device, dtype)
    rows, metadata = state.batch_size, state.metadata
    frames_before, seconds_before = int(metadata.get("frames", 0)), float(metadata.get("seconds", 0))
    link = reading_group(group, device)
    stack = SharedStack(language_model, link, state)
    text = prefix[:, :-1].to(execution_device(language_model.embeddings))
    saved, frames = time.monotonic(), 0
    own = iter(chunks)
    while True:
        pieces, told, error = _segment(model, own)
        everyone: list[_Told] = link.everyone(told)
        if failed := [other.error for other in everyone if other.error is not None]:
            stack.drop()
            if error is not None:
                raise error
            raise ValueError(f"{BEFORE_ERRORS}{failed[0]}")
        new = sum(other.frames for other in everyone)
        if new == 0:
            break
        if link.rank == 0 and text.shape[1]:
            pieces.insert(0, language_model.embeddings(text))
        tokens = new * model.config.tokens_per_frame + text.shape[1] + sum(other.texts for other in everyone)
        text = text[:, :0]
        if link.rank == 0 and on_state is not None and frames and time.monotonic() - saved >= state_seconds:
            reached = stack.states_so_far().fork()
            reached.metadata = dict(metadata)
            on_state(reached, frames)
            saved = time.monotonic()
        stack.round([piece.expand(rows, *piece.shape[1:]) for piece in pieces], tokens)
        frames += new
        for other in everyone:
            if other.seconds is not None:
                metadata["seconds"] = str(seconds_before + other.seconds)
                metadata["frame_time"] = str(other.seconds)
        metadata["frames"] = str(frames_before + frames)
        if model.familiarity is not None and all(other.strange is not None for other in everyone if other.frames):
            add_strange(metadata, sum(other.strange or 0 for other in everyone), frames_before)
        if on_frames is not None:
            on_frames(frames)
    if frames == 0:
        raise ValueError("the video has no frames")
    found = stack.end()
    found.metadata = metadata
    return found


def _segment(model: VideoModel, chunks: Iterator[Any]) -> tuple[list[Tensor], _Told, Exception | None]:
    """The next of this rank's segments as rows (1, S, D) for the stack, what to tell of it, and what went wrong."""
    try:
        chunk = next(chunks, None)
        if chunk is None:
            return [], _Told(0, None, None), None
        clips = WholeClips(model.config.clip_frames, model.config.read_chunk_frames)
        pixels = [*clips.add(frames_of(chunk)), *clips.rest()]
        texts, done, pieces = deque(getattr(chunk, "texts", ())), 0, []
        told, strange = sum(len(ids) for _, ids in texts), StrangeFrames(model.familiarity)
        for piece in pixels:
            rows = model.get_video_features(piece, on_features=strange)
            pieces.append(among_texts(model, rows, take_texts(texts, done, len(piece))).unsqueeze(0))
            done += len(piece)
        if texts:  # behind the video's last frame
            embeddings = model.language_model.embeddings
            ending = torch.tensor([token for _, ids in texts for token in ids])
            pieces.append(embeddings(ending.to(execution_device(embeddings))).unsqueeze(0))
    except Exception as error:  # the others must hear of it instead of waiting
        return [], _Told(0, None, str(error) or type(error).__name__), error
    times = getattr(chunk, "timestamps", None)
    seconds = float(times[-1]) if times is not None and len(times) else None
    return pieces, _Told(sum(map(len, pixels)), seconds, None, told, strange.count()), None
