"""Train the small model on the rendered world with `VideoMa2mbaTrainer`.

    python -m video_ma2mba.world.train --out DIR --max-seconds 900        # a GPU
    python -m video_ma2mba.world.train --out DIR --steps 20 --size tiny --frames 8..8   # a CPU, to see it run
    python -m video_ma2mba.world.train --out CLIPS --tower videomamba --max-seconds 900     # another vision tower
    python -m video_ma2mba.world.train --out LONG --start-from DIR/model --frames 64..2048   # longer videos

`--out` holds checkpoints while it trains, `training_log.csv`, `validation.csv`, and at the end `model/`, which
`from_pretrained` loads. The same command with `--resume` goes on after an interruption.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, TrainerCallback, TrainerControl, TrainerState, set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..modeling_video_ma2mba.modeling_video_ma2mba import VideoMa2mbaForConditionalGeneration
from ..modeling_video_ma2mba.recompute_plan import parse_bytes
from ..modeling_video_ma2mba.vision_features import encode_frames
from ..processing.frame_times import TIME_TOKENS
from ..trainer.parameter_groups import ORDER
from ..trainer.setting_names import BUNDLED
from ..trainer.training_clock import ENDLESS, TrainingClock
from ..trainer.training_config import VideoMa2mbaTrainingConfig
from ..trainer.video_trainer import VideoMa2mbaTrainer
from . import KINDS, WorldDataset, parse_frames
from .batches import SHORTER, WorldBatches, only_item
from .model import SIZES, TOWERS, fit_projector_, start_for_recall_, world_config, world_processor
from .questions import check_kinds
from .report import WorldReport
from .stretch import StretchedTrainer
from .tokenizer import build_world_tokenizer
from .tower import clips_of, take_tower_, tower_costs, train_tower

TIME_STAMPS = ("text", "learned")
"""How a model may read times."""
_SINGLE_PRECISION = ("A_log", "D", "dt_bias")  # what decides how long is remembered stays in fp32


def _option(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass
class WorldTraining:
    """Everything that decides a run."""

    out: str = dataclasses.field(metadata={"help": "folder of the run"})
    size: str = _option("bundled", f"one of {', '.join(SIZES)}")
    state: int | None = _option(None, "state size of each head of the language model; unset: the size's")
    head: int | None = _option(None, "channels of each head; fewer channels, more heads; unset: the size's")
    tower: str = _option("vit", f"vision tower, one of {', '.join(TOWERS)}")
    tower_from: str | None = _option(
        None, "trained model, or `bundled`, whose tower is taken instead of a first stage"
    )
    start_from: str | None = _option(None, "folder of a trained model to go on from: no first stage, its size")
    train_parts: str | None = _option(None, "parts that train, of lm, projector, vision; unset: all of them")
    memory_budget: str | None = _option(None, "GPU memory of a step above weights, such as 4GB; unset: what is free")
    steps: int | None = _option(None, "length of training in optimizer steps")
    max_seconds: float | None = _option(None, "length of training by the clock, over all resumed parts")
    stop_after: float | None = _option(None, "seconds after which this part saves and stops, to be resumed")
    resume: bool = _option(False, "go on from the last checkpoint in --out, if there is one")
    frames: str = _option("8..64", "shortest..longest video")
    ramp: float = _option(0.5, "share of training during which videos grow to their full length")
    ramp_from: int = _option(2, "frames of the longest videos when training begins")
    shorter: float = _option(
        SHORTER, "share of batches with videos below the shortest, so that they are not unlearned"
    )
    decay_from: float = _option(0.65, "share of training after which the learning rate falls")
    tower_seconds: float = _option(75.0, "length of the first stage, in which the vision tower learns to see")
    tower_steps: int | None = _option(None, "the same in optimizer steps")
    tower_frames: int = _option(1024, "frames of one optimizer step of the first stage")
    tower_rate: float = _option(1.5e-3, "highest learning rate of the first stage")
    tokens_per_batch: int = _option(32768, "tokens of one optimizer step, about, whatever the videos' length")
    questions: int = _option(12, "questions about each video, at most")
    kinds: str = _option(",".join(KINDS), "kinds of question, separated by commas")
    times_every: float | None = _option(
        None, "seconds between time stamps that the model reads; unset: as it does now"
    )
    times: str = _option("text", "how they are read: text or learned")
    begins: int = _option(0, "seconds at which videos may begin, as parts of longer ones, so that late times are seen")
    pace: int = _option(1, "most seconds between two frames, so that short videos span minutes; half keep to 1")
    variety: float = _option(0.0, "share of videos that are calm, of one or two things, or busy, of up to twelve")
    streams: float = _option(0.0, "share of videos that are streams without end, asked about the last minute")
    decoys: int = _option(0, "most cards of a video that cannot be read, beside the one that can; half have none")
    stretch: int = _option(
        0, "frames to which calm stretches of videos are lengthened in half of the batches (see stretch.py); 0: never"
    )
    learning_rate: float = _option(1.5e-3, "highest learning rate")
    weight_decay: float = _option(0.05, "of matrices")
    warmup_steps: int = _option(200, "steps of warm-up")
    eval_seconds: float = _option(60.0, "seconds of training between validations")
    eval_videos: int = _option(64, "validation videos of each of three lengths, seven questions each")
    save_seconds: float = _option(60.0, "seconds between checkpoints")
    workers: int = _option(14, "processes that draw videos")
    seed: int = _option(0, "of weights and data")
    dtype: str = _option("float16", "of the written model")

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"size={self.size!r}: must be one of {', '.join(SIZES)}.")
        if self.tower not in TOWERS:
            raise ValueError(f"tower={self.tower!r}: must be one of {', '.join(TOWERS)}.")
        self.frame_range = parse_frames(self.frames)
        for name in ("shorter", "variety", "streams"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be a share from 0 to 1.")
        for name in ("ramp", "decay_from"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(
                    f"{name}={getattr(self, name)}: must be a share of training, more than 0 and at most 1."
                )
        for name in ("state", "head", "steps", "tokens_per_batch", "questions", "eval_videos", "max_seconds"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name}={value}: must be more than 0.")
        for name in ("workers", "seed", "warmup_steps", "learning_rate", "begins"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be less than 0.")
        if self.head and 2 * SIZES[self.size].hidden % self.head:
            raise ValueError(f"head={self.head}: must divide {2 * SIZES[self.size].hidden}, the width of all heads.")
        for name, known in (("dtype", ("float16", "bfloat16", "float32")), ("times", TIME_STAMPS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)}: must be one of {', '.join(known)}.")
        if self.train_parts and (odd := set(self.train_parts.replace(" ", "").split(",")) - set(ORDER)):
            raise ValueError(f"train_parts={self.train_parts}: {', '.join(odd)} is none of {', '.join(ORDER)}.")
        if self.tower_from not in (None, BUNDLED) and not Path(str(self.tower_from)).is_dir():
            raise ValueError(f"tower_from={self.tower_from}: no such folder.")
        parse_bytes(self.memory_budget, "memory_budget")
        self.kind_names = check_kinds(self.kinds.split(","))


def train(training: WorldTraining) -> dict[int, dict[str, float]]:
    """Run or resume a training; returns the last validation accuracy per length and kind."""
    return train_world(training)[1]


def train_world(training: WorldTraining) -> tuple[VideoMa2mbaTrainer, dict[int, dict[str, float]]]:
    """`train`, and the trainer, which knows how it went."""
    out = Path(training.out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = get_last_checkpoint(str(out))
    if checkpoint and not training.resume:
        raise ValueError(f"{out} holds the checkpoints of an earlier run: add --resume or choose another --out.")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked
    set_seed(training.seed)
    cuda = torch.cuda.is_available()
    torch.backends.cuda.matmul.allow_tf32 = True

    tokenizer = build_world_tokenizer()
    model = _model(training, tokenizer).to("cuda" if cuda else "cpu")
    config = model.config
    exported_chunk = config.vision_chunk_frames
    config.vision_chunk_frames = 2048  # the small tower takes many frames at once
    if not checkpoint and not training.start_from:
        pretrain_tower(model, training)
    processor = world_processor(config, tokenizer)
    if training.times_every is not None:
        model.set_frame_times(processor, training.times, training.times_every)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {config.tokens_per_frame} tokens per frame")

    arguments = _arguments(training, cuda)
    progress, weights = torch.zeros(1).share_memory_(), torch.ones(len(training.kind_names)).share_memory_()
    done = int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0
    batches = WorldBatches(
        WorldDataset(
            "train",
            10**9,
            frames=training.frame_range,
            questions=2 * training.questions,  # of which a batch takes what its weights say
            kinds=training.kind_names,
            seed=training.seed,
            begins=training.begins,
            pace=training.pace,
            variety=training.variety,
            streams=training.streams,
            decoys=training.decoys,
        ),
        processor,
        training.tokens_per_batch,
        progress,
        weights,
        first_batch=done * 2,  # past everything that was drawn ahead before the interruption
        ramp=training.ramp,
        ramp_from=training.ramp_from,
        shorter=training.shorter,
        stretch=training.stretch,
    )
    validation = WorldDataset(
        "validation",
        training.eval_videos,
        frames=training.frame_range,
        questions=max(7, len(training.kind_names)),
        kinds=training.kind_names,
        seed=training.seed,
        begins=training.begins,
        pace=training.pace,
        variety=training.variety,
        decoys=training.decoys,
    )
    trainer = StretchedTrainer(
        model=model,
        args=arguments,
        train_dataset=batches,
        data_collator=only_item,
        processing_class=processor,
        data_name="the rendered world",
    )
    report = WorldReport(out, trainer.clock, processor, validation, weights, training.eval_seconds, cuda)
    trainer.add_callback(Curriculum(trainer.clock, progress))
    trainer.add_callback(report)
    if training.start_from and not checkpoint:
        report.measure(model, 0)  # what it cannot do yet comes more often from the first batch on
    trainer.train(resume_from_checkpoint=checkpoint)
    results = report.measure(model, trainer.state.global_step)
    config.vision_chunk_frames = exported_chunk
    export(model, tokenizer, out / "model", training.dtype)
    return trainer, results


def pretrain_tower(model: Any, training: WorldTraining) -> None:
    """The first stage, see `world/tower.py`, or the tower of another model; the projector is then scaled to what it
    gives."""
    if training.tower_from is not None:
        batch = take_tower_(model, training.tower_from, training.tower_frames, training.seed)
    else:
        batch = train_tower(
            model,
            seconds=training.tower_seconds,
            steps=training.tower_steps,
            frames_per_batch=training.tower_frames,
            workers=training.workers,
            seed=training.seed,
            rate=training.tower_rate,
        )
    with torch.no_grad():
        clips = clips_of(model.config, len(batch))
        fit_projector_(model, encode_frames(model.model.vision_tower, model.config, batch, clips))
    costs = ", ".join(f"{name} {value:,.0f}" for name, value in tower_costs(model, batch).items())
    parameters = sum(parameter.numel() for parameter in model.model.vision_tower.parameters())
    print(f"tower {training.tower}: {parameters:,} parameters, {costs}", flush=True)


def _model(training: WorldTraining, tokenizer: Any) -> VideoMa2mbaForConditionalGeneration:
    """A new model of the size asked for, or the trained one to go on from, in fp32."""
    if training.start_from is None:
        own = {name: value for name in ("state", "head") if (value := getattr(training, name)) is not None}
        size = dataclasses.replace(SIZES[training.size], **own)
        model = VideoMa2mbaForConditionalGeneration(world_config(size, tokenizer, training.tower))
        start_for_recall_(model)
        return model
    model = VideoMa2mbaForConditionalGeneration.from_pretrained(training.start_from, dtype=torch.float32)
    if model.config.frame_times == "learned":
        tokenizer.add_tokens(list(TIME_TOKENS), special_tokens=True)
    rows = model.get_input_embeddings().num_embeddings
    if not len(tokenizer) <= rows < len(tokenizer) + 16:
        raise ValueError(f"{training.start_from} has {rows} tokens, the rendered world has {len(tokenizer)}.")
    return model


class Curriculum(TrainerCallback):
    """Tells the workers that draw videos how far training is."""

    def __init__(self, clock: TrainingClock, progress: torch.Tensor) -> None:
        self.clock, self.progress = clock, progress

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        self.progress.fill_(self.clock.progress(state.global_step))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        self.progress.fill_(self.clock.progress(state.global_step))


def _arguments(training: WorldTraining, cuda: bool) -> VideoMa2mbaTrainingConfig:
    return VideoMa2mbaTrainingConfig(
        output_dir=training.out,
        train_parts=training.train_parts,
        gradient_checkpointing=True,  # chosen per batch: none where it is not needed
        gradient_checkpointing_kwargs={
            "method": "per_layer" if training.stretch else "multi_axis",
            "memory_budget": training.memory_budget,
        },
        per_device_train_batch_size=1,  # an item of the data set is a batch
        max_steps=training.steps or ENDLESS,
        max_seconds=training.max_seconds,
        stop_after=training.stop_after,
        save_seconds=training.save_seconds,
        learning_rate=training.learning_rate,
        vision_learning_rate=0.2 * training.learning_rate,  # it sees already
        weight_decay=training.weight_decay,
        adam_beta2=0.95,
        warmup_steps=training.warmup_steps,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs=_falling(training),
        bf16=cuda,
        use_cpu=not cuda,
        max_grad_norm=1.0,
        logging_steps=min(50, max((training.steps or 500) // 10, 1)) if cuda else 1,  # short runs have curves, too
        save_strategy="no",  # the clock asks for saves
        save_total_limit=1,
        ignore_data_skip=True,
        dataloader_num_workers=training.workers,
        dataloader_prefetch_factor=2 if training.workers else None,
        dataloader_pin_memory=cuda,
        accelerator_config={"dispatch_batches": False},
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        seed=training.seed,
    )


def _falling(training: WorldTraining) -> dict[str, Any]:
    """Settings of transformers' schedule: the rate is constant to `decay_from`, then falls in a straight line.

    Shares of the whole where the clock counts, steps otherwise.
    """
    share = 1 - training.decay_from
    steps = share if training.max_seconds is not None else round(share * (training.steps or ENDLESS))
    return {"num_decay_steps": steps, "decay_type": "linear", "min_lr_ratio": 0.02}


def export(model: Any, tokenizer: Any, out: Path, dtype: str) -> None:
    """Write model and processor as `from_pretrained` wants them, complete or not at all, in `dtype`."""
    draft = out.with_name(out.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    model.eval()
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] not in _SINGLE_PRECISION:
            parameter.data = parameter.data.to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    model.save_pretrained(draft)
    world_processor(model.config, tokenizer).save_pretrained(draft)
    shutil.rmtree(out, ignore_errors=True)
    draft.rename(out)
    print(f"wrote {out}, {sum(file.stat().st_size for file in out.rglob('*')) / 2**20:.1f} MiB")


if __name__ == "__main__":
    begun = time.monotonic()
    (settings,) = HfArgumentParser(WorldTraining).parse_args_into_dataclasses()
    train(settings)
    print(f"{time.monotonic() - begun:.0f} s in all")
