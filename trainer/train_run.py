"""A recipe, carried out: data, model and adapters put together, trained, saved and published."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .. import BUNDLED_CHECKPOINT
from ..conversion.released import usable_folder
from ..modeling_video_ma2mba.configuration_video_ma2mba import VideoMa2mbaConfig
from ..modeling_video_ma2mba.state_writing import give_usual_permissions
from ..modeling_video_ma2mba.vision_towers import TOWERS
from .checkpoint_files import checkpoint_of_earlier_run
from .recipe import Recipe
from .setting_names import BUNDLED, require_named
from .smoke_data import write_smoke_data
from .training_config import VideoMa2mbaTrainingConfig
from .video_trainer import VideoMa2mbaTrainer

# Every projection of every Mamba-2 block; `lora_vision` adds the tower's linear layers.
LORA_TARGETS = r".*language_model.*\.(in_proj|out_proj)"
_TOWER_LINEAR = sorted({name for tower in TOWERS.values() for name in tower.lora_targets})
LORA_TARGETS_VISION = LORA_TARGETS + rf"|.*vision_tower.*\.({'|'.join(_TOWER_LINEAR)})"


def lora_config(recipe: Recipe, config: Any = None) -> Any:
    """PEFT's configuration of a recipe's adapters, with what trains whole beside them. None without `lora_rank`.

    Args:
        config: of the model that they are for; needed for norms.
    """
    if recipe.lora_rank is None:
        return None
    from peft import LoraConfig

    depth = 0 if config is None else config.text_config.num_hidden_layers
    layers = [f"language_model.layers.{number}" for number in range(depth)]
    whole = {
        "projector": ["multi_modal_projector"],
        "embeddings": ["language_model.embeddings"],
        "norms": ["language_model.norm_f", *(f"{layer}{place}.norm" for layer in layers for place in ("", ".mixer"))],
    }
    return LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=LORA_TARGETS_VISION if recipe.lora_vision else LORA_TARGETS,
        modules_to_save=[name for part in recipe.whole_parts for name in whole[part]] or None,
    )


def four_bit_config() -> Any:
    """transformers' configuration of weights in 4 bits: the language model's projections, as QLoRA keeps them.

    Raises:
        ValueError: bitsandbytes is missing.
    """
    if find_spec("bitsandbytes") is None:
        raise ValueError("four_bit=true needs bitsandbytes: pip install 'video-ma2mba[qlora]'")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "model.multi_modal_projector", "model.vision_tower"],
    )


def build_trainer(recipe: Recipe, args: VideoMa2mbaTrainingConfig, smoke: bool = False) -> VideoMa2mbaTrainer:
    """The trainer of a recipe, ready to train.

    Args:
        smoke: on the bundled checkpoint and rendered videos where the recipe names no others.

    Raises:
        ValueError, FileNotFoundError: model or data are missing or make no sense, in one sentence.
    """
    from .data import load_training_data
    from .data.loading import mix

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data is read in forked workers
    source, data = recipe.model, recipe.train_data
    if source == BUNDLED or (smoke and source is None):
        source = str(BUNDLED_CHECKPOINT)
    if smoke and data is None:
        folder = Path(args.output_dir, "smoke_data")
        with args.main_process_first(desc="rendering"):
            data = str(write_smoke_data(folder, recipe.smoke_data or "questions"))
    for name, value in (("model", source), ("train_data", data)):
        require_named(name, value)
    adapters = None
    if recipe.lora_rank is not None:
        adapters = lora_config(recipe, VideoMa2mbaConfig.from_pretrained(usable_folder(source)))
    if recipe.four_bit:
        args.model_init_kwargs = {**(args.model_init_kwargs or {}), "quantization_config": four_bit_config()}
    with args.main_process_first(desc="reading the data"):
        options = {"base_dir": recipe.base_dir, "merge_by_video": recipe.merge_by_video}
        options["streaming"] = recipe.streaming
        if isinstance(data, list) and (recipe.train_shares is not None or (recipe.streaming and len(data) > 1)):
            train = mix([load_training_data(one, **options) for one in data], recipe.train_shares, args.seed)
        else:
            train = load_training_data(data, **options)
        if recipe.shuffle_buffer:
            train = train.shuffle(seed=args.seed, buffer_size=recipe.shuffle_buffer)
        options["streaming"] = False
        held_out = None
        if recipe.eval_data is not None:
            held_out = load_training_data(recipe.eval_data, **options)
        elif recipe.eval_share:
            if recipe.streaming:
                raise ValueError("eval_share needs a data set of known length: give eval_data when streaming")
            if len(train) < 2:
                raise ValueError(f"{data} has 1 sample, of which none can be put aside: add rows, or eval_share=0")
            parts = train.train_test_split(test_size=recipe.eval_share, seed=args.seed)
            train, held_out = parts["train"], parts["test"]
    name = ", ".join(Path(str(part)).name for part in (data if isinstance(data, list) else [data]))
    return VideoMa2mbaTrainer(
        source,
        args,
        train_dataset=train,
        eval_dataset=held_out,
        peft_config=adapters,
        data_name=name,
    )


def _merged(trainer: VideoMa2mbaTrainer, recipe: Recipe) -> Any:
    """The model with its adapters in its weights; what trained in 4 bits is loaded once more, with all of them."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not recipe.four_bit:
        merged = model.merge_and_unload()
        del merged.forward  # the trainer's own
        return merged
    from peft import PeftModel

    from ..modeling_video_ma2mba.modeling_video_ma2mba import VideoMa2mbaForConditionalGeneration

    name = trainer.video_model.config.name_or_path
    whole = VideoMa2mbaForConditionalGeneration.from_pretrained(name, dtype=torch.bfloat16)
    return PeftModel.from_pretrained(whole, trainer.args.output_dir).merge_and_unload()


def run_recipe(recipe: Recipe, args: VideoMa2mbaTrainingConfig, smoke: bool = False) -> Path:
    """Train as the recipe says, save model, processor and card, publish where asked for; the folder to use next.

    Raises:
        ValueError: the output folder holds checkpoints of another run and `resume` is off; see also `build_trainer`.
    """
    return train_recipe(recipe, args, smoke)[0]


def train_recipe(
    recipe: Recipe, args: VideoMa2mbaTrainingConfig, smoke: bool = False
) -> tuple[Path, VideoMa2mbaTrainer]:
    """`run_recipe`, and the trainer, which knows how it went.

    Raises:
        ValueError: as of `run_recipe`.
    """
    earlier = checkpoint_of_earlier_run(args.output_dir, recipe.resume)
    trainer = build_trainer(recipe, args, smoke)
    trainer.train(resume_from_checkpoint=earlier)
    trainer.save_model(args.output_dir)
    if trainer.is_world_process_zero():
        give_usual_permissions(args.output_dir)
    trainer.create_model_card()
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=trainer.data_name)
    result = Path(args.output_dir)
    if recipe.lora_rank is not None and recipe.merge_adapter:
        result = result / "merged"
        if trainer.is_world_process_zero():
            merged = _merged(trainer, recipe)
            merged.save_pretrained(result)
            give_usual_permissions(result)
            trainer.processing_class.save_pretrained(result)
            trainer.write_card(result, merged, tags=("lora",))
    return result, trainer
