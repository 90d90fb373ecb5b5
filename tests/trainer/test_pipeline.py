"""Pipelines: what their files say, that a killed one goes on, and that each stage trains what it should."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from video_ma2mba.cli.main import app
from video_ma2mba.trainer.pipeline_run import RESULT, SETTINGS, Runs, check_data
from video_ma2mba.trainer.pipeline_settings import first_run, read_pipeline
from video_ma2mba.trainer.recipe import build_recipe
from video_ma2mba.trainer.recipe_files import FOLDER
from video_ma2mba.trainer.setting_names import Recipe, check_recipe
from video_ma2mba.trainer.train_run import build_trainer, lora_config

DATA = ["model=m", "train_data=y"]
STAGES = ("alignment", "pretraining", "short_sft", "context_extension", "long_sft")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("alignment", {"train_parts": "projector", "learning_rate": 1e-3, "warmup_steps": 0.03}),
        ("pretraining", {"train_parts": "lm,projector", "learning_rate": 5e-5, "lr_scheduler_type": "cosine"}),
        ("short_sft", {"train_parts": "lm,projector,vision", "learning_rate": 2e-5}),
        (
            "context_extension",
            {"lora_rank": 8, "lora_alpha": 16, "lora_also": "embeddings,norms", "learning_rate": 2e-5, "packing": True}
            | {"warmup_steps": 2, "weight_decay": 0.0},
        ),
        ("long_sft", {"train_parts": "lm,projector,vision", "num_train_epochs": 6, "fps": 2.0}),
    ],
)
def test_recipes_have_the_papers_settings(name: str, settings: dict):
    content = yaml.safe_load((FOLDER / "longvila" / f"{name}.yaml").read_text())
    assert {key: content[key] for key in settings} == settings
    check_recipe(
        {key: value for key, value in content.items() if key not in ("smoke", "choices", "length", "frames")}
        | {"model": "m", "train_data": "y"}
    )


def test_lengths_grow_and_orders_are_settings():
    runs = read_pipeline("longvila", DATA).runs
    lengths = [run.content["max_length"] for run in runs if run.stages == ("context_extension",)]
    assert lengths == [2**16, 2**18, 2**19, 2**20, 2**21]
    assert [run.numbers for run in runs] == [(1,), (2,), (3,), *[(4,)] * 5, (5,)]
    assert runs[-1].sources == (("short_sft", "y"), ("long_sft", "y")), "long mixed with short"
    assert len({run.folder for run in runs}) == len(runs)
    given = [*DATA, "3.train_data=s", "5.train_data=[l, k]", "5.frames=512", "context_extension.lora_rank=null"]
    for order in ("4-1-2-(3&5)", "4-1-2-3&5"):
        plan = read_pipeline("longvila", [*given, f"order={order}", "context_extension.parts=[{length: 64k}]"])
        assert [run.numbers for run in plan.runs] == [(4,), (1,), (2,), (3, 5)]
        last = plan.runs[-1]
        assert last.sources == (("short_sft", "s"), ("long_sft", ["l", "k"]))
        assert (last.content["max_frames"], last.content["learning_rate"]) == (512, 5e-5)
        assert plan.runs[0].content["lora_rank"] is None
    assert [run.numbers for run in read_pipeline("longvila", [*DATA, "order=[1, long_sft]"]).runs] == [(1,), (5,)]
    assert first_run(plan, "5") == first_run(plan, "short_sft") == 3


def test_own_files_lie_over_a_shipped_pipeline(tmp_path: Path):
    own = tmp_path / "mine.yaml"
    own.write_text(
        "base: longvila\nmodel: here\nsettings: {context_parallel_size: 2, train_data: all}\n"
        "stages:\n  alignment: {train_data: captions.json, learning_rate: 2e-3}\n"
        "  judging: {recipe: longvila/long_sft}\norder: 1-2-3-4-5-judging\n"
        "evaluation: {needles: {frames: 64}}\n"
    )
    plan = read_pipeline(
        own, ["learning_rate=1.0e-6", "short_sft.learning_rate=3.0e-6", "evaluation.needles.needles=2"]
    )
    assert [run.stages[0] for run in plan.runs if not run.part] == [*STAGES[:3], "long_sft", "judging"]
    assert {run.content["context_parallel_size"] for run in plan.runs} == {2}
    rates = {run.stages[0]: run.content["learning_rate"] for run in plan.runs}
    assert rates["alignment"] == 1e-6 and rates["short_sft"] == 3e-6
    assert plan.runs[0].sources == (("alignment", "captions.json"),) and plan.runs[1].sources[0][1] == "all"
    assert plan.evaluation == {"needles": {"frames": 64, "needles": 2}}
    assert str(plan.output_dir) == "runs/longvila" and plan.name == "mine"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*DATA, "rope_theta=1e6"], "'rope_theta' has no counterpart here: a Mamba-2 language model has no rotary"),
        ([*DATA, "context_extension.rope_scaling=2"], "'rope_scaling' has no counterpart here"),
        ([*DATA, "order=1-1"], "order=1-1: alignment comes twice"),
        ([*DATA, "order=1-9"], "'9' is no stage of this pipeline: they are alignment, "),
        ([*DATA, "alignmet.fps=2"], "'alignmet' is no stage of this pipeline: do you mean 'alignment'"),
        (
            [*DATA, "evaluation.world.x=1", "evaluation.neddles.frames=3"],
            "'neddles' is unknown: do you mean 'needles'",
        ),
        ([*DATA, "learning_rat=1"], "'learning_rat' is no setting: do you mean 'learning_rate'"),
        ([*DATA, "check=-1"], "check=-1 is not valid"),
        ([*DATA, "alignment.lora_rank=8", "alignment.lora_also=heads"], "lora_also=heads is not valid"),
        (["train_data=y"], "the pipeline names no model: add model=DIR"),
        ([*DATA, "alignment.output_dir=x"], "stage alignment: output_dir is the pipeline's to decide"),
        ([*DATA, "resume=false"], "stage alignment: resume is always on"),
        ([*DATA, "context_extension.merge_adapter=false"], "leaves no model that the next stage could train"),
        (["stages={}"], "stages=... belongs into a file"),
        (["model=m"], "stage alignment names no data: add alignment.train_data="),
        ([*DATA, "context_extension.length=3M"], "length=3M is not valid: this recipe knows 64k"),
        ([*DATA, "context_extension.parts=64k"], "stage context_extension: parts=64k: give a list of settings"),
        ([*DATA, "context_extension.length=64k"], "its parts differ in length: give context_extension.parts="),
        ([*DATA, "evaluation=5"], "evaluation=5: give kinds of it"),
        ([*DATA, "evaluation.world=true"], "evaluation.world=True: give its options"),
        ([*DATA, "evaluation.start=maybe"], "evaluation.start=maybe is not valid: it must be true or false"),
    ],
)
def test_mistakes_are_said_in_one_sentence(overrides: list[str], message: str):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        read_pipeline("longvila", overrides)


def test_missing_files_and_stages_are_named(tmp_path: Path, tiny_checkpoint: Path):
    def told(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["pipeline", *arguments])
        assert done.exit_code == 2, done.output
        return done.output

    assert "there is no pipeline longvil: name a YAML file or one of longvila" in told("--config", "longvil")
    given = ("--config", "longvila", f"model={tiny_checkpoint}")
    assert "stage alignment: nothing.json: no such file" in told(*given, "train_data=nothing.json")
    assert "--from-stage 7: the stages of this pipeline are 1 (alignment)" in told(
        *given, "train_data=o/d", "--from-stage", "7"
    )
    (tmp_path / "file").touch()
    assert "is a file: name a folder" in told("--config", "longvila", "--smoke", f"output_dir={tmp_path / 'file'}")
    (tmp_path / "bad.yaml").write_text("stages: {one: {fps: 1}}")
    assert "stage one needs either `recipe: NAME` or `world: {...}`" in told("--config", str(tmp_path / "bad.yaml"))


@pytest.mark.parametrize(
    ("config", "override", "message"),
    [
        ("longvila", "evaluation.world.frame=8", "evaluation.world: 'frame' is no setting: do you mean 'frames'"),
        ("longvila", "evaluation.world.frames=8..", "evaluation.world: frames '8..': give a number or a range"),
        ("longvila", "evaluation.world.per_kind=0", "evaluation.world: per_kind=0: must be at least 1"),
        ("longvila", "evaluation.world.device=gpu", "evaluation.world: --device gpu is unknown"),
        ("longvila", "evaluation.needles.depth=0", "evaluation.needles: 'depth' is no setting"),
        ("longvila", "evaluation.needles.frames=[8, x]", "evaluation.needles: --frames 8,x: write numbers"),
        ("longvila", "evaluation.needles.needles=99", "evaluation.needles: --needles 99: at most 24"),
        ("longvila", "evaluation.needles.haystack=a.mp4", "evaluation.needles: --haystack a.mp4: no such video file"),
        ("longvila", "evaluation.benchmarks.tasks=[]", "evaluation.benchmarks: --tasks '' names no task"),
        ("longvila", "long_sft.train_shares=[1]", "stage long_sft: train_shares=[1] has 1 numbers for 2 sources"),
        ("longvila", "long_sft.train_shares=[1, -1]", "stage long_sft: train_shares=[1, -1] is not valid"),
        ("longvila", "alignment.train_shares=[1]", "stage alignment: train_shares is for several sources"),
        ("longvila", "long_sft.shuffle_buffer=9", "stage long_sft: shuffle_buffer is for data that streams"),
        ("longvila", "long_sft.train_parts=head", "stage long_sft: train_parts=head: head is none of lm, projector"),
        ("longvila", "alignment.packing=true", "stage alignment: packing=True needs max_length"),
        ("longvila", "long_sft.carry_state=yes", "stage long_sft: carry_state=True is not valid"),
        ("longvila_world", "short_sft.steps=abc", "stage short_sft: steps=abc is not valid: it must be a number"),
        ("longvila_world", "long_sft.frames=64..8", "stage long_sft: frames '64..8': must be 1 <= shortest"),
        ("longvila_world", "long_sft.memory_budget=10XB", "stage long_sft: memory_budget='10XB' is not a size"),
        ("longvila_world", "long_sft.train_parts=head", "train_parts=head: head is none of lm, projector, vision"),
        ("longvila_world", "long_sft.ramp=0", "stage long_sft: ramp=0: must be a share of training"),
        ("longvila_world", "alignment.head=7", "stage alignment: head=7: must divide 768"),
        ("longvila_world", "alignment.steps=null", "stage alignment: it would never end: give it steps or"),
        ("longvila_world", "alignment.tower_from=x", "stage alignment: tower_from=x: no such folder"),
    ],
)
def test_mistakes_are_told_before_anything_trains(config: str, override: str, message: str, tmp_path: Path):
    given = ["--smoke"] if config == "longvila" else []
    done = CliRunner().invoke(
        app, ["pipeline", "--config", config, *given, f"output_dir={tmp_path / 'out'}", override]
    )
    assert done.exit_code == 2 and message in done.output, done.output
    assert not (tmp_path / "out").exists()


def test_show_tells_what_each_stage_will_do(tiny_checkpoint: Path, tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n')
    given = [f"model={tiny_checkpoint}", f"train_data={tmp_path / 'rows.jsonl'}", f"output_dir={tmp_path / 'out'}"]
    done = CliRunner().invoke(app, ["pipeline", "--config", "longvila", "--show", *given])
    assert done.exit_code == 0, done.output
    assert (
        "trains adapters of rank 8, and embeddings,norms whole at 2e-05 (50 steps, up to 2,097,152 tokens, packed)"
        in done.output
    )
    assert "predicted, a step of 65,536 tokens on an H200: " in done.output and not (tmp_path / "out").exists()


def test_data_are_looked_at_first(tiny_checkpoint: Path, tmp_path: Path):
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text('{"text": "a document"}\n' * 3 + '{"video": "none.mp4", "caption": "gone"}\n')
    bad.write_text('{"video": "none.mp4", "caption": "gone"}\n' * 3)
    given = [f"model={tiny_checkpoint}", f"train_data={good}"]
    told: list[str] = []
    check_data(read_pipeline("longvila", given), 0, told.append)
    assert told and all("1 of 4 samples that were looked at cannot be used, such as" in line for line in told)
    plan = read_pipeline("longvila", [*given, f"2.train_data={bad}", "2.streaming=true"])
    with pytest.raises(ValueError, match="stage pretraining: 3 of 3 samples that were looked at cannot"):
        check_data(plan, 0, told.append)
    told.clear()
    check_data(plan, first_run(plan, "5"), told.append)
    assert len(told) == 1 and told[0].startswith("stage short_sft")


class Noted(Runs):
    """Runs that train nothing, and note what they were asked for."""

    def __init__(self, plan, made: list) -> None:
        super().__init__(plan, lambda model, out: {"model": model}, made.append)
        self.made = made

    def _train(self, run, folder, model):
        self.made.append((run.title, Path(model).name))
        return folder, {"steps": 1}


def test_runs_are_known_again_by_their_settings(tmp_path: Path):
    def go(*overrides: str, first: int = 0, anew: bool = False) -> list:
        made: list = []
        plan = read_pipeline("longvila", [*DATA, f"output_dir={tmp_path}", "order=1-2-5", *overrides])
        Noted(plan, made).carry_out(first, anew)
        return [entry for entry in made if isinstance(entry, tuple)]

    assert go(first=1) == [("pretraining", "m"), ("long_sft", "2_pretraining")], "nothing before: from the model"
    assert go(first=1) == []
    with pytest.raises(ValueError, match=r"its fps was 2.0, now it is 4.*give --from-stage 5 to set it aside"):
        go("5.fps=4", first=1)
    assert go("5.fps=4", first=1, anew=True) == [("long_sft", "2_pretraining")]
    assert (tmp_path / "5_long_sft.old1" / SETTINGS).is_file() and (tmp_path / "5_long_sft" / RESULT).is_file()
    (tmp_path / "2_pretraining" / RESULT).unlink()  # as where it was killed: what comes after it is older
    with pytest.raises(ValueError, match="another checkpoint to start from"):
        go("5.fps=4", first=1)
    assert go("5.fps=4", first=1, anew=True) == [("long_sft", "2_pretraining")]
    with pytest.raises(ValueError, match="its data was"):
        go("5.fps=4", "5.train_data=z", first=1)
    with pytest.raises(ValueError, match="2_pretraining was begun with other settings .another checkpoint to start"):
        go("5.fps=4")


def test_adapters_take_along_what_is_asked_for(make_model: Callable):
    import peft

    model = make_model()
    whole = {"projector": 4, "embeddings": 1, "norms": 5}
    for also, count in whole.items():
        wrapped = peft.get_peft_model(make_model(), lora_config(Recipe(lora_rank=2, lora_also=also), model.config))
        names = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
        assert sum("modules_to_save" in name for name in names) == count, names
        assert all("vision_tower" not in name for name in names)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, make_model: Callable) -> Path:
    """The folder of a smoke run that was killed three times."""
    from video_ma2mba import VideoMa2mbaProcessor, VideoMa2mbaVideoProcessor
    from video_ma2mba.processing.byte_tokenizer import build_byte_tokenizer

    folder = tmp_path_factory.mktemp("pipeline")
    model = make_model(vision={"image_size": 32, "patch_size": 8}, prefill_segment_length=512)
    model.save_pretrained(folder / "model")
    sizes = VideoMa2mbaVideoProcessor(size={"height": 32, "width": 32})
    frame = model.config.tokens_per_frame
    VideoMa2mbaProcessor(build_byte_tokenizer(), sizes, tokens_per_frame=frame).save_pretrained(folder / "model")
    given = [
        f"model={folder / 'model'}",
        "max_steps=1",
        "warmup_steps=0",
        "pretraining.max_steps=4",
        "pretraining.save_steps=2",
        "global_batch_size=2",
        "report_to=none",
    ]
    given += ["evaluation.world.frames=[8]", "evaluation.world.per_kind=1", "evaluation.needles.frames=8"]
    given += ["evaluation.needles.needles=1", "evaluation.needles.depths=0", "use_cpu=true"]
    command = [sys.executable, str(Path(__file__).with_name("killed_pipeline.py")), str(folder / "run"), *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


def test_a_killed_pipeline_goes_on_where_it_was(killed: Path):
    steps: dict[tuple[str, str], list[int]] = {}
    for line in (killed / "run" / "steps.txt").read_text().splitlines():
        life, place, number = line.split()
        numbers = steps.setdefault((life, place), [])
        numbers += [int(number)] if int(number) not in numbers else []
    assert steps == {
        ("step", "1_alignment"): [1],
        ("step", "2_pretraining"): [1, 2, 3, 4],
        ("merge", "2_pretraining"): [3, 4],  # from the checkpoint of step 2 on
        ("merge", "3_short_sft"): [1],
        ("merge", "4_context_extension/64k"): [1],
        ("measure", "4_context_extension/256k"): [1],  # the adapters of 64k were trained, and only had to be merged
        ("measure", "5_long_sft"): [1],
    }
    report = json.loads((killed / "run" / "report.json").read_text())
    assert [run["title"] for run in report["runs"]][0::2] == [
        "start",
        "pretraining",
        "context_extension, 64k",
        "long_sft",
    ]
    assert [run["steps"] for run in report["runs"] if "steps" in run] == [1, 4, 1, 1, 1, 1]
    for run in report["runs"]:
        assert run["evaluation"]["world"][0]["questions"] > 0 and len(run["evaluation"]["needles"]) == 1
        if "steps" in run:
            assert [entry["step"] for entry in run["log"]] == list(range(1, run["steps"] + 1))
            assert run["tokens"] > 0 and run["seconds"] > 0 and run["host_peak_gb"] > 0.1
    with (killed / "run" / "report.csv").open() as file:
        assert [row["max_length"] for row in csv.DictReader(file)] == ["", "", "", "512", "1024", "131072"]
    page = (killed / "run" / "report.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", ""), "the page needs no other file"
    assert page.count("data:image/png;base64,") == 2 and "<td>0 of 1</td>" in page.replace("1 of 1", "0 of 1")
    assert not list((killed / "run").rglob("checkpoint-*")), "what only serves to resume is cleared away"


def test_each_stage_hands_over_what_it_trained_and_only_that(killed: Path):
    """By comparing the checkpoints: names that changed are those that the stage trains."""
    run = killed / "run"
    report = {name: json.loads((run / name / RESULT).read_text()) for name in ("1_alignment", "5_long_sft")}
    assert all(name.startswith("model.multi_modal_projector") for name in report["1_alignment"]["trained_parameters"])
    chain = ["1_alignment", "2_pretraining", "3_short_sft", "4_context_extension/64k/merged"]
    before = load_file(killed / "model" / "model.safetensors")
    changed: dict[str, set[str]] = {}
    for name in [*chain, "4_context_extension/256k/merged", "5_long_sft"]:
        after = load_file(run / name / "model.safetensors")
        changed[name] = {key for key in before if key in after and not before[key].equal(after[key])}
        before = after

    def part(key: str) -> str:
        return "vision" if "vision_tower" in key else "projector" if "projector" in key else "lm"

    parts = {name: {part(key) for key in keys} for name, keys in changed.items()}
    assert parts["1_alignment"] == {"projector"}
    assert parts["2_pretraining"] == {"lm", "projector"}
    assert parts["3_short_sft"] == parts["5_long_sft"] == {"lm", "projector", "vision"}
    extended = changed["4_context_extension/64k/merged"]
    ends = ("in_proj.weight", "out_proj.weight", "norm.weight", "norm_f.weight", "embeddings.weight")
    assert extended and all(key.startswith("model.language_model") and key.endswith(ends) for key in extended)
    assert {end for end in ends for key in extended if key.endswith(end)} == set(ends)


def test_the_rendered_world_has_the_same_stages():
    plan = read_pipeline("longvila_world", ["seed=3", "context_extension.frames=64..128", "alignment.frames=8"])
    assert plan.runs[0].content["frames"] == "8"
    exact = read_pipeline("longvila_world", ["learning_rate=6e-4"])  # which YAML takes for a text
    assert [run.content["learning_rate"] for run in exact.runs] == [6e-4] * 5
    assert plan.model is None and [run.stages for run in plan.runs] == [(name,) for name in STAGES]
    parts = [run.content.get("train_parts") for run in plan.runs]
    assert parts == ["projector", "lm,projector", None, "lm", "lm,projector"]
    assert plan.runs[3].content["frames"] == "64..128" and {run.content["seed"] for run in plan.runs} == {3}
    with pytest.raises(ValueError, match="stage alignment: 'frmes' is unknown: do you mean 'frames'"):
        read_pipeline("longvila_world", ["frmes=3"])


@pytest.mark.parametrize("streaming", [False, True])
def test_sources_are_mixed_by_their_shares(streaming: bool, tmp_path: Path, tiny_checkpoint: Path):
    for name, count in (("many", 60), ("few", 12)):
        rows = [json.dumps({"id": f"{name} {n}", "text": f"{name} {n}"}) + "\n" for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    files = [str(tmp_path / f"{name}.jsonl") for name in ("many", "few")]

    def names(**given: object) -> list[str]:
        content = {"model": str(tiny_checkpoint), "train_data": files, "streaming": streaming, "use_cpu": True}
        content |= {"output_dir": str(tmp_path / "out"), "max_steps": 1, "report_to": "none", "disable_tqdm": True}
        return [row["id"] for row in build_trainer(*build_recipe(content | given)).train_dataset]

    mixed = names(train_shares=[3, 1])
    assert sorted(mixed) == sorted(names()) and len(set(mixed)) == 72, "each row once"
    assert 4 <= sum(name.startswith("few") for name in mixed[:36]) <= 12
    assert names(train_shares=[3, 1]) == mixed and names(train_shares=[1, 1]) != mixed
    plain = names()
    assert [name.split()[0] for name in plain[:4]] == (["many", "few"] * 2 if streaming else ["many"] * 4)
    if streaming:
        drawn = names(shuffle_buffer=20)
        assert drawn != plain and sorted(drawn) == sorted(plain)
    for given, words in (
        ({"train_shares": [1]}, "has 1 numbers for 2 sources"),
        ({"train_shares": [1, 0]}, "must be a list of numbers above 0"),
        ({"train_shares": [1, 1], "train_data": files[0]}, "train_shares is for several sources"),
        *([] if streaming else [({"shuffle_buffer": 5}, "shuffle_buffer is for data that streams")]),
    ):
        with pytest.raises(ValueError, match=words):
            names(**given)
