"""`video-ma2mba plan`."""

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from video_ma2mba.cli.main import app


def run(*arguments: str):
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "160"})


def test_people_read_the_plan_the_breakdown_and_the_table():
    result = run("--preset", "2.7b", "--frames", "7200")
    assert result.exit_code == 0, result.output
    assert "1,037,312 tokens (7,200 frames)" in result.output
    assert "gradient_checkpointing_enable(" in result.output
    for part in ("weights", "gradients", "optimizer", "cell", "host memory", "per_layer", "longest sample that fits"):
        assert part in result.output


def test_programs_read_json():
    result = run("--preset", "370m", "--frames", "7200", "--gpu-memory", "24GB", "--json", "--train", "lm,projector")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["frames"] == 7200
    assert data["gpu_peak_bytes"] < 24e9
    assert data["longest"]["frames"] >= 7200
    assert {row["method"] for row in data["considered"]} >= {"off", "per_layer", "sqrt"}


def test_a_saved_configuration_is_enough(tmp_path: Path, make_config):
    make_config().save_pretrained(tmp_path)
    result = run("--model", str(tmp_path), "--tokens", "1000", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["tokens"] == 1000


def test_frames_are_counted_in_a_video(tmp_path: Path, make_config):
    make_config().save_pretrained(tmp_path / "model")
    (tmp_path / "frames").mkdir()
    for i in range(5):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "frames" / f"{i}.png")
    result = run("--model", str(tmp_path / "model"), "--video", str(tmp_path / "frames"), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["frames"] == 5


def test_several_gpus_and_reading():
    size = ("--preset", "2.7b", "--tokens", "1048576", "--gpus", "2")
    memory = ("--gpu-memory", "141GB", "--host-memory", "256GB")
    result = run(*size, *memory)
    assert result.exit_code == 0, result.output
    for part in ("on 2 GPUs with 141.0 GB each", "segments dealt to 2 GPUs", "GB on one machine", "one GPU: 7"):
        assert part in result.output, result.output
    result = run(*size, "--reading")
    assert result.exit_code == 0, result.output
    assert "131 segments dealt to 2 GPUs, 8 blocks of layers" in result.output and "one GPU: " in result.output
    data = json.loads(run(*size, "--reading", "--json").stdout)
    assert data["gpus"] == 2 and data["total_seconds"] < data["one_gpu_seconds"]


def test_plot_is_a_picture(tmp_path: Path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "memory.png"
    result = run("--preset", "2.7b", "--frames", "100", "--json", "--plot", str(picture))
    assert result.exit_code == 0, result.output
    json.loads(result.stdout)
    with Image.open(picture) as image:
        assert min(image.size) > 400
        assert len(image.convert("RGB").getcolors(1 << 24)) > 10


def test_people_read_what_was_assumed_and_what_trains():
    said = run("--preset", "2.7b", "--frames", "600", "--qlora", "16", "--host-memory", "64GB").output
    assert "adapters of rank 16 (QLoRA, 4-bit weights) and the projector" in said
    assert "vision_chunk_frames = " in said and "µs a launch (assumed; --launch-us here measures it)" in said
    assert ("80.0 GB (assumed: no GPU here; --gpu-memory)" in said) or ("this machine's" in said)
    slow, fast = (
        json.loads(run("--preset", "370m", "--frames", "600", "--launch-us", us, "--json").stdout)["step_seconds"]
        for us in ("40", "2")
    )
    assert slow > fast
    said = run("--preset", "2.7b", "--frames", "7200", "--launch-us", "9", "--host-memory", "500GB").output
    assert "9.0 µs a launch (as asked)" in said and "host memory is page-locked, about " in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preset", "2.7b", "--frames", "3", "--gpu-memory", "80"), "'80' has no unit: write 80GB"),
        (("--preset", "2.7b", "--frames", "3", "--lora", "4", "--qlora", "4"), "either --lora or --qlora"),
        (("--preset", "2.7b", "--frames", "3", "--lora-vision"), "give --lora or --qlora"),
        (("--preset", "2.7b", "--frames", "3", "--lora", "4", "--train", "lm"), "leave train away"),
        (("--preset", "2.7b", "--frames", "3", "--launch-us", "quick"), "--launch-us quick"),
        (("--preset", "2.7b"), "exactly one of --frames, --tokens, --video"),
        (("--preset", "2.7b", "--frames", "3", "--tokens", "9"), "exactly one of"),
        (("--preset", "9b", "--frames", "3"), "370m, 1.3b, 2.7b"),
        (("--preset", "2.7b", "--model", "here", "--frames", "3"), "either --model or --preset"),
        (("--preset", "2.7b", "--frames", "3", "--gpu-memory", "8GB"), "cannot hold the model"),
        (("--preset", "2.7b", "--frames", "1000000"), "no plan fits"),
        (("--preset", "2.7b", "--frames", "3", "--train", "lm,head"), "'head'"),
        (("--preset", "2.7b", "--frames", "3", "--plot", "plot.jpg"), "name a .png file"),
        (("--preset", "2.7b", "--frames", "3", "--plot", "no/such/plot.png"), "there is no folder 'no/such'"),
        (("--model", "no/where/at/all", "--frames", "3"), "no/where/at/all"),
        (("--preset", "2.7b", "--video", "missing.mp4"), "missing.mp4"),
    ],
)
def test_wrong_input_ends_with_one_line_and_code_2(arguments: tuple[str, ...], message: str):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
