"""`video-ma2mba train`: a recipe, with settings of your own on top."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from video_ma2mba.loading import check_loading

from .loading import while_loading
from .options import check_training_data
from .terminal import note

NEEDS_TRL = "training needs TRL 1.16, and that Python 3.11: pip install 'video-ma2mba[train]'"


def train(
    config: Annotated[
        str, typer.Option(help="Recipe: a YAML file, or stage1, stage1_5, stage2, lora, or videomamba/NAME.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the recipe's.", show_default=False),
    ] = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="A minute on a CPU: the recipe's smoke section, on rendered videos.")
    ] = False,
) -> None:
    """Train a model as a recipe says; the same through `torchrun -m video_ma2mba train` and `accelerate launch -m`.

    Keys are the fields of VideoMa2mbaTrainingConfig (every setting of TRL's SFTConfig among them) and of a recipe:
    model, train_data, eval_data, eval_share, lora_rank and others. An interrupted run goes on with resume=true.
    """
    from video_ma2mba.trainer.recipe_files import recipe_content

    content = recipe_content(config, overrides or [], smoke)  # what is wrong is told before torch and TRL load
    result, first, hint = (_video_mamba if "task" in content else _video_ma2mba)(content, smoke)
    if first:
        typer.echo(f"{result}")
        note(hint)


def _video_mamba(content: dict[str, Any], smoke: bool) -> tuple[Path, bool, str]:
    """Train a VideoMamba by transformers' own Trainer; the result's folder, whether this process tells of it, and what
    to do with it."""
    with while_loading():
        from video_ma2mba.trainer.videomamba import recipe_run
    quiet_libraries()
    recipe, args = recipe_run.build_recipe(content)
    result = recipe_run.run_recipe(recipe, args, smoke)
    return result, args.process_index == 0, recipe_run.what_next(recipe, result)


def _video_ma2mba(content: dict[str, Any], smoke: bool) -> tuple[Path, bool, str]:
    """As `_video_mamba`, of a Video-Ma2mba, by TRL's trainer."""
    if find_spec("trl") is None:
        raise ImportError(NEEDS_TRL, name="trl")
    from video_ma2mba.trainer.setting_names import BUNDLED, check_recipe

    if (known := check_recipe(content, smoke)) is not None:
        if known.model not in (None, BUNDLED):
            check_loading(known.model)
        for data in (known.train_data, known.eval_data):
            for source in data if isinstance(data, list) else [data]:
                if isinstance(source, str):
                    check_training_data(source)
    with while_loading():
        from video_ma2mba.trainer.recipe import build_recipe
        from video_ma2mba.trainer.train_run import run_recipe

    recipe, args = build_recipe(content)
    quiet_libraries()
    result = run_recipe(recipe, args, smoke)
    return result, args.process_index == 0, f'ask it: video-ma2mba ask VIDEO "QUESTION" --model {result}'


def quiet_libraries() -> None:
    """Off a terminal, no short work of libraries, drawn over itself; training tells in lines how far it is."""
    if not sys.stderr.isatty():
        import datasets
        from transformers.utils import logging

        datasets.disable_progress_bars()
        logging.disable_progress_bar()
