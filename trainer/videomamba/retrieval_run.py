"""A retrieval recipe put together: captions, the model to start from, its tokenizer, the teacher, the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ...conversion.videomamba_checkpoint import resize_clips
from ...hub_cards.retrieval_card import retrieval_card
from ...modeling_video_ma2mba.configuration_videomamba import VideoMambaConfig
from ...modeling_video_ma2mba.configuration_videomamba_retrieval import VideoMambaRetrievalConfig
from ...modeling_video_ma2mba.modeling_videomamba_retrieval import VideoMambaForRetrieval
from ...processing.video_processing_videomamba import VideoMambaVideoProcessor
from ...retrieval.loading import text_tokenizer
from ..data.broken_samples import BrokenSamples
from ..training_card import run_table
from .augmentation import Augmentation
from .caption_data import PairCollator, PairSampler, TestPairs, TrainingPairs
from .caption_rows import CaptionRow, load_caption_rows
from .clip_trainer import VideoMambaTrainer
from .masked_pretraining import ClipTeacher
from .retrieval_training import RetrievalObjective, RetrievalStudent, pair_recall
from .starting_model import starting_encoder, stored_model
from .training_settings import VideoMambaRecipe, VideoMambaTrainingConfig
from .word_pieces import word_pieces

_CARD_SETTINGS = (
    *("learning_rate", "min_learning_rate", "warmup_epochs", "weight_decay", "adam_beta1", "adam_beta2"),
    *("max_grad_norm", "drop_path_rate", "crop", "flip", "mask", "mask_ratio", "picture_mask_ratio", "vtc_weight"),
    *("vtm_weight", "mlm_weight", "uta_weight", "mlm_probability", "num_train_epochs", "seed"),
)
_OWN_WORDS = 8192  # pieces of a vocabulary that is made from captions


class RetrievalTrainer(VideoMambaTrainer):
    """`VideoMambaTrainer` of pairs: batches of one kind, a tokenizer beside the processor, recall in the card."""

    no_decay = ("pos_embed", "cls_token")  # as the release: its temporal positions do decay
    metrics = ("t2v_r1", "t2v_r5", "t2v_r10", "t2v_median_rank", "v2t_r1", "v2t_r5", "v2t_r10", "v2t_median_rank")

    def __init__(self, *args: Any, tokenizer: Any, **kwargs: Any) -> None:
        self.tokenizer = tokenizer
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data = self.train_dataset if train_dataset is None else train_dataset
        if not hasattr(data, "pictures"):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        together = self.args.per_device_train_batch_size * self.accelerator.num_processes
        return PairSampler(data.pictures, seed, together)

    def save_exported(self, folder: str | Path) -> None:
        """As of `VideoMambaTrainer`, with the tokenizer."""
        super().save_exported(folder)
        if self.is_world_process_zero():
            self.tokenizer.save_pretrained(folder)

    def card(self, name: str) -> str:
        """The model card: what was trained, how, and the recall among the held-out pairs."""
        model = self.exported()
        found = [entry for entry in self.state.log_history if "eval_t2v_r1" in entry]
        measured = None
        if found:
            rows = "\n".join(f"| {key} | {found[-1][f'eval_{key}']:.4f} |" for key in self.metrics)
            measured = (
                f"{len(self.eval_dataset)} held-out videos with one caption each, by the dual encoder alone, after "
            )
            measured += f"step {found[-1]['step']}:\n\n| | |\n| --- | --- |\n{rows}"
        return retrieval_card(
            model.config,
            sum(parameter.numel() for parameter in model.parameters()),
            title=name,
            license=self.args.license,
            accuracy=measured,
            recipe=run_table(self.args, self.state, self.data_name, self.accelerator.num_processes, _CARD_SETTINGS),
        )


def retrieval_trainer(recipe: VideoMambaRecipe, args: VideoMambaTrainingConfig, data_name: str) -> RetrievalTrainer:
    """The trainer of a recipe with task=retrieval.

    Raises:
        ValueError, FileNotFoundError: model, data or teacher are missing or make no sense, in one sentence.
    """
    train, held_out = _rows(recipe, args)
    model, tokenizer = starting_retrieval(
        recipe, args.drop_path_rate, [each for row in train for each in row.captions]
    )
    teacher = _teacher(recipe, args)
    width = None if teacher is None or not args.uta_weight else teacher.clip.config.projection_dim
    args.label_names = ["keys"]
    vision = model.config.vision_config
    processor = VideoMambaVideoProcessor(
        vision.image_size, vision.num_frames, image_mean=vision.image_mean, image_std=vision.image_std
    )
    collator = PairCollator(tokenizer, model.config.max_text_length)
    report = BrokenSamples(Path(args.output_dir, "broken_eval_samples.jsonl"))
    return RetrievalTrainer(
        RetrievalStudent(model, args, width),
        args,
        RetrievalObjective(args, model.config, teacher, tokenizer.all_special_ids, tokenizer.mask_token_id),
        TrainingPairs(
            train,
            vision.num_frames,
            Augmentation(
                vision.image_size, args.crop, args.flip, args.randaugment_ops, args.randaugment_magnitude,
                args.randaugment_std, args.random_erasing,
            ),
            seed=args.seed,
            report=BrokenSamples(Path(args.output_dir, "broken_samples.jsonl")),
        ),
        None if held_out is None else TestPairs(held_out, processor, report=report),
        processing_class=processor,
        tokenizer=tokenizer,
        data_name=data_name,
        export=lambda trained: trained.retrieval,  # type: ignore[arg-type, return-value]
        data_collator=collator,
        test_collator=collator,
        compute_metrics=pair_recall,
    )  # fmt: skip


def _rows(
    recipe: VideoMambaRecipe, args: VideoMambaTrainingConfig
) -> tuple[Sequence[CaptionRow], Sequence[CaptionRow] | None]:
    """Training rows and held-out ones."""
    options: dict[str, Any] = {"base_dir": recipe.base_dir, "paragraphs": recipe.paragraphs}
    with args.main_process_first(desc="reading the data"):
        train = load_caption_rows(recipe.data, **options)
        if recipe.eval_data is not None:
            return train, load_caption_rows(recipe.eval_data, split=recipe.eval_split, **options)
    if not recipe.eval_share:
        return train, None
    aside = max(1, round(len(train) * recipe.eval_share))
    if aside >= len(train):
        raise ValueError(f"{recipe.data} has {len(train)} rows, of which none can be put aside: add rows")
    order = np.random.default_rng(args.seed).permutation(len(train))
    return [train[i] for i in sorted(order[aside:])], [train[i] for i in sorted(order[:aside])]


def _teacher(recipe: VideoMambaRecipe, args: VideoMambaTrainingConfig) -> ClipTeacher | None:
    if not args.mask_ratio:
        return None
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    if recipe.teacher_config is not None:
        clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**recipe.teacher_config))
    elif recipe.teacher is not None:
        clip = CLIPVisionModelWithProjection.from_pretrained(recipe.teacher)
    elif args.mask == "attention" or args.uta_weight:
        raise ValueError(
            "the recipe names no teacher: add teacher=..., a CLIP such as openai/clip-vit-base-patch16, or train on "
            "whole clips with mask_ratio=0"
        )
    else:
        return None
    return ClipTeacher(clip, args.align_layers)


def starting_retrieval(
    recipe: VideoMambaRecipe, drop_path_rate: float, captions: Sequence[str]
) -> tuple[VideoMambaForRetrieval, Any]:
    """The model to start from, fitted to the recipe's clips, and its tokenizer.

    A retrieval model (a folder, a Hub id, a released `.pth`) is taken whole; of an encoder or classifier the encoder,
    beside the BERT `text_model`. With `text_config` BERT has fresh weights, and without `text_model` as well a
    vocabulary made from `captions`.
    """
    fields, weights, folder = ({}, {}, None) if recipe.model is None else stored_model(recipe.model)
    if "text_config" in fields:
        asked = recipe.model_config or {}
        vision = VideoMambaConfig.from_dict(fields["vision_config"])
        encoder = {n.removeprefix("vision_encoder."): t for n, t in weights.items() if n.startswith("vision_encoder.")}
        vision = resize_clips(
            vision, encoder, asked.get("num_frames", recipe.num_frames), asked.get("image_size", recipe.image_size)
        )
        vision.drop_path_rate = drop_path_rate
        length = fields["max_text_length"] if recipe.max_text_length is None else recipe.max_text_length
        config = VideoMambaRetrievalConfig(**{**fields, "vision_config": vision, "max_text_length": length})
        model = VideoMambaForRetrieval(config)
        weights |= {f"vision_encoder.{name}": tensor for name, tensor in encoder.items()}
        _load_(model, weights, str(recipe.model))
        return model, text_tokenizer(folder or recipe.text_model, config.text_config.vocab_size)
    vision, encoder = starting_encoder(recipe, drop_path_rate)
    encoder = {name: tensor for name, tensor in encoder.items() if not name.startswith("head.")}
    text_config, text_weights, tokenizer = _text(recipe, captions)
    own: dict[str, Any] = {"text_config": text_config, "vision_config": vision}
    for name in ("fusion_layers", "projection_dim", "max_text_length"):
        if (value := getattr(recipe, name)) is not None:
            own[name] = value
    model = VideoMambaForRetrieval(VideoMambaRetrievalConfig(**own, initializer_range=text_config.initializer_range))
    if encoder:
        _load_(model.vision_encoder, encoder, str(recipe.model))
    if text_weights:
        _load_(model.text_encoder, text_weights, str(recipe.text_model), fresh="crossattention.")
    return model, tokenizer


def _text(recipe: VideoMambaRecipe, captions: Sequence[str]) -> tuple[Any, dict[str, Tensor], Any]:
    """Configuration, weights (none of a fresh one) and tokenizer of the BERT that reads texts."""
    from transformers import AutoConfig, AutoTokenizer, BertConfig, BertForMaskedLM

    if recipe.text_model is None and recipe.text_config is None:
        raise ValueError(
            "the recipe names no BERT: add text_model=google-bert/bert-base-uncased, or text_config={...}"
        )
    if recipe.text_model is None:
        tokenizer = word_pieces(captions, (recipe.text_config or {}).get("vocab_size", _OWN_WORDS))
    else:
        tokenizer = AutoTokenizer.from_pretrained(recipe.text_model)
    if recipe.text_config is not None:
        sizes = {**recipe.text_config, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        return BertConfig(**sizes), {}, tokenizer
    config = AutoConfig.from_pretrained(recipe.text_model)
    if config.model_type != "bert":
        raise ValueError(f"text_model={recipe.text_model} is of the type {config.model_type}, not a BERT")
    return config, BertForMaskedLM.from_pretrained(recipe.text_model).state_dict(), tokenizer


def _load_(model: nn.Module, weights: dict[str, Tensor], name: str, fresh: str | None = None) -> None:
    """Load all weights in place; parameters with `fresh` in their name may keep their beginning.

    Raises:
        ValueError: others are missing, or some are left over.
    """
    missing, left = model.load_state_dict(weights, strict=False)
    places = {each: tensor.data_ptr() for each, tensor in model.state_dict().items()}
    loaded = {places[each] for each in weights if each in places}  # files have once what BERT has under two names
    missing = [each for each in missing if places[each] not in loaded and (fresh is None or fresh not in each)]
    if missing or left:
        raise ValueError(f"{name} does not fit: {(missing + left)[0]} is {'missing' if missing else 'left over'}")
