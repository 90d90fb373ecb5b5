"""What a card says about memory and speed is what the benchmarks' tables hold for its size, and nothing else."""

import copy
from pathlib import Path

import pytest

from video_ma2mba import BUNDLED_CHECKPOINT, VideoMa2mbaConfig
from video_ma2mba.conversion.compose import PRESETS, compose
from video_ma2mba.hub_cards.hub_folder import write_hub_folder
from video_ma2mba.hub_cards.measured_cost import RESULTS, measured_cost, size_name

STEPS = """\
hardware,date,model,tokens,method,plan,tokens_per_s,gpu_peak_gb,host_gb
A GPU,2030-01-02,2.7b,65536,off,,does not fit,,
A GPU,2030-01-02,2.7b,65536,per_layer,l=1 s=65536 gpu,20000,50.5,0.0
A GPU,2030-01-02,2.7b,65536,multi_axis,l=2 s=4096 host,19000,4.5,9.0
A GPU,2030-01-02,2.7b,65536,slow,l=4 s=4096 host,18000,6.5,9.0
A GPU,2030-01-02,2.7b,65536,"l8 (first step)",l=8 s=512 host,17000,1.5,9.0
A GPU,2030-01-02,2.7b,1024,warm,l=1 s=1024 gpu,200,1.0,0.0
A GPU,2030-01-02,370m,1440000,multi_axis,l=1 s=4096 gpu,90000,1.0,0.0
"""


READINGS = """\
date,hardware,model,video,frames,file to first answer (s),GPU peak (GB)
2030-01-02,A GPU,"CLIP-L + 2.7b, random, bf16",an hour of film,3600,30.5,6.8
2030-01-02,A GPU,"CLIP-L + 2.7b, random, bf16",an hour of film,3600,25.5,8.3
2030-01-02,A GPU,"CLIP-L + 2.7b, random, bf16",a minute,60,1.5,5.3
2030-01-02,A CPU,"bundled, fp32",an hour of film,3600,99.5,
"""


@pytest.fixture(scope="module", params=PRESETS)
def preset(request, tmp_path_factory) -> tuple[str, VideoMa2mbaConfig]:
    folder = tmp_path_factory.mktemp("preset")
    compose(None, None, request.param, folder, config_only=True)
    return request.param, VideoMa2mbaConfig.from_pretrained(folder)


def test_sizes_are_told_apart(preset, make_config):
    name, config = preset
    assert size_name(config) == name
    other = copy.deepcopy(config)
    other.text_config.num_hidden_layers += 1
    assert size_name(other) is None
    assert size_name(make_config()) is None
    assert measured_cost(make_config()) is None


def test_only_rows_of_the_same_size(preset, tmp_path: Path):
    name, config = preset
    assert measured_cost(config, tmp_path) is None  # an installed package has no tables
    (tmp_path / "ma_gc.csv").write_text(STEPS)
    text = measured_cost(config, tmp_path)
    if name == "1.3b":
        assert text is None
    elif name == "370m":
        assert "**10,000 frames, 2:46:40 at one frame a second** (1,440,000 tokens) on one A GPU (2030-01-02)" in text
    else:
        assert [line for line in text.splitlines() if line.startswith("| 65,536")] == [
            "| 65,536 (455) | 1 layer × 65,536 tokens a cell, checkpoints on the GPU | 20,000 | 50.5 GB | 0.0 GB |",
            "| 65,536 (455) | 2 layers × 4,096 tokens a cell, checkpoints in host memory | 19,000 | 4.5 GB | 9.0 GB |",
        ]
        assert "1,024" not in text


def test_reading_on_a_gpu(preset, tmp_path: Path):
    name, config = preset
    (tmp_path / "read_overlap.csv").write_text(READINGS)
    text = measured_cost(config, tmp_path)
    if name != "2.7b":
        assert text is None
        return
    assert "**3,600 frames, 1:00:00 at one frame a second** (an hour of film) on one A GPU (2030-01-02)" in text
    assert "first answer 25.5 s, within 8.3 GB" in text


@pytest.mark.bundled
def test_the_bundled_checkpoints_card(tmp_path: Path):
    write_hub_folder(BUNDLED_CHECKPOINT, tmp_path, "me/small")
    card = (tmp_path / "README.md").read_text()
    assert "## Memory and speed" in card
    assert "Longest video read: **3,600 frames, 1:00:00 at one frame a second** on x86_64 CPU" in card
    measured = (RESULTS / "long_video_memory.csv").read_text().splitlines()[-1].split(",")
    assert f"| 3,600 | {measured[2]} s | {measured[3]} s | {measured[5]} MB |" in card
    assert "trained on: **" not in card  # no training step of this size was measured
