"""Train a small VideoMamba classifier on the rendered world: what can only be told from several frames.

    python -m video_ma2mba.world.classifier --out DIR --max-seconds 150                                   # a GPU
    python -m video_ma2mba.world.classifier --out DIR --size tiny --max-steps 20 --batch 8 --videos 100   # a CPU

Every video shows two things, of which one moves and one rests. Its labels, one of each kind: the direction of what
moves (four), whether it or what rests comes first (two), and the shape of what moves (eight; it can only be named by
who saw what moves). Training is transformers' `Trainer` with binary cross-entropy over all labels; beside it a linear
layer, thrown away afterwards, learns to say of every patch which shape stands there and how it moves: the class token
alone, one of hundreds, learns slowly to find what it has to tell. Every training video is drawn once and kept in a
file while the run lasts, since drawing takes longer than learning; half the times it is seen in a mirror. In the end
`--out` holds `accuracy.csv` (unseen videos of the test split, per kind, beside chance) and the classifier in `model/`,
which `video-ma2mba classify` and the auto classes load.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import EvalPrediction, HfArgumentParser, Trainer, TrainingArguments, set_seed

from ..hub_cards.videomamba_card import videomamba_card
from ..modeling_video_ma2mba.modeling_videomamba import VideoMambaForVideoClassification, parameter_groups
from ..trainer.training_clock import ENDLESS, ClockCallback, TrainingClock
from .batches import imitate_mp4
from .clip_encoders import FRAME, SECONDS, clip_processor, eager_config, loud_positions_
from .render import WorldRenderer
from .tower import IGNORED, cell_labels
from .world import COLOURS, DIRECTIONS, SHAPES, World, WorldSettings, build_world, video_seed

ORDER = ("what moves comes first", "what rests comes first")
LABELS: dict[str, tuple[str, ...]] = {
    "direction": tuple(f"moves {way}" for way in DIRECTIONS),
    "order": ORDER,
    "shape": tuple(f"a {shape} moves" for shape in SHAPES),
}
SIZES = {
    "small": {"hidden_size": 128, "num_hidden_layers": 8},
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}
_SETTINGS = WorldSettings(min_objects=2, max_objects=2, card=False)
MOTIONS = ("nothing", "rests", *DIRECTIONS)
_EMPTY = 0.15  # weight of a patch that shows nothing, as most do
_TRIES = 64  # worlds until one shows what is asked; about every third does


def moving_world(split: str, index: int, seed: int = 0) -> World:
    """Video `index` of a split: the first of its worlds with one thing that moves, one that rests, and different
    arrivals."""
    for attempt in range(_TRIES):
        world = build_world(video_seed(split, index * _TRIES + attempt, seed), SECONDS, _SETTINGS)
        arrivals = {thing.start for thing in world.things}
        if len(arrivals) == 2 and sum(thing.direction is not None for thing in world.things) == 1:
            return world
    raise ValueError(f"video {index} of {split}: no world in {_TRIES} shows one thing that moves and one that rests")


def world_labels(world: World) -> dict[str, int]:
    """Number of the right label of each kind in `LABELS`."""
    moving, resting = sorted(world.things, key=lambda thing: thing.direction is None)
    assert moving.direction is not None
    return {
        "direction": DIRECTIONS.index(moving.direction),
        "order": int(resting.start < moving.start),
        "shape": SHAPES.index(moving.shape),
    }


def patch_labels(world: World, moments: list[float], side: int) -> np.ndarray:
    """What `side` x `side` patches of the frames at `moments` show, int64 (frames, patches, 2): the shape, 0 for none,
    and the number in `MOTIONS`; IGNORED where a thing only touches a patch."""
    looks = np.stack([cell_labels(world, moment, side)[0][:, :2] for moment in moments])
    motions = np.minimum(looks[..., 0], 1)  # nothing, or IGNORED, or rests
    for thing in world.things:
        if thing.direction is not None:
            own = (list(COLOURS).index(thing.colour) + 1, SHAPES.index(thing.shape) + 1)
            motions[(looks == own).all(-1)] = MOTIONS.index(thing.direction)
    return np.stack([looks[..., 1], motions], axis=-1)


class MovingThings(Dataset[dict[str, torch.Tensor]]):
    """Clips, uint8 (SECONDS, 3, FRAME, FRAME), with their labels as zeros and ones, float32 (14,), and `patches`, what
    `side` x `side` patches of each frame show (`patch_labels`).

    In training frames come from a random moment of each second and half the clips look as if read from an mp4 file;
    else from the middle of each second.
    """

    def __init__(self, split: str, size: int, seed: int = 0, side: int = 8) -> None:
        self.split, self.size, self.seed, self.side = split, size, seed, side

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        world = moving_world(self.split, index, self.seed)
        rng = random.Random(f"moments {world.seed}")
        training = self.split == "train"
        moments = [second + (rng.random() if training else 0.5) for second in range(SECONDS)]
        frames = WorldRenderer(world, FRAME).frames(moments)
        if training and rng.random() < 0.5:
            frames = imitate_mp4(frames, index % 2**32)
        labels = [np.eye(len(LABELS[kind]), dtype=np.float32)[number] for kind, number in world_labels(world).items()]
        return {
            "pixel_values": torch.from_numpy(frames).permute(0, 3, 1, 2),
            "labels": torch.from_numpy(np.concatenate(labels)),
            "patches": torch.from_numpy(patch_labels(world, moments, self.side)),
        }


class KeptClips(Dataset[dict[str, torch.Tensor]]):
    """The same as `clips`, each drawn when it is first asked for and read from `file` afterwards, also by other
    workers; half the times it is asked for left and right have changed places.

    The file is as large as all clips, about 100 kB each, but takes room on the disk only for those that were drawn.
    """

    def __init__(self, clips: MovingThings, file: Path) -> None:
        self.clips, self.file = clips, file
        fields = [(name, value.numpy().dtype, tuple(value.shape)) for name, value in clips[0].items()]
        self.row = np.dtype([*fields, ("drawn", np.bool_)])
        self.rows: np.ndarray | None = None  # opened by each worker for itself
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as opened:
            opened.truncate(len(clips) * self.row.itemsize)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if self.rows is None:
            self.rows = np.memmap(self.file, self.row, "r+", shape=len(self))
        row = self.rows[index]
        if not row["drawn"]:
            for name, value in self.clips[index].items():
                row[name] = value.numpy()
            row["drawn"] = True  # last: another worker may look
        item = {name: torch.from_numpy(row[name].copy()) for name in self.row.names if name != "drawn"}
        return mirrored(item) if random.random() < 0.5 else item


def mirrored(item: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An item of `MovingThings` as a mirror shows it. All shapes look the same there."""
    side = math.isqrt(item["patches"].shape[1])
    patches = item["patches"].unflatten(1, (side, side)).flip(2).flatten(1, 2)
    left, right = (MOTIONS.index(way) for way in ("left", "right"))
    motions = patches[..., 1]
    turned = torch.where(motions == left, right, torch.where(motions == right, left, motions))
    labels = item["labels"].clone()
    labels[:2] = labels[:2].flip(0)  # left and right
    return {
        "pixel_values": item["pixel_values"].flip(-1),
        "labels": labels,
        "patches": torch.stack([patches[..., 0], turned], dim=-1),
    }


class TaughtClassifier(nn.Module):
    """What is trained: the classifier, and a reading of every patch."""

    def __init__(self, model: VideoMambaForVideoClassification) -> None:
        super().__init__()
        self.model = model
        self.reading = nn.Linear(model.config.hidden_size, len(SHAPES) + 1 + len(MOTIONS))

    def forward(self, pixel_values: Tensor, labels: Tensor, patches: Tensor) -> dict[str, Tensor]:
        """Loss and logits (B, 14) of a batch of `MovingThings`: binary cross-entropy summed over the labels of a clip,
        and the cross-entropies of its patches."""
        found = self.model.videomamba(pixel_values)
        logits = self.model.head(found.pooler_output)
        loss = F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="sum") / len(labels)
        said = self.reading(found.last_hidden_state[:, 1:]).float().flatten(0, 1)
        for each, wanted in zip(said.split((len(SHAPES) + 1, len(MOTIONS)), -1), patches.flatten(0, 2).T, strict=True):
            weight = torch.ones(each.shape[-1], device=each.device)
            weight[0] = _EMPTY
            loss = loss + F.cross_entropy(each, wanted, weight, ignore_index=IGNORED)
        return {"loss": loss, "logits": logits}


def accuracy_per_kind(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Share of videos, of scores and labels (videos, 14), whose highest score within a kind is the right label."""
    found, first = {}, 0
    for kind, names in LABELS.items():
        own = slice(first, first + len(names))
        found[kind] = float((scores[:, own].argmax(1) == labels[:, own].argmax(1)).mean())
        first += len(names)
    return found


def _metrics(evaluated: EvalPrediction) -> dict[str, float]:
    return accuracy_per_kind(evaluated.predictions, evaluated.label_ids)


@dataclasses.dataclass
class ClassifierTraining:
    """Everything that decides a run."""

    out: str = dataclasses.field(metadata={"help": "folder of the run"})
    size: str = dataclasses.field(default="small", metadata={"help": f"one of {', '.join(SIZES)}"})
    scan_order: str = dataclasses.field(default="temporal_first", metadata={"help": "of the model's tokens"})
    patch: int = dataclasses.field(default=16, metadata={"help": "pixels of a patch's side"})
    start_from: str | None = dataclasses.field(
        default=None, metadata={"help": "folder of a classifier of an earlier run to go on from, whose sizes it keeps"}
    )
    max_steps: int = dataclasses.field(default=0, metadata={"help": "length of training in optimizer steps"})
    max_seconds: float = dataclasses.field(default=0.0, metadata={"help": "the same by the clock"})
    batch: int = dataclasses.field(default=128, metadata={"help": "videos of an optimizer step"})
    learning_rate: float = dataclasses.field(default=1e-3, metadata={"help": "highest learning rate"})
    weight_decay: float = dataclasses.field(default=0.05, metadata={"help": "of matrices"})
    warmup_steps: int = dataclasses.field(default=100, metadata={"help": "steps of warm-up"})
    videos: int = dataclasses.field(default=60_000, metadata={"help": "training videos, 100 kB of disk each"})
    test_videos: int = dataclasses.field(default=2000, metadata={"help": "unseen videos to measure accuracy on"})
    workers: int = dataclasses.field(default=14, metadata={"help": "processes that draw videos"})
    seed: int = dataclasses.field(default=0, metadata={"help": "of weights and training videos"})

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"size={self.size!r}: must be one of {', '.join(SIZES)}.")
        if self.max_steps <= 0 and self.max_seconds <= 0:
            raise ValueError("give the length of training: max_steps, max_seconds or both.")


def train(training: ClassifierTraining) -> dict[str, float]:
    """Run a training; returns the accuracy per kind on unseen videos."""
    out = Path(training.out)
    cuda = torch.cuda.is_available()
    set_seed(training.seed)
    names = [name for each in LABELS.values() for name in each]
    config = eager_config(
        **SIZES[training.size],
        scan_order=training.scan_order,
        patch_size=training.patch,
        problem_type="multi_label_classification",
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )
    if training.start_from is None:
        model = VideoMambaForVideoClassification(config)
        loud_positions_(model.videomamba)
    else:
        model = VideoMambaForVideoClassification.from_pretrained(training.start_from, dtype=torch.float32)
        if model.config.label2id != config.label2id:
            raise ValueError(f"start_from={training.start_from!r}: it was trained for other labels than these.")
    taught, side = TaughtClassifier(model), FRAME // model.config.patch_size
    clock = TrainingClock(
        training.max_steps or None, training.max_seconds or None, training.warmup_steps, schedule="cosine"
    )
    optimizer = torch.optim.AdamW(
        parameter_groups(taught.to("cuda" if cuda else "cpu"), training.weight_decay),
        lr=training.learning_rate,
        betas=(0.9, 0.95),
        fused=cuda,
    )
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=training.max_steps or ENDLESS,
        per_device_train_batch_size=training.batch,
        per_device_eval_batch_size=training.batch,
        max_grad_norm=1.0,
        bf16=cuda,
        use_cpu=not cuda,
        logging_steps=100 if cuda else 1,
        save_strategy="no",
        dataloader_num_workers=training.workers,
        dataloader_persistent_workers=training.workers > 0,
        dataloader_pin_memory=cuda,
        report_to="none",
        disable_tqdm=True,
        seed=training.seed,
    )
    clips = KeptClips(MovingThings("train", training.videos, training.seed, side), out / "clips")
    trainer = Trainer(
        model=taught,
        args=arguments,
        train_dataset=clips,
        eval_dataset=MovingThings("test", training.test_videos, side=side),
        compute_metrics=_metrics,
        optimizers=(optimizer, LambdaLR(optimizer, clock)),
        callbacks=[ClockCallback(clock)],
    )
    try:
        trainer.train()
    finally:
        clips.file.unlink()
    measured = trainer.evaluate()
    found = {kind: measured[f"eval_{kind}"] for kind in LABELS}
    with (out / "accuracy.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("kind", "videos", "accuracy", "chance", "seed", "steps"))
        for kind, share in found.items():
            row = (kind, training.test_videos, f"{share:.4f}", f"{1 / len(LABELS[kind]):.4f}")
            writer.writerow((*row, training.seed, trainer.state.global_step))
    save(model, out / "model", training, trainer.state.global_step, found)
    return found


def save(
    model: VideoMambaForVideoClassification,
    folder: Path,
    training: ClassifierTraining,
    steps: int,
    accuracy: dict[str, float],
) -> None:
    """Write classifier, processor and card; weights in 16 bits where that costs no memory of the past."""
    for name, parameter in model.named_parameters():
        kept = "A_log" in name or "A_b_log" in name or parameter.ndim == 1
        parameter.data = parameter.data.to(torch.float32 if kept else torch.float16)
    model.config.dtype = torch.float32
    model.eval().save_pretrained(folder)
    clip_processor().save_pretrained(folder)
    rows = [f"| {kind} | {share:.1%} | {1 / len(LABELS[kind]):.1%} |" for kind, share in accuracy.items()]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    card = videomamba_card(
        model.config,
        sum(parameter.numel() for parameter in model.parameters()),
        classifier=True,
        title="What moves in the rendered world",
        license="apache-2.0",
        accuracy=f"{training.test_videos:,} unseen videos of the test split, the highest score within a kind:\n\n"
        "| kind | accuracy | chance |\n| --- | --- | --- |\n" + "\n".join(rows),
        recipe="Videos of eight seconds show two things, of which one moves: which way, whether it comes first, and "
        "what shape it has are the labels.\n\n```bash\n"
        f"python -m video_ma2mba.world.classifier --out DIR {_options(training, steps)}\n```\n\n"
        f"{steps:,} steps of {training.batch} videos, measured on {device} with torch {torch.__version__}.",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _options(training: ClassifierTraining, steps: int) -> str:
    """The command line that repeats a run in as many steps as it took, whatever the machine."""
    asked = dataclasses.replace(training, max_steps=steps, max_seconds=0.0)
    fields = (field for field in dataclasses.fields(asked) if field.name not in ("out", "workers"))
    values = ((field.name, field.default, getattr(asked, field.name)) for field in fields)
    return " ".join(f"--{name} {value}" for name, default, value in values if value != default)


if __name__ == "__main__":
    begun = time.monotonic()
    (settings,) = HfArgumentParser(ClassifierTraining).parse_args_into_dataclasses()
    for kind, share in train(settings).items():
        print(f"{kind}: {share:.1%} of unseen videos, chance {1 / len(LABELS[kind]):.1%}")
    print(f"{time.monotonic() - begun:.0f} s in all")
