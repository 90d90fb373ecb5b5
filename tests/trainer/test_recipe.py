"""Recipes: what the shipped ones say, how they are overridden, and that each of them runs."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from video_ma2mba.cli.main import app
from video_ma2mba.trainer.recipe import Recipe, build_recipe, read_recipe
from video_ma2mba.trainer.recipe_files import FOLDER, shipped_recipes
from video_ma2mba.trainer.setting_names import written_settings
from video_ma2mba.trainer.smoke_data import write_smoke_data
from video_ma2mba.trainer.training_config import VideoMa2mbaTrainingConfig

SHORT = ["use_cpu=true", "disable_tqdm=true", "report_to=none"]


def train(*arguments: str):
    return CliRunner().invoke(app, ["train", *arguments])


@pytest.mark.parametrize(
    ("name", "rates", "batch", "parts"),
    [
        ("stage1", (1e-3, None, None), 512, ("projector",)),
        ("stage1_5", (4e-5, 4e-6, 4e-5), 32, ("lm", "projector", "vision")),
        ("stage2", (4e-5, 4e-6, 4e-5), 32, ("lm", "projector", "vision")),
    ],
)
def test_stages_have_the_papers_settings(name, rates, batch, parts):
    content = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert content["deepspeed"]["zero_optimization"]["stage"] == 1
    _, args = read_recipe(name, ["use_cpu=true"])
    assert (args.learning_rate, args.vision_learning_rate, args.projector_learning_rate) == rates
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == batch
    assert (args.adam_beta1, args.adam_beta2, args.weight_decay, args.max_grad_norm) == (0.9, 0.95, 0.05, 1.0)
    assert (args.warmup_steps, args.lr_scheduler_type, args.num_train_epochs) == (0.1, "cosine", 2)
    assert args.parts == parts and args.fps == 1.0 and args.deepspeed is None, "one process needs no ZeRO"


def test_overrides_lie_over_the_recipe(tmp_path):
    own = tmp_path / "mine.yaml"
    own.write_text("model: here\nlearning_rate: 2e-5\noutput_dir: runs/mine\nsmoke: {max_steps: 3}\n")
    recipe, args = read_recipe(
        own, ["learning_rate=1e-6", "max_frames=12", "train_data=[a.csv, b.csv]", "save_strategy=no"], smoke=True
    )
    assert args.save_strategy == "no"
    assert (args.learning_rate, args.max_frames, args.max_steps) == (1e-6, 12, 3)
    assert (recipe.model, recipe.train_data) == ("here", ["a.csv", "b.csv"])
    recipe, args = read_recipe(own, ["output_dir=2026", "max_steps=4.0", "max_seconds=1:30", "model=7"])
    assert (args.output_dir, args.max_steps, args.max_seconds, recipe.model) == ("2026", 4, 90, "7")


def test_no_more_workers_than_processors(monkeypatch):
    monkeypatch.setattr("video_ma2mba.trainer.setting_names._processors", lambda: 3)
    for asked, taken in ((None, 3), (2, 2), (16, 3)):
        overrides = ["use_cpu=true"] + ([] if asked is None else [f"dataloader_num_workers={asked}"])
        assert read_recipe("stage2", overrides)[1].dataloader_num_workers == taken


def test_mistakes_are_said_in_one_sentence(tmp_path):
    for overrides, message in (
        (["learning_rat=1"], "'learning_rat' is no setting: do you mean 'learning_rate'?"),
        (["fps"], "'fps' is no override: write key=value"),
        (["eval_share=2"], "eval_share=2 is not valid"),
        (["global_batch_size=9"], "global_batch_size=9 is no multiple of 8 samples"),
        (["learning_rate=abc"], "learning_rate=abc is not valid: it must be a number"),
        (["learning_rate=.inf"], "learning_rate=inf is not valid: it must be a number"),
        (["learning_rate=true"], "learning_rate=True is not valid: it must be a number"),
        (["learning_rate=null"], "learning_rate=null is not valid: it needs a value"),
        (["learning_rate="], "'learning_rate=' has no value"),
        (["learning_rate=-1e-5"], "learning_rate=-1e-05 is not valid: it must be at least 0"),
        (["learning_rate=[1"], "has a value that is not valid YAML"),
        (["max_steps=1.5"], "max_steps=1.5 is not valid: it must be a whole number"),
        (["lora_rank=0"], "lora_rank=0 is not valid: it must be at least 1"),
        (["fps=0"], "fps=0 is not valid: it must be at least 0.001"),
        (["per_device_train_batch_size=0"], "per_device_train_batch_size=0 is not valid: it must be at least 1"),
        (["bf16=maybe"], "bf16=maybe is not valid: it must be true or false"),
        (["resume=1"], "resume=1 is not valid: it must be true or false"),
    ):
        with pytest.raises(ValueError, match=message):
            read_recipe("stage1", overrides)
    with pytest.raises(FileNotFoundError, match="there is no recipe stage9: name a YAML file or one of lora, stage1"):
        read_recipe("stage9")
    with pytest.raises(ValueError, match="smoke_data='x' is unknown"):
        write_smoke_data(tmp_path, "x")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="must hold settings"):
        read_recipe(tmp_path / "list.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    with pytest.raises(ValueError, match="is not valid YAML"):
        read_recipe(tmp_path / "bad.yaml")
    result = train("--config", "stage2", f"output_dir={tmp_path}", *SHORT)
    assert result.exit_code == 2 and "error: the recipe names no model: add model=..." in result.output
    (tmp_path / "one.jsonl").write_text('{"question": "What?", "answer": "This."}\n')
    given = ["model=bundled", f"train_data={tmp_path / 'one.jsonl'}", f"output_dir={tmp_path}"]
    result = train("--config", "stage2", *given, "eval_share=0.1", *SHORT)
    assert result.exit_code == 2 and "has 1 sample, of which none can be put aside" in result.output


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if "/" not in name])
def test_every_recipe_runs_on_a_cpu(name, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("video_ma2mba.files.progress.LINE_SECONDS", 0.0)
    out = tmp_path / "run"
    steps = [] if name == "lora" else ["max_steps=2"]
    epochs = ["num_train_epochs=1"] if name == "lora" else []
    result = train(
        "--config",
        name,
        "--smoke",
        f"output_dir={out}",
        f"model={tiny_checkpoint}",
        *SHORT[:1],
        *SHORT[2:],
        *steps,
        *epochs,
    )
    assert result.exit_code == 0, result.output + str(result.exception)
    assert not set("\r\x1b") & set(result.output)  # no bar where nobody looks: lines
    if steps:
        lines = re.findall(r"^training: 50%, 1/2 steps, 0:\d\d left, [\d.]+/\w+, [\d,]+ tok/s", result.stderr, re.M)
        assert lines, result.stderr
    assert result.stdout.count("\n") == 1
    folder = Path(result.stdout.strip().splitlines()[-1])
    assert folder == (out / "merged" if name == "lora" else out)
    assert "| training | |" in (folder / "README.md").read_text()  # what `push` publishes with
    from video_ma2mba import VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor

    VideoMa2mbaForConditionalGeneration.from_pretrained(folder)
    VideoMa2mbaProcessor.from_pretrained(folder)
    card = (out / "README.md").read_text()
    assert "| optimizer steps | " in card and "| data | " in card

    if name == "stage2":
        again = train("--config", name, "--smoke", f"output_dir={out}", f"model={tiny_checkpoint}", *SHORT)
        assert again.exit_code == 2 and "add resume=true, or another output_dir" in again.output
        options = ["max_steps=3", "resume=true", f"model={tiny_checkpoint}", *SHORT]
        again = train("--config", name, "--smoke", f"output_dir={out}", *options)
        assert again.exit_code == 0, again.output
        assert (out / "checkpoint-3").is_dir()


def test_recipe_fields_are_documented():
    described = Recipe.__doc__.split("Attributes:")[1]
    assert [name for name in Recipe.__dataclass_fields__ if name not in described] == []


@pytest.mark.parametrize("key", ["learning_rate", "max_steps", "weight_decay", "max_frames"])
def test_a_word_for_a_number_is_refused_by_name(key: str, tmp_path):
    with pytest.raises(ValueError, match=f"{key}=abc is not valid: it must be a number"):
        build_recipe({"model": "m", "output_dir": str(tmp_path), key: "abc"})


def test_without_anything_put_aside_nothing_is_evaluated():
    recipe, args = read_recipe("lora", ["eval_share=0", "model=bundled", "train_data=rows.csv"])
    assert (recipe.eval_share, args.eval_strategy.value, args.early_stopping_patience) == (0, "no", None)
    _, args = read_recipe("lora", ["eval_share=0", "eval_data=others.csv"])
    assert args.eval_strategy.value == "epoch"


def test_settings_are_known_without_importing_the_classes():
    """Read in their sources, and the same as the classes have."""
    kinds = (VideoMa2mbaTrainingConfig, Recipe)
    fields = {field.name: field.type for kind in kinds for field in dataclasses.fields(kind) if field.init}
    written = written_settings()
    assert written is not None and written.keys() == fields.keys()
    numbers = {key for key, kind in fields.items() if kind in (float, int, float | None, int | None)}
    assert {key for key in numbers if written[key] not in ("float", "int", "float | None", "int | None")} == set()
