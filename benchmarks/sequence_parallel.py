"""One video over several GPUs: training and reading by ranks that share its segments, beside one GPU alone.

    python benchmarks/sequence_parallel.py --gpus 4                    # all cases, the worthiest first
    python benchmarks/sequence_parallel.py --gpus 2 --max-seconds 240 --only 'train 2.7b*' 'read*'
    python benchmarks/sequence_parallel.py --smoke                     # tiny, on two processes of the CPU
    torchrun --nproc_per_node 8 benchmarks/sequence_parallel.py        # where something else starts the processes

Random weights, bf16, batch 1. `x1` is one GPU of this machine running alone in the same call; where fewer GPUs take
part than there are, several groups run side by side and the slowest counts. Kinds of cases (`--list` prints all):
`train`: forward and backward of a language model as in `ma_gc.py`, gradients summed over the ranks; `error`: the same,
and how far its gradients are from those in fp32; `film`: a whole model, its tower trained, on random frames; `read`:
token ids into a state, in pieces of one segment; `ddp`, `fsdp2`: every rank a sample of its own. A time is the median
of the timed steps, each the slowest rank's (CUDA events), after warm-up steps; long steps are timed once, after their
host memory was page-locked. `waiting_ms`: of the mean rank, its compute stream for a neighbour's state.
`messages_ms`: what the messages of a rank take over the measured link.
`efficiency`: tokens a second and GPU, against the x1 case of this model that is nearest in tokens a GPU.
"""

import argparse
import copy
import datetime
import faulthandler
import fnmatch
import gc
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from ma_gc import LABELS
from random_models import SIZES, round_weights_, text_model, video_model
from result_tables import append_rows, hardware
from torch import Tensor, distributed, nn

from video_ma2mba.modeling_video_ma2mba import parallel_sequence
from video_ma2mba.modeling_video_ma2mba.configuration_video_ma2mba import Ma2mbaTextConfig
from video_ma2mba.modeling_video_ma2mba.cost_memory import StackShape, Workload
from video_ma2mba.modeling_video_ma2mba.cost_step import layer_parameter_count
from video_ma2mba.modeling_video_ma2mba.cost_time import stack_seconds, vision_seconds
from video_ma2mba.modeling_video_ma2mba.cost_vision import VisionLoad
from video_ma2mba.modeling_video_ma2mba.ops_registry import force_backend
from video_ma2mba.modeling_video_ma2mba.parallel_cut import SequenceCut
from video_ma2mba.modeling_video_ma2mba.parallel_gradients import add_up, gradient_dtype, keep_wide
from video_ma2mba.modeling_video_ma2mba.parallel_sequence import SequenceGroup
from video_ma2mba.modeling_video_ma2mba.reading_shared import SharedStack, reading_group
from video_ma2mba.modeling_video_ma2mba.recompute_plan import RecomputePlan
from video_ma2mba.modeling_video_ma2mba.recompute_schedule import SCHEDULES
from video_ma2mba.modeling_video_ma2mba.stack_language_model import Ma2mbaTextModel
from video_ma2mba.modeling_video_ma2mba.state_video import VideoState

RESULTS = Path(__file__).parent / "results"
FIELDS = ["hardware", "date", "case", "gpus", "tokens", "seconds", "tokens_per_s", "efficiency", "peak_gb", "host_gb",
          "waiting_ms", "messages_ms", "all_reduce_ms", "loss", "grad_norm", "loss_error", "grad_norm_error",
          "grad_error", "predicted_s", "plan", "steps", "kernels"]  # fmt: skip
NOISE = 16384  # tokens that one seed draws


@dataclass(frozen=True)
class Case:
    """One measurement: `train 2.7b 2^17 x2 l4,s16384,host round_robin 1+3` and the like.

    Attributes:
        tokens: of the whole sample; of frames for `film`. gpus: that share it.
        plan: layers and tokens of a cell, where kept activations go, and for `film` the frames that its tower is
            trained on at a time. steps: warm-up and timed ones.
    """

    kind: str
    size: str
    tokens: int
    gpus: int
    plan: str = "l4,s16384,host"
    schedule: str = "round_robin"
    steps: tuple[int, int] = (1, 3)

    @classmethod
    def of(cls, text: str) -> "Case":
        kind, size, tokens, gpus, plan, schedule, steps = text.split()
        base, _, power = tokens.partition("^")
        warm, timed = steps.split("+")
        return cls(kind, size, int(base) ** int(power or 1), int(gpus[1:]), plan, schedule, (int(warm), int(timed)))

    def __str__(self) -> str:
        count = self.tokens
        tokens = f"2^{count.bit_length() - 1}" if count & (count - 1) == 0 else str(count)
        steps = f"{self.steps[0]}+{self.steps[1]}"
        return f"{self.kind} {self.size} {tokens} x{self.gpus} {self.plan} {self.schedule} {steps}"

    @property
    def cells(self) -> RecomputePlan:
        layers, segment, place, _ = self._parts()
        return RecomputePlan(int(layers), int(segment), place == "host")

    @property
    def frames_together(self) -> int:
        """Frames that the tower of `film` is trained on at a time."""
        return int(self._parts()[3] or 8)

    def _parts(self) -> tuple[str, ...]:
        return re.fullmatch(r"l(\d+),s(\d+),(host|gpu)(?:,t(\d+))?", self.plan).groups()

    def shortened(self) -> "Case":
        """The same with little work."""
        tokens = 16 * self.gpus if self.kind == "film" else self.gpus * self.cells.segment_length
        return replace(self, tokens=min(self.tokens, tokens))

    def expected_seconds(self) -> float:
        """Roughly, for the decision whether it is begun: 2.7B trains 18k and reads 80k tokens a second and GPU."""
        speed = {"2.7b": 1.0, "1.3b": 2.0, "370m": 4.0}.get(self.size, 1000.0)
        rate = {"read": 80e3, "film": 130.0 / 4, "error": 1e3}.get(self.kind, 17e3) * speed
        share = 1 if self.kind in ("ddp", "fsdp2") else self.gpus
        return 3 + (sum(self.steps) + 0.15) * self.tokens / share / rate


def default_cases(gpus: int) -> list[Case]:
    """What is measured on a machine of `gpus`, the worthiest first."""
    several = [n for n in (2, 4, 8) if n <= gpus]
    found = [f"train 2.7b 2^{k} x1 l2,s16384,host round_robin 10+5" for k in (14, 16)]
    for n in several:
        most = n.bit_length() - 1
        found += [
            f"train 2.7b 2^{16 + most} x{n} l2,s16384,host round_robin 10+5",  # weak, 65,536 tokens a GPU
            f"train 2.7b 2^{14 + most} x{n} l2,s16384,host round_robin 10+5",  # weak, 16,384 tokens a GPU
        ]
    found += [f"train 2.7b 2^20 x{n} l6,s8192,host round_robin 0+1" for n in several[::-1]]
    found += [f"read 2.7b 2^20 x{n} l8,s8192,gpu round_robin 0+1" for n in (1, *several)]
    for n in several[::-1]:
        others = [schedule for schedule in SCHEDULES if schedule != "round_robin"]
        found += [f"train 2.7b 2^{15 + n.bit_length()} x{n} l2,s16384,host {other} 1+1" for other in others]
    largest = several[-1] if several else 1
    found += ["film 370m 1800 x1 l8,s32768,host,t32 round_robin 1+1"]
    found += [f"film 370m 7200 x{n} l{48 // max(6, n)},s32768,host,t32 round_robin 1+1" for n in several[::-1]]
    found += [f"error 370m 2^14 x{n} l4,s2048,gpu round_robin 0+1" for n in (1, *several)]
    found += [f"train 2.7b 2^22 x{largest} l{64 // max(4, largest)},s16384,host round_robin 0+1"]
    found += [f"train 370m 2^23 x{largest} l{48 // max(4, largest)},s32768,host round_robin 0+1"]
    if several:  # over all ranks of the run
        found += [f"{kind} 370m 2^16 x{gpus} l4,s65536,host round_robin 1+3" for kind in ("ddp", "fsdp2")]
    found += ["train 370m 2^16 x1 l4,s65536,host round_robin 1+3"]
    found += [f"train 2.7b 2^{k} x{n} l4,s16384,host round_robin 0+1" for n in several for k in (16, 18)]
    found += ["train 2.7b 2^18 x1 l4,s16384,host round_robin 0+1", "train 2.7b 2^20 x1 l8,s16384,host round_robin 0+1"]
    found += ["film 370m 7200 x1 l8,s32768,host,t32 round_robin 0+1"]
    return list(dict.fromkeys(map(Case.of, found)))


SMOKE = """
train smoke 2^8 x1 l1,s64,gpu round_robin 1+1
train smoke 2^8 x2 l1,s64,gpu round_robin 1+1
train smoke 2^8 x2 l1,s64,gpu stretches 0+1
train smoke 2^8 x2 l1,s64,gpu heads 0+1
error smoke 2^8 x1 l1,s64,gpu round_robin 0+1
error smoke 2^8 x2 l1,s64,gpu round_robin 0+1
read smoke 2^8 x1 l1,s64,gpu round_robin 0+1
read smoke 2^8 x2 l1,s64,gpu round_robin 0+1
film smoke 12 x1 l1,s16,gpu round_robin 0+1
film smoke 12 x2 l1,s16,gpu round_robin 0+1
ddp smoke 2^7 x2 l1,s64,gpu round_robin 0+1
fsdp2 smoke 2^7 x2 l1,s64,gpu round_robin 0+1
"""


class Ranks:
    """The processes of this run, and how they talk while no GPU is to be kept busy."""

    def __init__(self, smoke: bool) -> None:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        self.on_gpu = torch.cuda.is_available() and not smoke
        if self.on_gpu:
            torch.cuda.set_device(local)
        self.device = torch.device("cuda", local) if self.on_gpu else torch.device("cpu")
        distributed.init_process_group("nccl" if self.on_gpu else "gloo")
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        self.words = distributed.new_group(backend="gloo") if self.on_gpu else distributed.group.WORLD
        self._groups: dict[int, SequenceGroup] = {}

    def group(self, size: int) -> SequenceGroup:
        """The `size` neighbours of this rank; all ranks ask for the same sizes in the same order."""
        if size not in self._groups:
            self._groups[size] = SequenceGroup.of_run(size, self.device.type)
        return self._groups[size]

    def everyone(self, mine: Any) -> list[Any]:
        """`mine` of every rank."""
        found: list[Any] = [None] * self.world
        distributed.all_gather_object(found, mine, group=self.words)
        return found

    def wait(self) -> None:
        """Until all are here; GPUs are idle meanwhile."""
        if self.on_gpu:
            torch.cuda.synchronize()
        distributed.barrier(group=self.words)


class Stopwatch:
    """Seconds between marks of the compute stream, or of the CPU where there is none."""

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu, self.pairs = on_gpu, []

    def mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def measured(self) -> Iterator[None]:
        begin = self.mark()
        yield
        self.pairs.append((begin, self.mark()))

    def seconds(self) -> float:
        """All that was measured so far, which is forgotten."""
        if self.on_gpu:
            torch.cuda.synchronize()
        pairs, self.pairs = self.pairs, []
        return sum(a.elapsed_time(b) / 1e3 if self.on_gpu else b - a for a, b in pairs)


class Traffic:
    """Watches what ranks of a step hand each other."""

    def __init__(self, on_gpu: bool) -> None:
        self.waiting, self.messages = Stopwatch(on_gpu), []
        wait, send = parallel_sequence.Arrival.wait, SequenceGroup.send

        def timed_wait(arrival: Any) -> list[Tensor]:
            with self.waiting.measured():
                return wait(arrival)

        def counted_send(group: SequenceGroup, tensors: Any, like: Any, to: int) -> None:
            self.messages.append(sum(dtype.itemsize * torch.Size(shape).numel() for shape, dtype in like))
            send(group, tensors, like, to)

        parallel_sequence.Arrival.wait, SequenceGroup.send = timed_wait, counted_send

    def seconds(self, link: tuple[float, float]) -> tuple[float, float]:
        """Waiting, and what the messages take over a link of (latency, bytes per second); both since the last call."""
        messages, self.messages[:] = list(self.messages), []
        return self.waiting.seconds(), sum(link[0] + nbytes / link[1] for nbytes in messages)


# ----------------------------------------------------------------------------------------------------- models
def language_model(size: str, device: torch.device) -> Ma2mbaTextModel:
    """A randomly initialised stack in training mode."""
    if size in SIZES:
        return text_model(size, device=device).train()
    torch.manual_seed(0)
    config = Ma2mbaTextConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=4, state_size=8, head_dim=8, chunk_size=8
    )
    return Ma2mbaTextModel(config).to(device).train()


def whole_model(size: str, device: torch.device) -> nn.Module:
    """A whole model in training mode, its tower CLIP ViT-L/14-336 (tiny for the smoke test)."""
    if size in SIZES:
        return video_model(size, device=device).train()
    text = {"hidden_size": 32, "num_hidden_layers": 4, "state_size": 8, "head_dim": 8, "chunk_size": 8,
            "vocab_size": 272}  # fmt: skip
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 16, "patch_size": 4, "projection_dim": 16}  # fmt: skip
    model = video_model("370m", torch.float32, device, text=text, vision_config=vision)
    round_weights_(model, torch.float32)
    return model.train()


def zero_gradients(model: nn.Module, shared: bool) -> None:
    if shared:
        keep_wide(model.parameters())
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p, dtype=gradient_dtype(p)) if p.grad is None else p.grad.zero_()


def gradient_norm(model: nn.Module) -> float:
    squares = [p.grad.float().pow(2).sum() for p in model.parameters() if p.grad is not None]
    return torch.stack(squares).sum().sqrt().item()


def reserve_kept(model: Ma2mbaTextModel, plan: RecomputePlan, columns: int) -> None:
    """Page-lock host memory for what is kept of this rank's columns."""
    shape = StackShape.of(model.config)
    segments = -(-columns // plan.segment_length)
    streams = (len(plan.blocks(shape.layers)) - 1) * columns * shape.width * shape.stream
    model.engine.reserve_host_memory(streams + segments * shape.layers * shape.state_bytes)


# ------------------------------------------------------------------------------------------------------ steps
class TrainingStep:
    """Forward and backward of a language model over this rank's columns: the same tokens, labels and loss on any
    number of ranks."""

    def __init__(self, model: Ma2mbaTextModel, case: Case, ranks: Ranks) -> None:
        self.model, self.case, self.plan = model, case, case.cells
        model.set_checkpointing(True, layers_per_block=self.plan.layers_per_block,
                                segment_length=self.plan.segment_length, offload=self.plan.offload)  # fmt: skip
        tokens, length, width = case.tokens, self.plan.segment_length, model.config.hidden_size
        self.group, self.cut = None, None
        own = torch.ones(tokens, dtype=torch.bool)
        if case.gpus > 1:
            self.group = ranks.group(case.gpus)
            self.cut = SequenceCut((*range(0, tokens, length), tokens), case.gpus, case.schedule)
            own = self.cut.mask(self.group.rank)
            # Few sums exist at a time, but enough to keep all ranks busy.
            blocks = len(self.plan.blocks(len(model.layers)))
            band = max(case.gpus, min(blocks, 8 // self.plan.layers_per_block))
            self.plan = replace(self.plan, band=band if case.schedule == "round_robin" else 0)
        model.share_sequence(self.group)
        positions = torch.linspace(0, tokens - 1, min(LABELS, tokens)).long()
        self.count, mine = len(positions), own[positions]
        drawn = torch.randint(
            0, model.config.vocab_size, (len(positions),), generator=torch.Generator().manual_seed(1)
        )
        self.labels = drawn[mine].to(ranks.device)
        self.keep = torch.zeros(1, tokens, dtype=torch.bool, device=ranks.device)
        self.keep[0, positions[mine]] = True
        dtype = model.get_input_embeddings().weight.dtype
        on_host = self.plan.offload and ranks.on_gpu
        columns = torch.arange(tokens)
        if self.cut is not None:
            columns = self.cut.take(columns[None], self.group.rank)[0]
        place = {"pin_memory": True} if on_host else {"device": ranks.device}
        self.x = torch.empty(1, len(columns), width, dtype=dtype, **place)
        for at, block in self._runs(columns):
            noise = torch.Generator(ranks.device).manual_seed(1000 + block)
            drawn = torch.randn(NOISE, width, generator=noise, device=ranks.device) * 0.1
            inside = columns[at] - block * NOISE
            rounded = drawn[inside.to(ranks.device)].to(torch.bfloat16)  # the same in every type
            self.x[0, at] = rounded.to(dtype).to(self.x.device)

    @staticmethod
    def _runs(columns: Tensor) -> Iterator[tuple[Tensor, int]]:
        blocks = columns // NOISE
        for block in blocks.unique().tolist():
            yield (blocks == block).nonzero()[:, 0], block

    def reserve(self) -> None:
        """Page-lock the host memory that the first step would."""
        if self.plan.offload and self.x.is_pinned():
            reserve_kept(self.model, self.plan, self.x.shape[1])

    def __call__(self) -> Tensor:
        """The loss, this rank's part; gradients are added to the parameters'."""
        x = self.x.detach().requires_grad_()
        arguments = {"inputs_embeds": x, "use_cache": False, "output_positions": self.keep}
        if self.cut is not None:
            arguments["sequence_cut"] = self.cut
        with self.model.engine.planned(self.plan):
            hidden = self.model(**arguments).last_hidden_state
        head = self.model.get_input_embeddings().weight
        pieces = zip(hidden.split(256), self.labels.split(256), strict=True)
        losses = [nn.functional.cross_entropy((h @ head.T).float(), y, reduction="sum") for h, y in pieces]
        loss = sum(losses, hidden.sum() * 0) / self.count
        loss.backward()
        return loss.detach()

    @property
    def host_bytes(self) -> int:
        return self.model.engine.last_host_bytes + (2 * self.x.nbytes if self.x.device.type == "cpu" else 0)

    def predicted(self) -> float:
        """The planner's seconds for the language model."""
        shape = StackShape.of(self.model.config)
        work = Workload(self.x.shape[1], layer_parameters=layer_parameter_count(shape), kept=self.count)
        if self.cut is not None:
            stretches = self.case.schedule != "round_robin"
            work = replace(work, ranks=self.case.gpus, segment=self.cut.longest, stretches=stretches)
        return stack_seconds(shape, work, self.plan)


class ErrorStep(TrainingStep):
    """`TrainingStep`, and how far its gradients are from those of the same weights and inputs in fp32 on one rank."""

    def __init__(self, model: Ma2mbaTextModel, case: Case, ranks: Ranks) -> None:
        wide = copy.deepcopy(model).float()
        wide.zero_grad()
        alone = replace(case, gpus=1, plan=f"l1,s{min(4096, case.tokens)},gpu")
        TrainingStep(wide, alone, ranks)()
        self.exact = [p.grad for p in wide.parameters()]
        super().__init__(model, case, ranks)

    def error(self) -> float:
        """||g - exact|| / ||exact|| over all parameters together."""
        pairs = list(zip(self.model.parameters(), self.exact, strict=True))
        off = sum((p.grad.double() - g.double()).square().sum() for p, g in pairs)
        return float((off / sum(g.double().square().sum() for _, g in pairs)).sqrt())


class FilmStep:
    """Forward and backward of a whole model, tower and projector trained, on this rank's frames of a film."""

    ANSWER = 32

    def __init__(self, model: nn.Module, case: Case, ranks: Ranks) -> None:
        self.model, self.plan, config = model, case.cells, model.config
        config.vision_chunk_frames = 4 * case.frames_together
        model.gradient_checkpointing_enable(
            {"method": "multi_axis", "layers_per_block": self.plan.layers_per_block,
             "segment_length": self.plan.segment_length, "offload": self.plan.offload}
        )  # fmt: skip
        self.stack = model.model.language_model
        self.group = ranks.group(case.gpus) if case.gpus > 1 else None
        self.stack.share_sequence(self.group)
        drawn = torch.Generator().manual_seed(2)
        text = torch.randint(10, config.text_config.vocab_size - 8, (16 + self.ANSWER,), generator=drawn)
        visual = torch.full((case.tokens * config.tokens_per_frame,), config.video_token_id)
        ids = torch.cat([text[:8], visual, text[8:]])[None]
        labels = torch.full_like(ids, -100)
        labels[0, -self.ANSWER :] = ids[0, -self.ANSWER :]
        frames, self.cut = torch.arange(case.tokens), None
        if self.group is not None:
            self.cut = model.model.cut(ids)
            is_video = ids == config.video_token_id
            frames = self.cut.frames(is_video, self.group.rank, config.tokens_per_frame)
        side = config.vision_config.image_size
        few = torch.randint(0, 256, (64, 3, side, side), dtype=torch.uint8, generator=drawn)
        pixels = torch.empty(len(frames), 3, side, side, dtype=torch.uint8)
        for place, frame in enumerate(frames.tolist()):  # all differ, and are cheap to draw
            torch.add(few[frame % 64], frame // 64 * 37 % 256, out=pixels[place])
        self.batch = {"input_ids": ids.to(ranks.device), "labels": labels.to(ranks.device)}
        self.batch["pixel_values_videos"] = pixels
        self.columns = ids.shape[1] if self.cut is None else int(self.cut.mask(self.group.rank).sum())

    def reserve(self) -> None:
        """Page-lock the host memory that the first step would."""
        if self.plan.offload and next(self.model.parameters()).is_cuda:
            reserve_kept(self.stack, self.plan, self.columns)

    def __call__(self) -> Tensor:
        extra = {} if self.cut is None else {"sequence_cut": self.cut}
        loss = self.model(**self.batch, **extra, use_cache=False).loss
        loss.backward()
        return loss.detach()

    @property
    def host_bytes(self) -> int:
        return self.stack.engine.last_host_bytes

    def predicted(self) -> float:
        """The planner's seconds for the language model and the tower."""
        frames = len(self.batch["pixel_values_videos"])
        trains = {"tower_trains": True, "projector_trains": True, "tower_parameters": 0, "projector_parameters": 0}
        shape = StackShape.of(self.stack.config)
        work = Workload(self.columns, layer_parameters=layer_parameter_count(shape), kept=self.ANSWER)
        if self.cut is not None:
            work = replace(work, ranks=self.cut.ranks, segment=self.cut.longest)
        tower = vision_seconds(VisionLoad.of(self.model.config, frames, **trains))
        return tower + stack_seconds(shape, work, self.plan)


class ReadingStep:
    """Token ids from host memory into a state, in pieces of one segment; by one rank or dealt to all of a group."""

    plan, host_bytes = None, 0

    def __init__(self, model: Ma2mbaTextModel, case: Case, ranks: Ranks) -> None:
        self.model, self.case, self.device = model.eval(), case, ranks.device
        self.length = case.cells.segment_length
        model.prefill_segment_length = self.length
        group = ranks.group(case.gpus) if case.gpus > 1 else None
        self.rank, self.world = (0, 1) if group is None else (group.rank, group.size)
        self.link = None if group is None else reading_group(group.group, ranks.device)
        drawn = torch.Generator().manual_seed(3)
        ids = torch.randint(10, model.config.vocab_size, (1, case.tokens), generator=drawn)
        self.pieces = ids.split(self.length, dim=1)

    def reserve(self) -> None:
        pass

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """A number that tells states apart."""
        dtype = self.model.norm_f.weight.dtype
        state = VideoState.zeros(self.model.config, 1, self.device, dtype)
        if self.link is None:
            for piece in self.pieces:
                keep = torch.zeros(1, piece.shape[1], dtype=torch.bool)
                keep[0, -1] = True
                told = {"past_key_values": state, "use_cache": True, "output_positions": keep}
                self.model(input_ids=piece.to(self.device), **told)
        else:
            shared = SharedStack(self.model, self.link, state)
            for first in range(0, len(self.pieces), self.world):
                wave = self.pieces[first : first + self.world]
                own = [self.model.embeddings(p.to(self.device)) for p in wave[self.rank : self.rank + 1]]
                shared.round(own, sum(piece.shape[1] for piece in wave))
            state = shared.end()
        return state.ssm.float().abs().mean()

    def predicted(self) -> float:
        from video_ma2mba.planning.sequence_plan import plan_reading

        return plan_reading(self.model.config, tokens=self.case.tokens, gpus=self.world).total_seconds


class ReplicaStep:
    """DDP or FSDP2 over all ranks, each with a sample of its own: the bound of what sharing a sample can reach."""

    def __init__(self, model: Ma2mbaTextModel, case: Case, ranks: Ranks) -> None:
        self.inner = TrainingStep(model, replace(case, gpus=1, kind="train"), ranks)
        model.embeddings.requires_grad_(False)  # its only use is the head's, outside of the wrapped forward
        self.plan = self.inner.plan
        if case.kind == "ddp":
            from torch.nn.parallel import DistributedDataParallel

            ids = [ranks.device.index] if ranks.on_gpu else None
            self.wrapped: nn.Module = DistributedDataParallel(model, device_ids=ids)
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            model.to(model.embeddings.weight.dtype)  # a unit has one type
            mesh = init_device_mesh(ranks.device.type, (ranks.world,))
            for layer in model.layers:
                fully_shard(layer, mesh=mesh)
            self.wrapped = fully_shard(model, mesh=mesh)

    def reserve(self) -> None:
        pass

    def __call__(self) -> Tensor:
        step = self.inner
        x = step.x.detach().requires_grad_()
        hidden = self.wrapped(inputs_embeds=x, use_cache=False, output_positions=step.keep).last_hidden_state
        loss = hidden.float().pow(2).mean()
        loss.backward()
        return loss.detach()

    @property
    def host_bytes(self) -> int:
        return self.inner.host_bytes

    def predicted(self) -> float:
        return float("nan")


STEPS: dict[str, Callable[..., Any]] = {
    "train": TrainingStep, "error": ErrorStep, "film": FilmStep, "read": ReadingStep,
    "ddp": ReplicaStep, "fsdp2": ReplicaStep,
}  # fmt: skip


# -------------------------------------------------------------------------------------------------- measuring
def measure_links(ranks: Ranks) -> tuple[float, float]:
    """Latency in seconds and bytes per second around the ring of all ranks, from messages of two sizes. The larger
    ones take a GPU's link longer than the host needs to send them."""
    nbytes = 1 << (28 if ranks.on_gpu else 22)
    if ranks.world == 1:
        return 0.0, float("inf")
    group, spent = ranks.group(ranks.world), {}
    for size in (nbytes // 256, nbytes):
        like = [((size // 4,), torch.float32)]
        x, watch = torch.zeros(size // 4, device=ranks.device), Stopwatch(ranks.on_gpu)
        for _ in range(2):
            ranks.wait()
            with watch.measured():
                for _ in range(8):
                    arrival = group.receive(like, (group.rank - 1) % group.size)
                    group.send([x], like, (group.rank + 1) % group.size)
                    arrival.wait()
                group.finish()
            spent[size] = watch.seconds() / 8
    speed = (nbytes - nbytes // 256) / max(spent[nbytes] - spent[nbytes // 256], 1e-9)
    return max(spent[nbytes // 256] - nbytes / 256 / speed, 0.0), speed


def measure(
    step: Any, model: nn.Module, case: Case, ranks: Ranks, traffic: Traffic, link: tuple[float, float]
) -> dict[str, Any]:
    """One row of the table, from the steps of all ranks that take part; every rank calls this."""
    takes_part = case.gpus > 1 or ranks.rank == 0
    shares = case.gpus > 1 and case.kind in ("train", "film", "error")
    group = step.group.group if shares else None
    trains = case.kind != "read"
    rows, loss = [], None
    for number in range(sum(case.steps)):
        if not takes_part:
            break
        if trains:
            zero_gradients(model, shares)
        if number == 0 and case.steps[0] == 0:
            step.reserve()
        if ranks.on_gpu:
            torch.cuda.synchronize()
            base = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        if case.gpus > 1:
            ranks.wait()
        traffic.seconds(link)
        whole, summing = Stopwatch(ranks.on_gpu), Stopwatch(ranks.on_gpu)
        with whole.measured():
            loss = step()
            with summing.measured():
                if shares:
                    add_up(model.parameters(), group)
        if shares:
            distributed.all_reduce(loss, group=group)
        waiting, messages = traffic.seconds(link)
        row = {"seconds": whole.seconds(), "all_reduce": summing.seconds(), "waiting": waiting, "messages": messages}
        row["peak"] = torch.cuda.max_memory_allocated() - base if ranks.on_gpu else 0
        if number >= case.steps[0]:
            rows.append(row)
    told = None
    if takes_part:
        norm = gradient_norm(model) if trains and case.kind != "fsdp2" else float("nan")
        error = step.error() if case.kind == "error" else float("nan")
        told = (rows, step.host_bytes, float(loss), norm, step.predicted(), error)
    everyone = [found for found in ranks.everyone(told) if found is not None]
    steps = list(zip(*(found[0] for found in everyone), strict=True))  # by step, then by rank
    seconds = statistics.median(max(row["seconds"] for row in step) for step in steps)
    flat = [row for step in steps for row in step]
    reading_and_all = {name: 1e3 * statistics.mean(row[name] for row in flat) for name in ("waiting", "messages")}
    tokens = case.tokens * (case.gpus if case.kind in ("ddp", "fsdp2") else 1)
    plan = step.plan if takes_part else None
    return {
        "case": str(case), "gpus": case.gpus, "tokens": tokens, "seconds": round(seconds, 4),
        "tokens_per_s": round(tokens / seconds, 1 if case.kind == "film" else None),
        "peak_gb": round(max(row["peak"] for row in flat) / 1e9, 2),
        "host_gb": round(sum(found[1] for found in everyone[: case.gpus]) / 1e9, 1),
        "waiting_ms": round(reading_and_all["waiting"], 1), "messages_ms": round(reading_and_all["messages"], 1),
        "all_reduce_ms": round(1e3 * statistics.mean(row["all_reduce"] for row in flat), 1),
        "loss": f"{everyone[0][2]:.6g}", "grad_norm": f"{everyone[0][3]:.6g}", "grad_error": f"{everyone[0][5]:.5f}",
        "predicted_s": f"{everyone[0][4]:.3f}", "plan": "" if plan is None else str(plan),
        "steps": len(steps),
    }  # fmt: skip


def compared(row: dict, case: Case, baselines: dict[Case, dict]) -> dict:
    """Efficiency and errors against what one GPU did, where that was measured in this call."""
    if case.kind in ("ddp", "fsdp2"):
        alone = [(c, r) for c, r in baselines.items() if (c.kind, c.size, c.plan) == ("train", case.size, case.plan)]
    else:
        alone = [(c, r) for c, r in baselines.items() if (c.kind, c.size) == (case.kind, case.size)]
    if not alone:
        return row
    each = row["tokens"] / case.gpus
    _, nearest = min(alone, key=lambda pair: abs(pair[0].tokens - each))
    row["efficiency"] = round(row["tokens_per_s"] / case.gpus / nearest["tokens_per_s"], 4)
    for other, result in alone:
        if other.tokens == case.tokens and case.kind not in ("ddp", "fsdp2"):
            for name in ("loss", "grad_norm"):
                expected, found = float(result[name]), float(row[name])
                row[f"{name}_error"] = f"{abs(found - expected) / max(abs(expected), 1e-30):.2g}"
    return row


def run(arguments: argparse.Namespace) -> None:
    began = time.monotonic()
    faulthandler.register(signal.SIGTERM, all_threads=False, chain=True)  # a run that hangs says where
    ranks = Ranks(arguments.smoke)
    cases = [Case.of(line) for line in SMOKE.split("\n") if line] if arguments.smoke else default_cases(ranks.world)
    if arguments.cases:
        cases = [Case.of(text) for text in arguments.cases]
    if arguments.only:
        cases = [case for case in cases if any(fnmatch.fnmatch(str(case), pattern) for pattern in arguments.only)]
    traffic, link = Traffic(ranks.on_gpu), measure_links(ranks)
    if ranks.rank == 0:
        print(f"{ranks.world} ranks; link: {link[0] * 1e6:.0f} us, {link[1] / 1e9:.1f} GB/s", flush=True)
    name = hardware(ranks.device)
    about = {"hardware": f"{ranks.world} x {name}" if ranks.world > 1 else name}
    about |= {"date": datetime.date.today().isoformat(), "kernels": arguments.kernels or "default"}
    baselines: dict[Case, dict] = {}
    model: nn.Module | None = None
    built = None
    for case in cases:
        left = arguments.max_seconds - (time.monotonic() - began)
        (begin, *_) = ranks.everyone(left > case.expected_seconds())
        fits = case.gpus == ranks.world if case.kind in ("ddp", "fsdp2") else ranks.world % case.gpus == 0
        if not fits or not begin:
            if ranks.rank == 0:
                print(f"left out: {case} ({left:.0f} s left)", flush=True)
            continue
        whole = case.kind == "film"
        fresh = case.kind in ("ddp", "fsdp2")  # wrapping changes a model for good
        if built != (case.size, whole) or fresh:
            del model
            gc.collect()
            if ranks.on_gpu:
                torch.cuda.empty_cache()
            model = (whole_model if whole else language_model)(case.size, ranks.device)
            built = None if fresh else (case.size, whole)
        step, problem = None, None
        model.train()
        try:
            if case.gpus > 1 or ranks.rank == 0:
                if case.steps[0] == 0 and not fresh:  # a short one compiles and tunes the kernels
                    STEPS[case.kind](model, case.shortened(), ranks)()
                step = STEPS[case.kind](model, case, ranks)
        except (ValueError, RuntimeError, MemoryError) as error:
            problem = f"{type(error).__name__}: {str(error)[:150]}"
        problems = [found for found in ranks.everyone(problem) if found]
        if problems:
            if ranks.rank == 0:
                print(f"failed: {case}: {problems[0]}", flush=True)
            continue
        row = compared({**about, **measure(step, model, case, ranks, traffic, link)}, case, baselines)
        if case.gpus == 1:
            baselines[case] = row
        if ranks.rank == 0:
            shown = {k: v for k, v in row.items() if k in FIELDS[2:]}
            print(f"{time.monotonic() - began:.0f} s: {shown}", flush=True)
            append_rows(arguments.out, [row], FIELDS)
        del step
        gc.collect()
        if ranks.on_gpu:
            torch.cuda.empty_cache()
    ranks.wait()
    if ranks.rank == 0 and arguments.plot:
        draw(arguments.out, arguments.plot)
    distributed.destroy_process_group()


def fork_ranks(count: int, arguments: argparse.Namespace) -> list[int | None]:
    """Exit codes of `count` processes of this run."""
    store = distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(count)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # this one

    def one(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        torch.set_num_threads(1)
        run(arguments)

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=one, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def draw(table: Path, picture: Path) -> None:
    """Efficiency against GPUs, measured and simulated, as PNG."""
    import csv

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from video_ma2mba.planning.sequence_simulation import simulate_step

    with table.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["efficiency"]]
    figure, axes = plt.subplots(figsize=(8, 5), dpi=120)
    lines: dict[str, dict[int, float]] = {}  # of several plans the best one
    for row in rows:
        case = Case.of(row["case"])
        if case.kind in ("train", "read"):
            each = case.tokens // case.gpus
            line = lines.setdefault(f"{case.kind} {case.size}, {each:,} tokens a GPU, {case.schedule}", {1: 100.0})
            line[case.gpus] = max(100 * float(row["efficiency"]), line.get(case.gpus, 0.0))
    for label, points in sorted(lines.items()):
        gpus, shares = zip(*sorted(points.items()), strict=True)
        axes.plot(gpus, shares, "o-", ms=5, label=label)
    for each, size in ((1 << 16, "2.7b"), (1 << 14, "2.7b")):
        config = Ma2mbaTextConfig(hidden_size=SIZES[size][0], num_hidden_layers=SIZES[size][1])
        plan = RecomputePlan(2, min(16384, each // 4), offload=True)
        steps = [simulate_step(config, each * n, n, plan) for n in (1, 2, 4, 8)]
        axes.plot([s.gpus for s in steps], [100 * s.efficiency for s in steps], "k:", lw=1)
        axes.annotate(f"simulated, {each:,}", (6, 100 * steps[-1].efficiency + 1), fontsize=7, ha="center")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("GPUs that share one sample")
    axes.set_ylabel("% of one GPU's tokens a second, each")
    axes.grid(alpha=0.25)
    axes.set_ylim(top=101)
    axes.legend(fontsize=7, loc="upper right")
    axes.set_title(f"{rows[-1]['hardware']}, {rows[-1]['date']}" if rows else "", fontsize=9)
    figure.tight_layout()
    figure.savefig(picture)
    plt.close(figure)
    print(f"wrote {picture}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=None, help="processes to start (default: one for each GPU here)")
    parser.add_argument("--only", nargs="+", default=[], help="patterns of cases, such as 'read*' or '* x4 *'")
    parser.add_argument("--cases", nargs="+", default=[], help="these cases instead, written as --list prints them")
    parser.add_argument("--list", action="store_true", help="print the cases in their order and stop")
    parser.add_argument("--max-seconds", type=float, default=3600.0, help="begin no case that would end later")
    parser.add_argument("--kernels", default=None, help="triton or mamba_ssm; default: what every operation picks")
    parser.add_argument("--smoke", action="store_true", help="tiny cases on two processes of the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS / "sequence_parallel.csv")
    parser.add_argument("--plot", type=Path, default=None, help="draw the table there, as PNG, when all is done")
    arguments = parser.parse_args()
    gpus = arguments.gpus or (2 if arguments.smoke else max(1, torch.cuda.device_count()))
    if arguments.list:
        print("\n".join(map(str, default_cases(gpus))))
    elif "RANK" in os.environ:
        with force_backend(arguments.kernels):
            run(arguments)
    elif arguments.smoke:  # forked: what was imported is there
        sys.exit(max(abs(code or 0) for code in fork_ranks(gpus, arguments)))
    else:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
        sys.exit(subprocess.run([*launch, *sys.argv]).returncode)


if __name__ == "__main__":
    main()
