"""What VideoMamba's ways of training gain on clips of the rendered world: the paper's comparisons, small.

    python benchmarks/videomamba_training.py --out videomamba_training.csv --plot videomamba_training.png   # one GPU
    python benchmarks/videomamba_training.py --smoke --out smoke.csv                       # a CPU, to see it run

Clips have 32 x 32 pixels. `motion`: eight frames of a visit of something that moves, beside something that rests; the
class is the direction (four, chance 25 %), which no single frame shows. `count`: one to four things come and go
somewhere in a longer film; the class is how many (chance 25 %), for which the whole film has to be seen.

- `cost`: memory and time of a step of masked pre-training against the share of patches that is hidden (size M).
- `waiting`: the recipe `videomamba/k400` (size Ti, 8 of 300 frames of 256 x 256 pixels, H.264; 12 processes decode):
  which share of the time a step waits for its clips, and the CPU time that those of one video take.
- `scan`: the seven orders of scanning, trained from nothing on `motion`, with steps of time as Mamba begins with
  (`time_step_range`) and loud positions; one of them also as the released models begin.
- `distil`: few clips of `motion`; a model alone, beside a smaller frozen one that learnt from the same clips (also for
  the first half of the steps only), and beside one that learnt from all clips.
- `masked`: pre-training beside a frozen CLIP (trained here, on single frames and sentences about them) with each mask,
  then fine-tuning on few clips; also from nothing, for as many steps of fine-tuning and for the steps of both.
- `count`: the task of that name in longer and longer films, 8 to 256 seconds seen once a second; then the longest ones
  in fewer and fewer frames, down to 8. Every model starts from the one before, positions interpolated. `seen` is the
  share of films whose frames show every thing: what a perfect observer is sure of.

Everything runs in the package's own trainer and objectives, several runs at once. Rows are written as they are
measured; a run that is complete in the table is not repeated. Seeds decide weights, order and masks; clips are the
same in all.
"""

import argparse
import csv
import datetime
import os
import queue
import random
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import torch
from result_tables import append_rows, hardware, write_rows
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import CLIPConfig, CLIPModel, CLIPVisionModelWithProjection, PrinterCallback, TrainerCallback

from video_ma2mba.conversion.videomamba_checkpoint import resize_clips
from video_ma2mba.modeling_video_ma2mba.configuration_videomamba import VideoMambaConfig
from video_ma2mba.modeling_video_ma2mba.configuration_videomamba_sizes import SCAN_ORDERS
from video_ma2mba.modeling_video_ma2mba.modeling_videomamba import (
    VideoMambaForVideoClassification,
    VideoMambaModel,
    normalise,
)
from video_ma2mba.trainer.recipe_files import recipe_content
from video_ma2mba.trainer.videomamba.clip_trainer import Classification, VideoMambaTrainer, accuracy
from video_ma2mba.trainer.videomamba.masked_pretraining import MASKS, ClipTeacher, MaskedAlignment, MaskedVideoMamba
from video_ma2mba.trainer.videomamba.recipe_run import build_recipe, build_trainer
from video_ma2mba.trainer.videomamba.self_distillation import Distillation, DistilledClassifier
from video_ma2mba.trainer.videomamba.starting_model import frozen
from video_ma2mba.trainer.videomamba.training_settings import VideoMambaTrainingConfig
from video_ma2mba.world.clip_encoders import loud_positions_
from video_ma2mba.world.model import PIXEL_MEAN, PIXEL_STD
from video_ma2mba.world.render import WorldRenderer
from video_ma2mba.world.video_files import write_video
from video_ma2mba.world.world import COLOURS, DIRECTIONS, SHAPES, World, WorldSettings, build_world, video_seed

SIDE, PATCH = 32, 8
FIELDS = (
    *("part", "arm", "seed", "stage", "step", "steps", "loss", "accuracy", "milliseconds", "gb", "frames", "waiting"),
    *("hardware", "date"),
)
_TRIES = 64  # worlds until one shows what is asked
_WORDS = ["start", *COLOURS, *SHAPES, "left", "middle", "right", "top", "centre", "bottom", "nothing", "end"]
_LONGEST_SENTENCE = 11


# ------------------------------------------------------------------------------------------------- the clips
@dataclass(frozen=True)
class Films:
    """Which clips: `count` of a split that show `task`; `motion` has eight frames of a visit, `count` one a second."""

    task: str
    split: str
    count: int
    seconds: int = 8

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.task}-{self.split}-{self.count}x{self.seconds}s"


def world_of(films: Films, index: int) -> World:
    """The world of clip `index`."""
    most = 2 if films.task == "motion" else 4
    settings = WorldSettings(2 if films.task == "motion" else 1, most, card=False, sun=False, clutter=False)
    for attempt in range(_TRIES):
        world = build_world(video_seed(films.split, index * _TRIES + attempt), films.seconds, settings)
        moving = sum(thing.direction is not None for thing in world.things)
        if films.task == "count" or (len(world.things) == 2 and moving == 1):
            return world
    raise ValueError(f"clip {index} of {films}: no world in {_TRIES} shows it")


def sentence(world: World, moment: float) -> list[int]:
    """What a frame shows, as numbers of words: colour, shape, column and row of each thing."""
    said = []
    for thing in world.things:
        if thing.start <= moment < thing.end:
            x, y = thing.position(moment)
            column, row = (min(int(3 * at), 2) for at in (x, y))
            said += [thing.colour, thing.shape, ("left", "middle", "right")[column], ("top", "centre", "bottom")[row]]
    numbers = [_WORDS.index(word) for word in ["start", *(said or ["nothing"]), "end"]]
    return (numbers + [_WORDS.index("end")] * _LONGEST_SENTENCE)[:_LONGEST_SENTENCE]


def draw_clip(films: Films, index: int) -> tuple[np.ndarray, int, list[list[int]]]:
    """Pixels uint8 (seconds, 3, SIDE, SIDE), class, and a sentence a frame (`motion`) or begin and end of the visit of
    each of four things, -1 where there are fewer (`count`)."""
    world = world_of(films, index)
    rng = random.Random(f"moments {world.seed}")
    first, last = 0, films.seconds
    if films.task == "motion":
        first, last = next((thing.start, thing.end - 1) for thing in world.things if thing.direction is not None)
    each = (last - first) / films.seconds
    training = films.split == "train"
    moments = [first + (number + (rng.random() if training else 0.5)) * each for number in range(films.seconds)]
    pixels = WorldRenderer(world, SIDE).frames(moments).transpose(0, 3, 1, 2)
    if films.task == "motion":
        label = next(DIRECTIONS.index(thing.direction) for thing in world.things if thing.direction is not None)
        return pixels, label, [sentence(world, moment) for moment in moments]
    visits = [[thing.start, thing.end] for thing in world.things]
    return pixels, len(visits) - 1, visits + [[-1, -1]] * (4 - len(visits))


def _draw_piece(films: Films, first: int, last: int, file: str) -> list[tuple[int, list[list[int]]]]:
    pixels = np.load(file, mmap_mode="r+")
    told = []
    for index in range(first, last):
        pixels[index], *facts = draw_clip(films, index)
        told.append(tuple(facts))
    return told


def render(films: Films, folder: Path, workers: ProcessPoolExecutor) -> None:
    """Draw clips into `folder`, or find them there."""
    done = folder / f"{films.name}.npz"
    if done.exists():
        return
    file = folder / f"{films.name}.npy"
    np.lib.format.open_memmap(file, "w+", np.uint8, (films.count, films.seconds, 3, SIDE, SIDE)).flush()
    edges = [*range(0, films.count, max(1, films.count // 128)), films.count]
    pieces = [workers.submit(_draw_piece, films, *edge, str(file)) for edge in pairwise(edges)]
    labels, facts = zip(*(told for piece in pieces for told in piece.result()), strict=True)
    np.savez(done, labels=labels, facts=facts)


class Clips(Dataset):
    """Drawn clips as the trainer takes them. Of `count` every so manieth frame, in training from a random first one,
    half of the clips backwards and half of them mirrored.

    Args:
        only: the first so many clips. frames: of a film; it divides its seconds.
    """

    def __init__(self, films: Films, folder: Path, only: int | None = None, frames: int | None = None) -> None:
        self.films, self.step = films, films.seconds // (frames or films.seconds)
        self.pixels = np.load(folder / f"{films.name}.npy", mmap_mode="r")[:only]
        with np.load(folder / f"{films.name}.npz") as held:
            self.labels, self.facts = held["labels"][:only], held["facts"][:only]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, draw: int) -> dict[str, Any]:
        place, first, flips = draw % len(self), self.step // 2, []
        if self.films.task == "count" and self.films.split == "train":
            rng = np.random.default_rng(draw)
            first, flips = int(rng.integers(self.step)), [axis for axis in (0, 3) if rng.random() < 0.5]
        clip = torch.from_numpy(np.array(self.pixels[place, first :: self.step])).flip(flips)
        return {"pixel_values": clip[None], "labels": int(self.labels[place])}

    def shown(self) -> float:
        """Share of films of `count` whose test frames show every thing."""
        seconds = np.arange(self.step // 2, self.films.seconds, self.step)
        begin, end = self.facts[..., 0, None], self.facts[..., 1, None]
        seen = ((begin <= seconds) & (seconds < end)).any(-1) | (self.facts[..., 0] < 0)
        return float(seen.all(1).mean())


# ------------------------------------------------------------------------------------------------- the models
@dataclass(frozen=True)
class Sizes:
    """What decides how long everything takes."""

    width: int = 128
    layers: int = 4
    teacher_width: int = 64
    clips: int = 24000
    few: int = 1000
    tests: int = 1000
    films: int = 1500
    count_batch: int = 128
    count_rate: float = 2e-3
    batch: int = 64
    steps: int = 240
    pretraining: int = 300
    fine_tuning: int = 200
    begin: int = 400
    stage: int = 100
    clip_steps: int = 500
    learning_rate: float = 1.5e-3
    frames: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
    model: dict[str, Any] = field(default_factory=dict)


SMOKE = Sizes(
    *(16, 2, 8, 48, 16, 8, 12, 4, 1e-3, 4, 2, 2, 2, 2, 1, 2),
    frames=(8, 16),
    model={"state_size": 4, "num_hidden_layers": 2},
)


def config_of(sizes: Sizes, released: bool = False, **fields: Any) -> VideoMambaConfig:
    """A small VideoMamba. released: with the weights that the paper's models start from."""
    own = {"hidden_size": sizes.width, "num_hidden_layers": sizes.layers, "num_frames": 8, "num_labels": 4}
    if not released:
        own |= {"time_step_range": (0.001, 0.1), "initializer_range": sizes.width**-0.5}
    own |= {"image_size": SIDE, "patch_size": PATCH, "image_mean": PIXEL_MEAN, "image_std": PIXEL_STD}
    return VideoMambaConfig(**{**own, **sizes.model, **fields})


def classifier(config: VideoMambaConfig, seed: int, released: bool = False) -> VideoMambaForVideoClassification:
    """A fresh classifier."""
    torch.manual_seed(seed)
    model = VideoMambaForVideoClassification(config)
    if not released:
        loud_positions_(model.videomamba)
    return model


class Told(TrainerCallback):
    """Hands what is measured on."""

    def __init__(self, tell: Callable[..., None], stage: str) -> None:
        self.tell, self.stage, self.loss, self.begun = tell, stage, None, time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.loss = float(logs["loss"])
            if not args.do_eval:
                self._say(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        self._say(state, accuracy=metrics["eval_top1"])

    def _say(self, state: Any, **more: Any) -> None:
        spent = 1e3 * (time.monotonic() - self.begun) / max(state.global_step, 1)
        about = {"step": state.global_step, "steps": state.max_steps, "loss": self.loss, "milliseconds": spent}
        self.tell(stage=self.stage, **about, **more)


def settings(sizes: Sizes, folder: str, steps: int, seed: int, **changes: Any) -> VideoMambaTrainingConfig:
    """Of the trainer: one cosine after a tenth of warm-up."""
    often = max(1, steps // 8)
    given: dict[str, Any] = {
        "max_steps": steps,
        "seed": seed,
        "per_device_train_batch_size": sizes.batch,
        "per_device_eval_batch_size": 4 * sizes.batch,
        "learning_rate": sizes.learning_rate,
        "warmup_steps": max(1, steps // 10),
        "min_learning_rate": 1e-5,
        "weight_decay": 0.05,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "logging_steps": often,
        "eval_strategy": "steps",
        "eval_steps": often,
        "do_eval": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    return VideoMambaTrainingConfig(folder, **(given | changes))


# --------------------------------------------------------------------------------------------------- the runs
@dataclass(frozen=True)
class Run:
    """One training, or a chain of them."""

    part: str
    arm: str
    seed: int

    def rows(self, sizes: Sizes, data: Path, tell: Callable[..., None]) -> None:
        """Carry it out in this process."""
        with tempfile.TemporaryDirectory() as scratch:
            PARTS[self.part](Setting(self, sizes, data, scratch, tell))


@dataclass(frozen=True)
class Setting:
    """A run and what it needs."""

    run: Run
    sizes: Sizes
    data: Path
    scratch: str
    tell: Callable[..., None]

    def clips(self, split: str, only: int | None = None) -> Clips:
        """Of `motion`."""
        count = self.sizes.tests if split == "test" else self.sizes.clips
        return Clips(Films("motion", split, count), self.data, only)

    def train(
        self,
        model: nn.Module,
        steps: int,
        *,
        stage: str = "training",
        data: Clips | None = None,
        test: Clips | None = None,
        objective: Callable[[Any], Any] | None = None,
        **changes: Any,
    ) -> None:
        """Train with the package's trainer; rows are told."""
        labelled = stage != "pre-training"
        if not labelled:
            changes |= {"do_eval": False, "eval_strategy": "no"}
        args = settings(self.sizes, self.scratch, steps, self.run.seed, **changes)
        trainer = VideoMambaTrainer(
            model,
            args,
            (objective or (lambda made: Classification(made, model.config)))(args),
            self.clips("train") if data is None else data,
            (test or self.clips("test")) if labelled else None,
            callbacks=[Told(self.tell, stage)],
            compute_metrics=accuracy,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def run_scan(now: Setting) -> None:
    """From nothing in an order of scanning."""
    released = now.run.arm == RELEASED
    order = "spatial_first" if released else now.run.arm
    now.train(classifier(config_of(now.sizes, released, scan_order=order), now.run.seed, released), now.sizes.steps)


def run_teacher(now: Setting) -> None:
    """The teachers of `distil` (a small VideoMamba) and `masked` (a CLIP), kept beside the clips."""
    if now.run.arm == "clip":
        train_clip(now)
        return
    model = classifier(config_of(now.sizes, hidden_size=now.sizes.teacher_width), now.run.seed)
    few = now.run.arm.endswith("few clips")
    now.train(model, now.sizes.steps, data=now.clips("train", now.sizes.few if few else None))
    keep(model, now.data / now.run.arm)


def keep(model: Any, folder: Path) -> None:
    """Save a teacher for the runs that wait for it."""
    model.save_pretrained(folder)
    (folder / "whole").touch()


def kept(folder: Path) -> Path:
    """The folder of a teacher, once it is there.

    Raises:
        TimeoutError: it does not come.
    """
    until = time.monotonic() + 300
    while not (folder / "whole").exists():
        if time.monotonic() > until:
            raise TimeoutError(f"{folder} does not come: do --parts teacher with this --data")
        time.sleep(0.2)
    return folder


def run_distil(now: Setting) -> None:
    """Few clips, with and without the teacher."""
    student: nn.Module = classifier(config_of(now.sizes), now.run.seed)
    data, objective, changes = now.clips("train", now.sizes.few), None, {}
    if now.run.arm != "alone":
        folder = now.data / f"smaller of {'all' if now.run.arm.endswith('all clips') else 'few'} clips"
        teacher = frozen(VideoMambaForVideoClassification.from_pretrained(kept(folder)).videomamba)
        student = DistilledClassifier(student, teacher.config)
        changes = {"distillation_until": 0.5} if now.run.arm.endswith("half of the steps") else {}

        def objective(args: Any) -> Distillation:
            return Distillation(args, student.config, teacher)

    now.train(student, now.sizes.steps, data=data, objective=objective, **changes)


def run_masked(now: Setting) -> None:
    """Pre-training with a mask and fine-tuning on few clips; or from nothing."""
    sizes, few = now.sizes, now.clips("train", now.sizes.few)
    model = classifier(config_of(sizes), now.run.seed)
    steps = sizes.fine_tuning
    if now.run.arm in MASKS:
        clip = CLIPVisionModelWithProjection.from_pretrained(kept(now.data / "clip"))
        masked = MaskedVideoMamba(model.videomamba, clip.config.projection_dim, 1, True)
        now.train(
            *(masked, sizes.pretraining), stage="pre-training", mask=now.run.arm, mask_ratio=0.75,
            objective=lambda args: MaskedAlignment(args, model.config, ClipTeacher(clip, 1)),
        )  # fmt: skip
        model.requires_grad_(True)
    elif now.run.arm == "from nothing for all steps":
        steps += sizes.pretraining
    now.train(model, steps, stage="fine-tuning", data=few)


def run_count(now: Setting) -> None:
    """`count` in longer and longer films, then the longest ones in fewer and fewer frames."""
    counts, model = now.sizes.frames, None
    for seconds, frames in [*zip(counts, counts, strict=True), *((counts[-1], count) for count in counts[-2::-1])]:
        data, test = (Clips(films, now.data, frames=frames) for films in count_films(now.sizes, seconds))
        steps = now.sizes.stage
        if model is None:
            steps, model = now.sizes.begin, classifier(config_of(now.sizes, num_frames=frames), now.run.seed)
        else:
            weights = model.videomamba.state_dict()
            config = resize_clips(model.config, weights, frames, SIDE, 1)
            resized = VideoMambaForVideoClassification(
                VideoMambaConfig.from_dict({**config.to_dict(), "num_labels": 4})
            )
            resized.videomamba.load_state_dict(weights)
            resized.head.load_state_dict(model.head.state_dict())
            model = resized
        told = replace(now, tell=lambda frames=frames, **row: now.tell(**row, frames=frames))
        told.tell(stage=f"seen of {seconds} s", step=0, steps=0, accuracy=test.shown())
        often = {"logging_steps": max(1, steps // 4), "eval_steps": max(1, steps // 4)}
        size, rate = now.sizes.count_batch // (2 if frames > 64 else 1), now.sizes.count_rate
        told.train(
            *(model, steps), stage=f"{seconds} s", data=data, test=test, **often,
            per_device_train_batch_size=size, per_device_eval_batch_size=size, learning_rate=rate,
        )  # fmt: skip


def count_films(sizes: Sizes, seconds: int) -> tuple[Films, Films]:
    """For training (of short ones up to four times as many) and for tests."""
    more = min(4, sizes.frames[-1] // seconds)
    return Films("count", "train", more * sizes.films, seconds), Films("count", "test", sizes.tests // 2, seconds)


RELEASED = "spatial_first as released"
PARTS: dict[str, Callable[[Setting], None]] = {
    "teacher": run_teacher,
    "scan": run_scan,
    "distil": run_distil,
    "masked": run_masked,
    "count": run_count,
}
ARMS: dict[str, Sequence[str]] = {
    "teacher": ("clip", "smaller of all clips", "smaller of few clips"),
    "scan": (*SCAN_ORDERS, RELEASED),
    "masked": ("from nothing", *MASKS, "from nothing for all steps"),
    "distil": ("alone", "teacher of the same clips", "the same for half of the steps", "teacher of all clips"),
    "count": ("all",),
}


def train_clip(now: Setting) -> None:
    """A small CLIP of transformers, on frames of the training clips and sentences about them; the half that sees is
    kept. The row's accuracy: how often, among 64 unseen frames, a frame's own sentence is nearest."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(now.run.seed)
    width, layers = now.sizes.width, max(1, now.sizes.layers - 1)
    own = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "num_attention_heads": 4}
    end = _WORDS.index("end")
    ends = {"bos_token_id": 0, "eos_token_id": end, "pad_token_id": end}
    text = {**own, **ends, "vocab_size": len(_WORDS), "max_position_embeddings": _LONGEST_SENTENCE}
    vision = {**own, "image_size": SIDE, "patch_size": PATCH}
    config = CLIPConfig(text_config=text, vision_config={**vision, "projection_dim": width}, projection_dim=width)
    clip = CLIPModel(config).to(device)
    data, test = now.clips("train"), now.clips("test")
    rng, batch, steps = np.random.default_rng(0), 8 * now.sizes.batch, now.sizes.clip_steps
    looks = VideoMambaConfig(image_mean=PIXEL_MEAN, image_std=PIXEL_STD)

    def scores(clips: Clips, count: int) -> torch.Tensor:
        rows, frames = rng.integers(len(clips), size=count), rng.integers(8, size=count)
        pixels = torch.from_numpy(clips.pixels[rows, frames])
        pixels = normalise(pixels[:, None].to(device), looks, torch.empty(0, device=device))[:, 0]
        words = torch.from_numpy(clips.facts[rows, frames]).to(device)
        return clip(input_ids=words, pixel_values=pixels).logits_per_image

    optimizer = torch.optim.AdamW(clip.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps + 1)
    told = Told(now.tell, "contrast")
    for step in range(1, steps + 1):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            found = scores(data, batch)
        target = torch.arange(len(found), device=device)
        loss = (F.cross_entropy(found.float(), target) + F.cross_entropy(found.float().T, target)) / 2
        loss.backward()
        nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % max(1, steps // 4) == 0:
            with torch.no_grad():
                hits = [(scores(test, 64).argmax(1).cpu() == torch.arange(64)).float().mean() for _ in range(8)]
            spent = 1e3 * (time.monotonic() - told.begun) / step
            about = {"step": step, "steps": steps, "loss": loss.item(), "milliseconds": spent}
            now.tell(stage="contrast", **about, accuracy=float(np.mean(hits)))
    vision_config = config.vision_config
    seeing = CLIPVisionModelWithProjection(vision_config)
    seeing.load_state_dict({name: value for name, value in clip.state_dict().items() if name in seeing.state_dict()})
    keep(seeing, now.data / "clip")


# --------------------------------------------------------------------------------------------------- the cost
def measure_cost(sizes: Sizes, smoke: bool, _: Any) -> Iterator[dict[str, Any]]:
    """Time and peak memory of forward and backward of masked pre-training (student alone) against the share that is
    hidden; memory above weights and pixels. M on 32 clips of 8 frames of 224 pixels; on a CPU the first four blocks of
    Ti on two clips of 112 pixels, with the most that the process held so far."""
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    batch = 32 if cuda else 2
    config = VideoMambaConfig.preset("m", num_frames=8)
    if not cuda:
        config = config_of(sizes) if smoke else VideoMambaConfig(num_frames=8, num_hidden_layers=4, image_size=112)
    model = MaskedVideoMamba(VideoMambaModel(config), 64, 1, True).to(device)
    frames, places = config.grid
    pixels = torch.randn(batch, frames, 3, config.image_size, config.image_size, device=device)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for ratio in (0.9, 0.8, 0.65, 0.5, 0.0):
        shown = torch.rand(batch, frames * places).argsort(1)[:, : round(frames * places * (1 - ratio))]
        shown = shown.sort(1).values.to(device)

        def step(shown: torch.Tensor = shown) -> None:
            with torch.autocast(device, torch.bfloat16, enabled=cuda):
                model(pixels, shown).float().pow(2).mean().backward()

        times, before = [], 0
        for _ in range(6 if cuda else 2):
            model.zero_grad(set_to_none=False)
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            begun = time.perf_counter()
            step()
            if cuda:
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - begun))
        held = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)
        gb = (torch.cuda.max_memory_allocated() - before if cuda else held) / 1e9
        yield {
            "arm": f"{ratio:.2f} hidden",
            "stage": f"size M, {batch} clips" if cuda else f"{len(model.videomamba.layers)} blocks, {batch} clips",
            "milliseconds": float(np.median(times[len(times) // 2 :])),
            "gb": gb,
            "frames": frames,
        }


def _write_film(folder: Path, index: int) -> None:
    world = build_world(video_seed("train", index), 10, WorldSettings())
    renderer = WorldRenderer(world, 256)
    seconds = (renderer.frames([second + n / 30 for n in range(30)]) for second in range(10))
    write_video(folder / f"{index}.mp4", seconds, fps=30)


def measure_waiting(_: Sizes, smoke: bool, workers: ProcessPoolExecutor) -> Iterator[dict[str, Any]]:
    """The recipe of Kinetics on films that are decoded and augmented while it trains, in one epoch; without the first
    third of the steps, whose clips were fetched while the first one was waited for."""
    cuda = torch.cuda.is_available()
    count, steps, batch = (64, 36, 64) if cuda else (8, 6, 2)
    with tempfile.TemporaryDirectory() as folder:
        list(workers.map(_write_film, [Path(folder)] * count, range(count)))
        rows = "".join(f"{n % count}.mp4,{n % 4}\n" for n in range(steps * batch))
        Path(folder, "train.csv").write_text(rows, encoding="utf-8")
        processes = min(12, (os.cpu_count() or 2) - 1)  # 12 is the recipe's own
        given = [f"data={folder}/train.csv", f"output_dir={folder}/run", f"max_steps={steps}"]
        given += [f"dataloader_num_workers={processes}", "size=ti", "logging_steps=1", "save_strategy=no"]
        given += ["report_to=none", "disable_tqdm=true", f"global_batch_size={batch}"]
        given += [f"per_device_train_batch_size={batch}", *([] if cuda else ["use_cpu=true"])]
        small = {"hidden_size": 32, "num_hidden_layers": 2} if smoke else None
        content = recipe_content("videomamba/k400", given) | {"model_config": small}
        trainer = build_trainer(*build_recipe(content))
        trainer.remove_callback(PrinterCallback)
        item = trainer.train_dataset.__getitem__
        item(0)
        begun, some = time.process_time(), 16
        for row in range(some):
            item(row)
        yield {
            "arm": "a video's two clips, CPU time",
            "stage": "decoding",
            "milliseconds": 1e3 * (time.process_time() - begun) / some,
        }
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "data_wait_share" in entry][steps // 3 :]
        seconds = [2 * batch / entry["clips_per_second"] for entry in logs]
        waited = sum(each * entry["data_wait_share"] for each, entry in zip(seconds, logs, strict=True))
        row = {"arm": f"{processes} processes", "stage": "step", "steps": steps}
        row |= {"milliseconds": 1e3 * sum(seconds) / len(seconds), "waiting": waited / sum(seconds)}
        yield {**row, "frames": 8}


# What is measured with nothing beside it.
ALONE = {"cost": measure_cost, "waiting": measure_waiting}


def about() -> dict[str, Any]:
    """What all rows say."""
    return {"hardware": hardware("cuda" if torch.cuda.is_available() else "cpu"), "date": datetime.date.today()}


def add_row(path: Path, row: dict[str, Any]) -> dict[str, Any]:
    """Write what was measured to the table; numbers rounded as there."""
    rounded = {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}
    append_rows(path, [{**about(), **rounded}], FIELDS)
    return rounded


# ------------------------------------------------------------------------------------------ many runs at once
def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(tasks: Any, results: Any, sizes: Sizes, data: Path) -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()  # also where the parent is killed
    while (run := tasks.get()) is not None:
        about = {"part": run.part, "arm": run.arm, "seed": run.seed}
        try:
            run.rows(sizes, data, lambda about=about, **row: results.put({**about, **row}))
        except Exception as error:
            results.put({**about, "failed": f"{type(error).__name__}: {error}"})
        results.put({**about, "done": True})


def finished(path: Path) -> set[Run]:
    """Runs that are complete in the table; rows of others are taken out of it."""
    if not path.exists():
        return set()
    rows = all_rows(path)
    done = {Run(row["part"], row["arm"], int(row["seed"])) for row in rows if row["stage"] == "complete"}
    kept = [row for row in rows if Run(row["part"], row["arm"], int(row["seed"])) in done]
    whole = {run.part for run in done} & ALONE.keys()
    kept = [row for row in rows if row["part"] in whole] + [row for row in kept if row["part"] not in whole]
    write_rows(path, kept, FIELDS)
    return done


def carry_out(runs: Sequence[Run], sizes: Sizes, data: Path, path: Path, at_once: int) -> None:
    """Do `runs`, several at once, the first ones first; rows are added to the table as they come."""
    context = get_context("spawn")
    tasks, results = context.Queue(), context.Queue()
    workers = [
        context.Process(target=_work, args=(tasks, results, sizes, data)) for _ in range(min(at_once, len(runs)))
    ]
    for task in [*runs, *[None] * len(workers)]:
        tasks.put(task)
    for worker in workers:
        worker.start()
    begun, left, failed = time.monotonic(), len(runs), set()
    while left:
        try:
            row = results.get(timeout=5)
        except queue.Empty:
            if any(worker.is_alive() for worker in workers):
                continue
            raise SystemExit("the processes ended before the runs did: look at their messages above") from None
        run = Run(row["part"], row["arm"], row["seed"])
        if "failed" in row:
            failed.add(run)
            print(f"{run}: {row['failed']}", file=sys.stderr, flush=True)
            continue
        if row.pop("done", False):
            left -= 1
            row |= {"stage": "complete", "step": 0, "steps": 0}
            if run in failed:
                continue
        print(f"{time.monotonic() - begun:.0f} s", *add_row(path, row).values(), flush=True)
    for worker in workers:
        worker.join()


# --------------------------------------------------------------------------------------- the plot and the table
def all_rows(path: Path) -> list[dict[str, str]]:
    """The table."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def ended(path: Path) -> list[dict[str, str]]:
    """Rows with an accuracy, of trainings that came to their end."""
    rows = [row for row in all_rows(path) if row["accuracy"]]

    def training(row: dict[str, str]) -> tuple[str, ...]:
        return row["part"], row["arm"], row["seed"], row["stage"], row["frames"]

    whole = {training(row) for row in rows if row["step"] == row["steps"]}
    return [row for row in rows if training(row) in whole]


def summary(path: Path) -> str:
    """Markdown: the last accuracy of what came to its end and that halfway, mean of the seeds and their spread."""
    rows = [row for row in ended(path) if not row["stage"].startswith("seen")]
    found: dict[tuple[str, ...], dict[str, dict[int, float]]] = {}
    for row in rows:
        arm = f"{row['stage']} in {row['frames']} frames" if row["frames"] else row["arm"]
        runs = found.setdefault((row["part"], arm, row["steps"]), {})
        runs.setdefault(row["seed"], {})[int(row["step"])] = float(row["accuracy"])
    lines = ["| part | | steps | halfway | at the end | seeds |", "| --- | --- | --- | --- | --- | --- |"]
    for (part, arm, steps), runs in found.items():
        cells = []
        for at in (0.5, 1.0):
            upto = [[step for step in run if step <= at * int(steps)] or [min(run)] for run in runs.values()]
            last = [run[max(some)] for run, some in zip(runs.values(), upto, strict=True)]
            cells.append(f"{np.mean(last):.1%} ({min(last):.1%} to {max(last):.1%})")
        lines.append(f"| {part} | {arm} | {steps} | {cells[0]} | {cells[1]} | {len(runs)} |")
    return "\n".join(lines)


def plot(path: Path, target: Path) -> None:
    """Curves of accuracy, the mean of the seeds with their spread, one picture a part."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = ended(path)
    parts = [part for part in ARMS if part not in ("teacher", "count") and any(row["part"] == part for row in rows)]
    pictures = [(part, "step") for part in parts]
    if longest := max((int(row["frames"]) for row in rows if row["frames"]), default=0):
        pictures += [("count", "seconds of a film, a frame each"), ("count", f"frames of a film of {longest} seconds")]
    cost = [row for row in all_rows(path) if row["part"] == "cost" and row["gb"] and "CPU" not in row["hardware"]]
    columns = (len(pictures) + bool(cost) + 1) // 2
    figure, axes = pyplot.subplots(2, columns, figsize=(4.6 * columns, 7.6))
    for axis in axes.flat[len(pictures) + bool(cost) :]:
        axis.axis("off")
    if cost:
        axis = axes.flat[len(pictures)]
        seen = [100 * (1 - float(row["arm"].split()[0])) for row in cost]
        for name, of, each in (("ms a step", "milliseconds", axis), ("GB", "gb", axis.twinx())):
            dashed = {"color": "tab:orange", "linestyle": "--"} if of == "gb" else {"color": "tab:blue"}
            each.plot(seen, [float(row[of]) for row in cost], marker=".", label=name, **dashed)
            each.set_ylim(bottom=0)
            each.set_ylabel(name)
            each.legend(fontsize=7, loc="upper left" if of == "gb" else "lower right")
        axis.set_title(f"masked pre-training, {cost[0]['stage']}")
        axis.set_xlabel("% of the patches are computed")
    for axis, (part, across) in zip(axes.flat, pictures, strict=False):
        groups: dict[str, dict[int, list[float]]] = {}
        for row in rows:
            if row["part"] != part:
                continue
            arm, at = row["arm"], int(row["step"])
            if part == "count":
                at, seconds = int(row["frames"]), int(row["stage"].split()[-2])
                if row["step"] != row["steps"] or seconds != (at if across.startswith("seconds") else longest):
                    continue
                arm = "films that show all" if row["stage"].startswith("seen") else "accuracy"
            groups.setdefault(arm, {}).setdefault(at, []).append(float(row["accuracy"]))
        for arm in sorted(groups):
            at = sorted(groups[arm])
            values = [groups[arm][each] for each in at]
            (line,) = axis.plot(at, [np.mean(each) for each in values], marker=".", label=arm)
            low, high = ([pick(each) for each in values] for pick in (min, max))
            axis.fill_between(at, low, high, color=line.get_color(), alpha=0.15)
        if part == "count":
            axis.set_xscale("log", base=2)
            ticks = sorted({at for group in groups.values() for at in group})
            axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set_xlabel(across)
        axis.set_ylabel("accuracy on unseen clips")
        axis.set_title(part)
        axis.axhline(0.25, color="grey", linewidth=0.8, linestyle=":")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


def films_needed(parts: Sequence[str], sizes: Sizes) -> list[Films]:
    """All clips that `parts` look at."""
    needed = []
    if set(parts) & {"teacher", "scan", "distil", "masked"}:
        needed += [Films("motion", "train", sizes.clips), Films("motion", "test", sizes.tests)]
    for seconds in sizes.frames if "count" in parts else ():
        needed += count_films(sizes, seconds)
    return needed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("videomamba_training.csv"), help="table to add to")
    parser.add_argument("--data", type=Path, help="folder of the drawn clips and the teachers (default: a fresh one)")
    parser.add_argument("--parts", default="cost,waiting,teacher,scan,distil,masked,count")
    parser.add_argument("--only", default="", help="of the parts, only what is called so: tube,random")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=12, help="runs at the same time on the GPU")
    parser.add_argument("--smoke", action="store_true", help="tiny models and few steps, to see that it runs")
    parser.add_argument("--plot", type=Path, help="draw --out here, print its end, measure nothing")
    for name in (
        "width",
        "layers",
        "steps",
        "few",
        "pretraining",
        "fine_tuning",
        "begin",
        "stage",
        "films",
        "clips",
        "batch",
        "count_batch",
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"default {getattr(Sizes(), name)}")
    parser.add_argument("--learning-rate", type=float, help=f"default {Sizes().learning_rate}")
    parser.add_argument("--frames", type=lambda text: tuple(map(int, text.split(","))), help="default 8,16,...,256")
    given = parser.parse_args()
    if given.plot:
        plot(given.out, given.plot)
        print(summary(given.out))
        return
    base = SMOKE if given.smoke else Sizes()
    changed = {name: value for name, value in vars(given).items() if hasattr(base, name) and value is not None}
    sizes = replace(base, **changed)
    parts = [part for part in given.parts.split(",") if part]
    if unknown := set(parts) - {*PARTS, *ALONE}:
        raise SystemExit(f"--parts {', '.join(sorted(unknown))}: use some of {', '.join([*ALONE, *PARTS])}")
    done = finished(given.out)
    with tempfile.TemporaryDirectory() as fresh:
        data = given.data or Path(fresh)
        data.mkdir(parents=True, exist_ok=True)
        begun = time.monotonic()
        # forked, since each would read torch for seconds otherwise; they draw and write files, nothing else
        with ProcessPoolExecutor(min(os.cpu_count() or 1, 12), get_context("fork")) as workers:
            for part in ALONE.keys() & set(parts):
                if Run(part, "all", 0) not in done:
                    for row in [*ALONE[part](sizes, given.smoke, workers), {"arm": "all", "stage": "complete"}]:
                        print(*add_row(given.out, {"part": part, "seed": 0, **row}).values(), flush=True)
            for films in films_needed(parts, sizes):
                render(films, data, workers)
        print(f"clips drawn in {time.monotonic() - begun:.0f} s", flush=True)
        # teachers first, for which others wait; then seed after seed, so that a cut leaves whole comparisons
        teachers = [Run("teacher", arm, 0) for arm in ARMS["teacher"]] if "teacher" in parts else []
        others = [
            Run(part, arm, seed)
            for seed in range(given.seeds) for part in parts if part in PARTS and part != "teacher"
            for arm in ARMS[part] if not given.only or arm in given.only.split(",")
        ]  # fmt: skip
        waiting = {"clip" if run.part == "masked" else run.part for run in others if run not in done}
        gone = [  # of a table begun elsewhere
            run
            for run in teachers
            if not (data / run.arm / "whole").exists() and (run.arm if run.arm == "clip" else "distil") in waiting
        ]
        if left := [run for run in [*teachers, *others] if run not in done or run in gone]:
            carry_out(left, sizes, data, given.out, given.at_once)


if __name__ == "__main__":
    main()
