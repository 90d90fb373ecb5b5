"""LoRA and QLoRA in a plan, against the models that PEFT and bitsandbytes make."""

from datetime import date

import pytest
import torch

import video_ma2mba
from video_ma2mba.modeling_video_ma2mba.cost_time import H200, HostPace
from video_ma2mba.modeling_video_ma2mba.modeling_video_ma2mba import VideoMa2mbaForConditionalGeneration
from video_ma2mba.planning import plan_options, this_machine
from video_ma2mba.planning.adapters import NF4_BYTES, Adapters


@pytest.mark.parametrize("vision", [False, True])
def test_bytes_are_those_of_pefts_model(make_config, vision: bool):
    peft = pytest.importorskip("peft")
    from video_ma2mba.trainer.recipe import Recipe
    from video_ma2mba.trainer.train_run import lora_config

    whole = VideoMa2mbaForConditionalGeneration(make_config()).to(torch.bfloat16)
    model = peft.get_peft_model(whole, lora_config(Recipe(lora_rank=4, lora_vision=vision)))
    trains = [p for p in model.parameters() if p.requires_grad]
    gpu = video_ma2mba.plan(make_config(), frames=5, lora_rank=4, lora_vision=vision).prediction.gpu
    assert gpu["weights"] == sum(p.nbytes for p in model.parameters())
    assert gpu["gradients"] == sum(p.nbytes for p in trains)
    assert gpu["optimizer"] == 2 * gpu["gradients"]


def test_four_bits_are_those_of_bitsandbytes(make_config):
    nn = pytest.importorskip("bitsandbytes").nn
    layer = nn.Linear4bit(1024, 512, bias=False, quant_type="nf4", compress_statistics=True).to("cpu")
    layer(torch.ones(1, 1024))
    state = layer.weight.quant_state
    kept = layer.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert kept == pytest.approx(1024 * 512 * NF4_BYTES, rel=1e-3)


def test_four_bits_save_what_the_projections_take(make_config):
    lora, qlora = (video_ma2mba.plan(make_config(), frames=5, lora_rank=4, four_bit=bits) for bits in (False, True))
    stack = VideoMa2mbaForConditionalGeneration(make_config()).model.language_model
    numbers = sum(m.weight.numel() for layer in stack.layers for m in (layer.mixer.in_proj, layer.mixer.out_proj))
    sides = [(m.in_features, m.out_features) for m in (stack.layers[0].mixer.in_proj, stack.layers[0].mixer.out_proj)]
    adapters = Adapters(4).beside(sides) * len(stack.layers)
    saved = lora.prediction.gpu["weights"] - qlora.prediction.gpu["weights"]
    assert saved == pytest.approx(numbers * (2 - NF4_BYTES) + 2 * adapters, abs=2)  # TRL's adapters are bf16 then
    assert qlora.prediction.gpu["gradients"] < lora.prediction.gpu["gradients"]
    assert qlora.to_dict()["adapters"] == {"rank": 4, "vision": False, "four_bit": True}


def test_small_cards_fit_with_adapters_and_fewer_frames_in_the_tower():
    from video_ma2mba import Ma2mbaTextConfig, VideoMa2mbaConfig

    small = VideoMa2mbaConfig(text_config=Ma2mbaTextConfig(hidden_size=1024, num_hidden_layers=48))
    large = VideoMa2mbaConfig()  # 2.7B
    memory = {"gpu_memory": "10GB", "host_memory": "32GB"}
    whole = video_ma2mba.plan(small, frames=600, **memory)
    assert 4 <= whole.prediction.vision_chunk < small.vision_chunk_frames
    assert whole.prediction.gpu_peak < 10e9
    assert video_ma2mba.plan(large, frames=600, lora_rank=16, four_bit=True, **memory).prediction.gpu_peak < 10e9
    with pytest.raises(ValueError, match="adapters"):
        video_ma2mba.plan(large, frames=600, **memory)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gpu_memory": "80"}, "'80' has no unit: write 80GB"),
        ({"gpu_memory": 80}, "gpu_memory=80 is a number of bytes: write '80GB'"),
        ({"host_memory": 64.0}, "host_memory=64.0 is a number of bytes"),
        ({"lora_rank": 0}, "lora_rank=0"),
        ({"lora_vision": True}, "give lora_rank"),
        ({"four_bit": True}, "give lora_rank"),
        ({"lora_rank": 4, "train": ("lm",)}, "leave train away"),
        ({"launch_us": 0}, "launch_us=0"),
    ],
)
def test_wrong_arguments(make_config, arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        video_ma2mba.plan(make_config(), frames=1, **arguments)


def test_without_memory_given_it_is_this_machines(make_config, monkeypatch: pytest.MonkeyPatch, tmp_path):
    there = video_ma2mba.plan(make_config(), frames=1)
    if this_machine.gpu_here() is None:
        assert (there.gpu_memory, there.gpu, there.host) == (80 * 10**9, "assumed: no GPU here", "assumed")
    monkeypatch.setattr(plan_options, "gpu_here", lambda: ("NVIDIA GeForce RTX 3060", 12 << 30))
    here = video_ma2mba.plan(make_config(), frames=1)
    assert (here.gpu_memory, here.gpu) == (12 << 30, "this machine's NVIDIA GeForce RTX 3060")
    assert here.host == "this machine's" and here.host_memory == this_machine.host_memory_here()


def test_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\ncase "$*" in *--id=1*) echo "B, 24564";; *) echo "NVIDIA A, 81559";; esac\n', "utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert this_machine.gpu_here() == ("NVIDIA A", 81559 << 20)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert this_machine.gpu_here() == ("B", 24564 << 20)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert this_machine.gpu_here() is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    tool.write_text("#!/bin/sh\nexit 9\n", "utf-8")
    assert this_machine.gpu_here() is None


def test_what_a_launch_takes_is_remembered_for_this_machine(make_config, monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(this_machine, "gpu_here", lambda: ("Some GPU", 80 << 30))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("video_ma2mba.planning.this_machine.measure_host", lambda: HostPace(2e-5, share[0]))

    share = [1.0]

    def planned(**how):
        report = video_ma2mba.plan(make_config(), frames=4, **how)
        return report.launch_us, report.launch_from

    assert planned() == (pytest.approx(1e6 * H200.launch), "assumed")
    assert planned(launch_us="here") == (pytest.approx(20), "measured here")
    assert planned() == (pytest.approx(20), f"measured here on {date.today().isoformat()}")
    assert planned(launch_us=9.0) == (9, "as asked")
    alone, share[0] = video_ma2mba.plan(make_config(), frames=4, launch_us="here"), 0.5
    beside = video_ma2mba.plan(make_config(), frames=4, launch_us="here")
    assert beside.prediction.step_seconds == pytest.approx(2 * alone.prediction.step_seconds, rel=1e-6)
    assert planned()[0] == pytest.approx(20)  # others may be gone
    monkeypatch.setattr(this_machine.platform, "node", lambda: "another")
    assert planned()[1] == "assumed"
    this_machine._launches_file().write_text("broken")
    assert planned()[1] == "assumed"
