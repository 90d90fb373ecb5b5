"""Train a small retrieval model on the rendered world: texts that find the clips they describe, and the other way.

    python -m video_ma2mba.world.retrieval --out DIR --max-seconds 120                     # a GPU
    python -m video_ma2mba.world.retrieval --out DIR --size tiny --max-steps 4 --batch 8   # a CPU, to see it run

Every clip of eight seconds shows three things; its caption names them in the order in which they come, and says which
way each moves: "a red circle moves left, then a blue star rests, then a red star moves up". Training is the trainer
of the recipe `videomamba/retrieval` with contrast, matching and hidden words. `--out` holds `curve.csv` (losses, and
recall among unseen clips while training goes on), `recall.csv` (at the end, by the dual encoder and re-ranked) and the
model in `model/`, which `video-ma2mba retrieve` takes.
"""

from __future__ import annotations

import csv
import dataclasses
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import AutoTokenizer, BertConfig, HfArgumentParser, TrainerCallback, set_seed

from ..modeling_video_ma2mba.configuration_videomamba_retrieval import VideoMambaRetrievalConfig
from ..modeling_video_ma2mba.modeling_videomamba_retrieval import VideoMambaForRetrieval
from ..retrieval.recall import recall_both_ways
from ..retrieval.search import Retriever
from ..trainer.videomamba.caption_data import PairCollator, pair_keys
from ..trainer.videomamba.retrieval_losses import same_pairs
from ..trainer.videomamba.retrieval_run import RetrievalTrainer
from ..trainer.videomamba.retrieval_training import RetrievalObjective, RetrievalStudent, pair_recall
from ..trainer.videomamba.training_settings import VideoMambaTrainingConfig
from ..trainer.videomamba.word_pieces import word_pieces
from .batches import imitate_mp4
from .clip_encoders import FRAME, SECONDS, clip_processor, eager_config, loud_positions_
from .render import WorldRenderer
from .world import World, WorldSettings, build_world, video_seed

SIZES = {
    "small": ({"hidden_size": 128, "num_hidden_layers": 6, "patch_size": 8}, 128),
    "tiny": ({"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "patch_size": 16}, 32),
}
_SETTINGS = WorldSettings(min_objects=3, max_objects=3, card=False)
_WORDS = 32  # tokens of a caption


def caption_of(world: World) -> str:
    """What a clip shows, in the order in which things come."""
    things = sorted(world.things, key=lambda thing: (thing.start, thing.name))
    said = (f"a {t.name} {'rests' if t.direction is None else f'moves {t.direction}'}" for t in things)
    return ", then ".join(said)


class WorldPairs(Dataset[dict[str, Any]]):
    """Clips, uint8 (SECONDS, 3, FRAME, FRAME), with their caption and keys. In training frames come from a random
    moment of each second and half the clips look as if read from an mp4 file; else from the middle of each second."""

    def __init__(self, split: str, size: int, seed: int = 0) -> None:
        self.split, self.size, self.seed = split, size, seed

    def __len__(self) -> int:
        return self.size

    def world(self, index: int) -> World:
        """Of a clip."""
        return build_world(video_seed(self.split, index, self.seed), SECONDS, _SETTINGS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        world = self.world(index)
        rng = random.Random(f"moments {world.seed}")
        training = self.split == "train"
        moments = [second + (rng.random() if training else 0.5) for second in range(SECONDS)]
        frames = WorldRenderer(world, FRAME).frames(moments)
        if training and rng.random() < 0.5:
            frames = imitate_mp4(frames, index % 2**32)
        caption = caption_of(world)
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()
        return {"pixel_values": pixels, "text": caption, "keys": pair_keys(f"world {world.seed}", caption)}


class _Curve(TrainerCallback):
    """Writes losses and recall with the seconds of training, at every line of the log."""

    def __init__(self, path: Path) -> None:
        self.path, self.begun, self.rows = path, 0.0, []  # type: ignore[var-annotated]

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        kept = ("vtc_loss", "vtm_loss", "mlm_loss", "eval_t2v_r1", "eval_v2t_r1", "eval_t2v_median_rank")
        if found := {name: f"{logs[name]:.4f}" for name in kept if name in logs}:
            self.rows.append({"step": state.global_step, "seconds": f"{time.monotonic() - self.begun:.1f}", **found})
            _write(self.path, self.rows)


@dataclasses.dataclass
class RetrievalTraining:
    """Everything that decides a run."""

    out: str = dataclasses.field(metadata={"help": "folder of the run"})
    start: str = dataclasses.field(default="", metadata={"help": "model/ of an earlier run, to go on from"})
    size: str = dataclasses.field(default="small", metadata={"help": f"one of {', '.join(SIZES)}"})
    max_steps: int = dataclasses.field(default=0, metadata={"help": "length of training in optimizer steps"})
    max_seconds: float = dataclasses.field(default=0.0, metadata={"help": "the same by the clock"})
    batch: int = dataclasses.field(default=256, metadata={"help": "pairs of an optimizer step"})
    learning_rate: float = dataclasses.field(default=1e-3, metadata={"help": "highest learning rate"})
    weight_decay: float = dataclasses.field(default=0.05, metadata={"help": "of matrices"})
    warmup_steps: int = dataclasses.field(default=100, metadata={"help": "steps of warm-up"})
    mask_ratio: float = dataclasses.field(default=0.0, metadata={"help": "share of patches hidden, in tubes"})
    mlm_weight: float = dataclasses.field(default=1.0, metadata={"help": "of hidden words"})
    clips: int = dataclasses.field(default=2_000_000, metadata={"help": "different training clips"})
    test_clips: int = dataclasses.field(default=200, metadata={"help": "unseen clips to search among"})
    eval_steps: int = dataclasses.field(default=100, metadata={"help": "steps between measurements of recall"})
    depth: int = dataclasses.field(default=32, metadata={"help": "candidates that are ranked again at the end"})
    workers: int = dataclasses.field(default=14, metadata={"help": "processes that draw clips"})
    seed: int = dataclasses.field(default=0, metadata={"help": "of weights and training clips"})

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"size={self.size!r}: must be one of {', '.join(SIZES)}.")
        if self.start and not Path(self.start, "config.json").is_file():
            raise FileNotFoundError(f"start={self.start}: there is no model of an earlier run")
        if self.max_steps <= 0 and self.max_seconds <= 0:
            raise ValueError("give the length of training: max_steps, max_seconds or both.")


def fresh_model(training: RetrievalTraining, words: int) -> VideoMambaForRetrieval:
    """A model with fresh weights that learns from clips at once."""
    sizes, width = SIZES[training.size]
    text = BertConfig(
        vocab_size=words, hidden_size=width, num_hidden_layers=4, num_attention_heads=4, intermediate_size=4 * width,
        max_position_embeddings=_WORDS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=width**-0.5,
    )  # fmt: skip
    config = VideoMambaRetrievalConfig(
        eager_config(**sizes),
        text,
        fusion_layers=2,
        projection_dim=width,
        max_text_length=_WORDS,
        temperature_range=(0.001, 0.1),  # before anything is learnt, a high one is what pays, and holds learning up
    )
    model = VideoMambaForRetrieval(config)
    loud_positions_(model.vision_encoder)
    return model


def train(training: RetrievalTraining) -> dict[str, float]:
    """Run a training; returns the recall among unseen clips, re-ranked."""
    out, cuda = Path(training.out), torch.cuda.is_available()
    out.mkdir(parents=True, exist_ok=True)
    set_seed(training.seed)
    seen, unseen = WorldPairs("train", training.clips, training.seed), WorldPairs("test", training.test_clips)
    if training.start:
        tokenizer = AutoTokenizer.from_pretrained(training.start)
        model = VideoMambaForRetrieval.from_pretrained(training.start)
    else:
        tokenizer = word_pieces((caption_of(seen.world(index)) for index in range(500)), 200)
        model = fresh_model(training, len(tokenizer))
    args = VideoMambaTrainingConfig(
        output_dir=str(out),
        max_steps=training.max_steps or -1,
        max_seconds=training.max_seconds or None,
        per_device_train_batch_size=training.batch,
        per_device_eval_batch_size=training.test_clips,
        learning_rate=training.learning_rate,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        mask="tube",
        mask_ratio=training.mask_ratio,
        uta_weight=0.0,
        mlm_weight=training.mlm_weight,
        logging_steps=min(20, training.eval_steps),
        eval_strategy="steps",
        eval_steps=training.eval_steps,
        save_strategy="no",
        dataloader_num_workers=training.workers,
        dataloader_drop_last=True,
        label_names=["keys"],
        report_to="none",
        disable_tqdm=True,
        seed=training.seed,
        license="apache-2.0",
        use_cpu=not cuda,
    )
    collator = PairCollator(tokenizer, _WORDS)
    trainer = RetrievalTrainer(
        RetrievalStudent(model, args),
        args,
        RetrievalObjective(args, model.config, None, tokenizer.all_special_ids, tokenizer.mask_token_id),
        seen,
        unseen,
        processing_class=clip_processor(),
        tokenizer=tokenizer,
        data_name="the rendered world",
        export=lambda trained: trained.retrieval,  # type: ignore[arg-type, return-value]
        data_collator=collator,
        test_collator=collator,
        compute_metrics=pair_recall,
        callbacks=[_Curve(out / "curve.csv")],
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_exported(out / "model")
    found = measure(Retriever(model.eval(), tokenizer), unseen, training.depth)
    facts = {"clips": len(unseen), "seed": training.seed, "steps": trainer.state.global_step}
    _write(
        out / "recall.csv", [{"way": way, **{k: f"{v:.4f}" for k, v in row.items()}, **facts} for way, row in found]
    )
    return found[-1][1]


def measure(retriever: Retriever, unseen: WorldPairs, depth: int) -> list[tuple[str, dict[str, float]]]:
    """Recall both ways by the dual encoder, and re-ranked among its `depth` best."""
    pairs = [unseen[index] for index in range(len(unseen))]
    texts, keys = [pair["text"] for pair in pairs], torch.stack([pair["keys"] for pair in pairs])
    parts = [retriever.clips(torch.stack([pair["pixel_values"] for pair in pairs[i : i + 50]]))
             for i in range(0, len(pairs), 50)]  # fmt: skip
    tokens = torch.cat([part[1] for part in parts])
    scores = retriever.texts(texts) @ torch.cat([part[0] for part in parts]).T
    right = same_pairs(keys, keys)
    again = retriever.reranked(texts, scores, lambda number: tokens[number], depth)
    back = retriever.reranked_back(texts, scores, lambda number: tokens[number], depth)
    return [
        ("dual encoder", recall_both_ways(scores, right)),
        (f"best {depth} re-ranked", recall_both_ways(again, right, back)),
    ]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    begun = time.monotonic()
    (settings,) = HfArgumentParser(RetrievalTraining).parse_args_into_dataclasses()
    for measured, share in train(settings).items():
        print(f"{measured}: {share:.4f}")
    print(f"{time.monotonic() - begun:.0f} s in all")
