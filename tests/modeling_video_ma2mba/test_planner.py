"""Predictions against what PyTorch and the engine really keep; choices against the budgets."""

import gc
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import video_ma2mba
from video_ma2mba import Ma2mbaTextConfig, VideoMa2mbaConfig
from video_ma2mba.modeling_video_ma2mba import planner, recompute_engine, recompute_store
from video_ma2mba.modeling_video_ma2mba.cost_memory import (
    StackShape,
    Workload,
    kept_bytes,
    saved_per_token,
)
from video_ma2mba.modeling_video_ma2mba.cost_search import (
    Limits,
    block_sizes,
    candidate_plans,
    fastest,
    footprint,
    longest_that_fits,
    segment_lengths,
)
from video_ma2mba.modeling_video_ma2mba.cost_step import StepJob, layer_parameter_count, predict, predict_job
from video_ma2mba.modeling_video_ma2mba.cost_vision import VisionLoad
from video_ma2mba.modeling_video_ma2mba.mixer_mamba2 import CoreBackends, run_blocks
from video_ma2mba.modeling_video_ma2mba.planner import (
    choose_plan,
    out_of_memory_message,
)
from video_ma2mba.modeling_video_ma2mba.recompute_plan import RecomputePlan, RecomputeSettings
from video_ma2mba.modeling_video_ma2mba.recompute_schedule import ORDERS
from video_ma2mba.modeling_video_ma2mba.stack_language_model import Ma2mbaTextModel
from video_ma2mba.modeling_video_ma2mba.state_video import VideoState
from video_ma2mba.modeling_video_ma2mba.vision_features import encode_frames

PAPER = Ma2mbaTextConfig()  # 2.7B


def paper_job(tokens: int, **fields) -> StepJob:
    shape = StackShape.of(PAPER)
    fields = {"kept": 1024, "layer_parameters": layer_parameter_count(shape)} | fields
    return StepJob(shape, Workload(tokens, **fields))


class Recorder:
    """Bytes of what autograd saves for backward, without parameters, every storage once."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.kept: dict[int, Tensor] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in self.parameters:
            self.kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    @property
    def nbytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self.kept.values())


# ------------------------------------------------------------------------------------- terms against reality
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"hidden_size": 128},
        {"state_size": 32},
        {"head_dim": 32},
        {"chunk_size": 64},
        {"n_groups": 2},
    ],
)
def test_saved_activations_of_the_plain_scan(make_text_config, sizes: dict):
    base = {"hidden_size": 64, "state_size": 16, "head_dim": 16, "chunk_size": 32}
    config = make_text_config(**(base | sizes))
    model = Ma2mbaTextModel(config)
    tokens, nbytes = 512, []
    for layers in (1, 2):
        recorder = Recorder(model)
        x = torch.randn(1, tokens, config.hidden_size, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(recorder.pack, lambda tensor: tensor):
            run_blocks(model.layers[:layers], x, [None] * layers)
        nbytes.append(recorder.nbytes)
    expected = saved_per_token(StackShape.of(config, compute=4, kernels=False))
    assert (nbytes[1] - nbytes[0]) / tokens == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("tower", ["clip_vision_model", "siglip_vision_model"])
def test_saved_activations_of_the_tower(make_config, tower: str, autocast: bool):
    vision = {"model_type": tower, "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4}
    frames, nbytes = 3, []
    for layers in (1, 2):
        config = make_config(vision=vision | {"num_hidden_layers": layers}, vision_feature_layer=-1)
        model = video_ma2mba.VideoMa2mbaForConditionalGeneration(config).model.vision_tower
        recorder = Recorder(model)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            torch.autograd.graph.saved_tensors_hooks(recorder.pack, lambda tensor: tensor),
        ):
            encode_frames(model, config, torch.rand(frames, 3, 16, 16))
        # Weights that autocast has cast are there once, however many frames.
        cast = sum(2 * p.numel() for p in model.encoder.layers[0].parameters() if p.ndim == 2) if autocast else 0
        nbytes.append(recorder.nbytes - layers * cast)
    load = VisionLoad.of(
        config,
        frames,
        tower_trains=True,
        projector_trains=True,
        tower_parameters=0,
        projector_parameters=0,
        weight_bytes=4,
    )
    expected = load.tower.kept_bytes(compute=2 if autocast else 4, weight_bytes=4) / load.tower.layers
    assert (nbytes[1] - nbytes[0]) / frames == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("plan", [(1, 8), (2, 5), (3, 100), (5, 7)])
@pytest.mark.parametrize("batch", [1, 2])
def test_kept_activations_are_what_the_engine_stores(make_text_config, monkeypatch, plan: tuple[int, int], batch: int):
    most = 0

    class Counting(recompute_store.DeviceStore):
        def put(self, key, tensors):
            nonlocal most
            super().put(key, tensors)
            most = max(most, sum(t.nbytes for kept in self._items.values() for t in kept if t is not None))

    monkeypatch.setattr(recompute_engine, "DeviceStore", Counting)
    config = make_text_config(num_hidden_layers=5)
    model = Ma2mbaTextModel(config).train()
    model.set_checkpointing(True, layers_per_block=plan[0], segment_length=plan[1], offload=False)
    tokens = 23
    hidden, _ = model.scan(torch.randn(batch, tokens, config.hidden_size, requires_grad=True))
    forward = most
    hidden.sum().backward()
    shape = StackShape.of(config, compute=4, kernels=False)
    expected = sum(kept_bytes(shape, Workload(tokens, batch), RecomputePlan(*plan)))
    assert forward == expected
    assert most <= expected + batch * plan[1] * config.hidden_size * 4  # a block's gradient replaces its input


@pytest.mark.parametrize("plan", [(1, 8), (2, 5)])
def test_orders_keep_what_was_predicted(make_text_config, monkeypatch, plan: tuple[int, int]):
    """Forward keeps the same in any order; backward in other orders never holds more beside its sums."""
    most = 0

    class Counting(recompute_store.DeviceStore):
        def put(self, key, tensors):
            nonlocal most
            super().put(key, tensors)
            most = max(most, sum(t.nbytes for kept in self._items.values() for t in kept if t is not None))

    monkeypatch.setattr(recompute_engine, "DeviceStore", Counting)
    config = make_text_config(num_hidden_layers=5)
    model = Ma2mbaTextModel(config).train()
    tokens = 23
    expected = sum(kept_bytes(StackShape.of(config, 4, kernels=False), Workload(tokens), RecomputePlan(*plan)))
    for forward, backward in itertools.product(ORDERS, ORDERS):
        most, orders = 0, {"forward_order": forward, "backward_order": backward}
        model.set_checkpointing(True, layers_per_block=plan[0], segment_length=plan[1], offload=False, **orders)
        hidden = model.scan(torch.randn(1, tokens, config.hidden_size, requires_grad=True))[0]
        assert most == expected
        hidden.sum().backward()
        assert most <= expected + plan[1] * config.hidden_size * 4


def test_other_orders_than_the_usual_ones_take_more():
    """Sums of all blocks at a time; a stream that comes back from the host."""
    shape, length = StackShape.of(PAPER), {"tokens": 2**17, "kept": 512, "input_on_gpu": False}
    usual = predict(PAPER, RecomputePlan(4, 8192, True), **length)
    backward = predict(PAPER, RecomputePlan(4, 8192, True, backward_order="segment_major"), **length)
    others = 60 * 4 * layer_parameter_count(shape) + 64 * shape.state_bytes  # fp32 sums, and gradients of states
    assert backward.phases["backward"] - usual.phases["backward"] == others
    assert backward.phases["end of a cell's backward"] - usual.phases["end of a cell's backward"] == others
    forward = predict(PAPER, RecomputePlan(4, 8192, True, forward_order="block_major"), **length)
    assert forward.phases["forward"] - usual.phases["forward"] == 2 * 8192 * shape.stream * shape.width
    on_gpu = [predict(PAPER, RecomputePlan(4, 8192, False, order), 2**17) for order in ORDERS]
    assert len({p.phases["forward"] for p in on_gpu}) == 1


def test_backends_are_asked_what_they_keep_and_reach():
    """The figures follow an operation's declaration."""
    shape = StackShape.of(PAPER)
    ssd = shape.backends.ssd
    other = replace(ssd, kept_bytes=lambda **sizes: ssd.kept_bytes(**sizes) + 100, longest_call=lambda row: 7)
    changed = replace(shape, backends=replace(shape.backends, ssd=other))
    assert saved_per_token(changed) == saved_per_token(shape) + 100
    assert changed.longest_segment == 7
    theirs = StackShape.of(PAPER, kernels=CoreBackends.named("mamba_ssm").costs)
    assert theirs.longest_segment == 2**31 // shape.projected < shape.longest_segment  # ours count in 64 bits


def test_sizes_of_state_and_parameters(make_text_config):
    config = make_text_config(num_hidden_layers=3, n_groups=2)
    shape = StackShape.of(config, compute=4)
    assert VideoState.zeros(config, 1, dtype=torch.float32).nbytes == 3 * shape.state_bytes
    model = Ma2mbaTextModel(config)
    assert sum(p.numel() for p in model.layers.parameters()) == 3 * layer_parameter_count(shape)


def test_breakdown_adds_up_and_names_every_part():
    prediction = predict(PAPER, RecomputePlan(4, 16384, True), 2**18, kept=1000)
    assert prediction.gpu_peak == sum(prediction.gpu.values()) == max(prediction.phases.values())
    assert {"weights", "gradients", "prefetch", "cell", "gradient sums", "states", "input"} <= prediction.gpu.keys()
    assert prediction.above_weights < prediction.gpu_peak
    assert prediction.host_peak == prediction.host["kept activations"] > 0


def test_memory_on_the_gpu_does_not_grow_with_length_when_everything_waits_on_the_host():
    plan = RecomputePlan(4, 8192, True)
    short, long = (predict(PAPER, plan, 2**n, kept=1024, input_on_gpu=False) for n in (16, 22))
    assert short.above_weights == long.above_weights
    assert long.host_peak > 60 * short.host_peak


def test_frozen_layers_need_less():
    everything = predict(PAPER, RecomputePlan(4, 8192), 2**16)
    frozen = predict(PAPER, RecomputePlan(4, 8192), 2**16, layer_parameters=0, projections_train=False)
    assert frozen.above_weights < everything.above_weights
    assert frozen.gpu["gradients"] == 0 and frozen.gpu["gradient sums"] == 0
    assert frozen.step_seconds < everything.step_seconds


# ------------------------------------------------------------------------------------------------- choosing
def test_segment_lengths_are_multiples_of_256_and_few():
    lengths = segment_lengths(2**20, 200_000)
    assert len(lengths) < 60 and max(lengths) <= 200_000 and min(lengths) == 256
    assert all(s % 256 == 0 for s in lengths)
    assert segment_lengths(1000, 10**6)[0] == 1000
    assert segment_lengths(100, 10**6) == [100]
    assert segment_lengths(10**6, 1000) == [768, 512, 256]


def test_block_sizes_are_one_per_number_of_blocks():
    sizes = block_sizes(64)
    assert sizes[0] == 1 and sizes[-1] == 64
    assert len({math.ceil(64 / n) for n in sizes}) == len(sizes) < 20


@pytest.mark.parametrize("power", [12, 16, 20])
@pytest.mark.parametrize("budget", [5e9, 12e9, 60e9])
def test_choice_is_the_fastest_that_fits(power: int, budget: float):
    job = paper_job(2**power, input_on_gpu=False)
    limits = Limits(budget, 100e9)
    plans = list(candidate_plans(job))
    assert len(plans) < 1500
    chosen = fastest(job, plans, limits)
    fitting = [p for p in (predict_job(job, plan) for plan in plans) if limits.allow(p, 0.04)]
    if chosen is None:
        assert not fitting
        return
    assert chosen.above_weights <= budget and chosen.host_peak <= 100e9
    quickest = min(p.step_seconds for p in fitting)
    assert chosen.step_seconds <= 1.01 * quickest
    assert footprint(chosen) == min(footprint(p) for p in fitting if p.step_seconds <= 1.01 * quickest)


def test_more_memory_never_makes_a_slower_plan():
    job = paper_job(2**18, input_on_gpu=False)
    plans = list(candidate_plans(job))
    seconds = [fastest(job, plans, Limits(gb * 1e9, 60e9)).step_seconds for gb in (6, 8, 12, 24, 48)]
    assert all(later <= earlier * 1.01 for earlier, later in itertools.pairwise(seconds))


def test_longest_is_where_fitting_ends():
    job = paper_job(4096, input_on_gpu=False)
    limits = Limits(10e9, 60e9)
    longest = longest_that_fits(job, limits, 2**26)

    def fits(tokens: int) -> bool:
        longer = paper_job(tokens, input_on_gpu=False)
        return fastest(longer, candidate_plans(longer), limits) is not None

    assert fits(longest)
    assert not fits(int(longest * 1.03))


def small_model(make_text_config, layers: int = 6) -> Ma2mbaTextModel:
    return Ma2mbaTextModel(make_text_config(num_hidden_layers=layers)).train()


def test_settings_are_honoured(make_text_config):
    model, x = small_model(make_text_config), torch.randn(1, 2048, 16)
    assert choose_plan(RecomputeSettings(segment_length=77), model, x, None).segment_length == 77
    assert choose_plan(RecomputeSettings(layers_per_block=4), model, x, None).layers_per_block == 4
    assert choose_plan(RecomputeSettings(layers_per_block=99), model, x, None).layers_per_block == 6
    assert choose_plan(RecomputeSettings(offload=True), model, x, None).offload
    assert not choose_plan(RecomputeSettings(), model, x, None).offload
    assert choose_plan(RecomputeSettings(method="sqrt"), model, x, None) == RecomputePlan(2, 2048)


def test_budget_decides_and_the_plan_is_kept(make_text_config, monkeypatch):
    model, x = small_model(make_text_config), torch.randn(1, 4096, 16)
    large = choose_plan(RecomputeSettings(memory_budget="10GB"), model, x, None)
    limited = RecomputeSettings(memory_budget="60MB")
    small = choose_plan(limited, model, x, None)
    job = planner.describe_batch(model, x, None)
    assert predict_job(job, small).above_weights <= 60e6 < predict_job(job, large).above_weights
    monkeypatch.setattr(planner, "candidate_plans", lambda *a, **k: pytest.fail("searched again"))
    assert choose_plan(limited, model, x, None) == small


def test_what_does_not_fit_is_an_error_that_says_what_would(make_text_config):
    model, x = small_model(make_text_config), torch.randn(2, 4096, 16)
    with pytest.raises(ValueError, match="no checkpointing plan fits 2 x 4096 tokens") as error:
        choose_plan(RecomputeSettings(memory_budget="40MB"), model, x, None)
    message = str(error.value)
    assert "What would fit:" in message and "fewer rows per batch" in message
    wanted = message.rsplit("memory_budget of ", 1)[1].removesuffix(".")
    choose_plan(RecomputeSettings(memory_budget=wanted), model, x, None)


def test_fixing_less_is_offered(make_text_config):
    model, x = small_model(make_text_config), torch.randn(1, 4096, 16)
    keep = torch.arange(4096)[None] > 4000
    limited = RecomputeSettings(memory_budget="10MB")
    assert choose_plan(limited, model, x, keep).segment_length < 4096
    with pytest.raises(ValueError, match="instead of what the settings fix"):
        choose_plan(RecomputeSettings(memory_budget="10MB", segment_length=4096), model, x, keep)


def test_a_fixed_plan_is_held_against_a_budget_only_if_one_was_given(make_text_config):
    model, x = small_model(make_text_config), torch.randn(1, 4096, 16)
    keep = torch.arange(4096)[None] > 4000
    assert choose_plan(RecomputeSettings(method="per_layer"), model, x, keep) == RecomputePlan(1, 4096)
    assert (
        choose_plan(RecomputeSettings(method="per_layer", memory_budget="1GB"), model, x, keep).layers_per_block == 1
    )
    with pytest.raises(ValueError, match="What would fit: the plan '.*' instead of what the settings fix"):
        choose_plan(RecomputeSettings(method="per_layer", memory_budget="10MB"), model, x, keep)


@pytest.mark.parametrize("fixed", [{"method": "per_layer"}, {"segment_length": 300_000}])
def test_segments_beyond_the_kernels_offsets_are_refused(make_text_config, monkeypatch, fixed: dict):
    model = small_model(make_text_config, layers=1)
    job = paper_job(2**19)
    theirs = StackShape.of(PAPER, kernels=CoreBackends.named("mamba_ssm").costs)
    monkeypatch.setattr(planner, "describe_batch", lambda *_: replace(job, shape=theirs))
    with pytest.raises(ValueError, match="segment_length to at most 203052"):
        choose_plan(RecomputeSettings(**fixed), model, torch.empty(1, 2**19, 16, device="meta"), None)
    assert (
        choose_plan(RecomputeSettings(memory_budget="1TB"), model, torch.randn(1, 9, 16), None).segment_length < 203052
    )


def test_a_training_step_asks_the_planner(make_text_config):
    model = small_model(make_text_config)
    model.set_checkpointing(True, memory_budget="10MB")
    x = torch.randn(1, 3000, 16, requires_grad=True)
    model.scan(x, output_positions=torch.arange(3000)[None] > 2990)[0].sum().backward()
    assert model.engine.last_plan.segment_length < 3000
    assert torch.isfinite(x.grad).all()


def test_running_out_of_memory_names_the_next_smaller_plan(make_text_config):
    model, x = small_model(make_text_config), torch.randn(1, 4096, 16)
    plan = choose_plan(RecomputeSettings(layers_per_block=6, segment_length=4096, offload=False), model, x, None)
    job, device = planner.describe_batch(model, x, None), torch.device("cpu")
    message = out_of_memory_message(plan, job, device, "backward", RuntimeError("tried to allocate 2 GiB"))
    assert str(plan) in message and "backward" in message and "tried to allocate 2 GiB" in message
    smaller = [int(message.split(f"{name}=")[1].split(",")[0]) for name in ("layers_per_block", "segment_length")]
    assert smaller[0] * smaller[1] < 6 * 4096
    smallest = RecomputePlan(1, 256)
    last = out_of_memory_message(smallest, job, device, "forward", RuntimeError("full"))
    assert str(smallest) in last and "full" in last


# ------------------------------------------------------------------------------------------------- plan(...)
def test_plan_from_a_configuration():
    report = video_ma2mba.plan(VideoMa2mbaConfig(), frames=7200)
    assert (report.tokens, report.frames) == (7200 * 144 + 512, 7200)
    assert report.prediction.gpu["weights"] == pytest.approx(2 * 3.015e9, rel=0.002)
    assert report.prediction.gpu_peak < 80e9 and report.prediction.host_peak < 0.85 * 128e9
    assert report.longest_frames >= 7200
    methods = {row.method: row.fits for row in report.considered}
    assert not methods["off"] and not methods["per_layer"] and not methods["sqrt"]
    data = json.loads(json.dumps(report.to_dict()))
    assert data["gpu_peak_bytes"] == sum(data["gpu_bytes"].values())
    assert data["longest"]["duration"].count(":") == 2
    again = RecomputeSettings(**report.checkpointing_arguments)
    assert again.fixed_plan(64, report.tokens) == report.plan


def test_a_short_video_needs_no_checkpointing():
    report = video_ma2mba.plan(VideoMa2mbaConfig(), frames=8)
    assert report.method == "off" and report.plan is None and report.checkpointing_arguments is None


def test_plan_of_a_model_follows_what_it_trains(make_model, make_config):
    model = make_model()
    everything = video_ma2mba.plan(model, frames=50)
    assert everything.prediction.gpu == video_ma2mba.plan(make_config(), frames=50).prediction.gpu
    model.model.language_model.requires_grad_(False)
    less = video_ma2mba.plan(model, frames=50)
    assert less.prediction.gpu["gradients"] < everything.prediction.gpu["gradients"]
    only = video_ma2mba.plan(make_config(), frames=50, train=("projector",))
    projector = model.model.multi_modal_projector
    assert only.prediction.gpu["gradients"] == 2 * sum(p.numel() for p in projector.parameters())
    assert only.prediction.gpu["optimizer"] == 2 * only.prediction.gpu["gradients"]


def test_plan_of_a_language_model_alone(make_text_config):
    from transformers import Mamba2Config

    assert video_ma2mba.plan(make_text_config(), tokens=5000).longest_frames is None
    config = Mamba2Config(hidden_size=64, num_heads=8, head_dim=16, state_size=16, n_groups=1, num_hidden_layers=2)
    assert video_ma2mba.plan(config, tokens=5000).tokens == 5000
    with pytest.raises(ValueError, match="frames need a vision tower"):
        video_ma2mba.plan(make_text_config(), frames=5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames": 10, "gpu_memory": "16GB"}, "cannot hold the model: weights take 6.0 GB"),
        ({"frames": 10**6}, "no plan fits 1 x .* What would fit: at most .* frames"),
        ({"frames": 10, "tokens": 10}, "either tokens or frames"),
        ({}, "either tokens or frames"),
        ({"frames": 0}, "frames=0"),
        ({"frames": 1, "batch": 0}, "batch=0"),
        ({"frames": 1, "train": ("head",)}, "train names 'head'"),
        ({"frames": 1, "optimizer": "lion"}, "optimizer='lion'"),
        ({"frames": 1, "dtype": "int8"}, "dtype='int8'"),
        ({"frames": 1, "gpu_memory": "many"}, "gpu_memory='many'"),
        ({"frames": 1, "fps": 0.0}, "fps=0"),
    ],
)
def test_wrong_arguments(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        video_ma2mba.plan(VideoMa2mbaConfig(), **arguments)


def test_a_model_without_mamba_blocks():
    from transformers import LlamaConfig

    with pytest.raises(ValueError, match="no Mamba-2 blocks"):
        video_ma2mba.plan(LlamaConfig(), tokens=100)


def test_optimizer_and_types_change_what_is_there():
    config = VideoMa2mbaConfig(text_config=Ma2mbaTextConfig(hidden_size=1024, num_hidden_layers=48))
    gpu = {d: video_ma2mba.plan(config, frames=300, dtype=d).prediction.gpu for d in ("bfloat16", "mixed", "float32")}
    assert gpu["mixed"]["weights"] == gpu["float32"]["weights"] == 2 * gpu["bfloat16"]["weights"]
    light = video_ma2mba.plan(config, frames=300, optimizer="adamw_8bit").prediction.gpu
    assert light["optimizer"] == gpu["bfloat16"]["optimizer"] // 2


# ------------------------------------------------------------------------------------------------- on a GPU
@pytest.mark.gpu
@pytest.mark.parametrize("plan", [(4, 4096, False), (4, 4096, True), (8, 8192, False), (1, 16384, False)])
def test_predicted_peak_on_the_gpu(plan: tuple[int, int, bool]):
    torch.cuda.empty_cache()
    with torch.device("cuda"):
        model = Ma2mbaTextModel(Ma2mbaTextConfig(hidden_size=1024, num_hidden_layers=16)).to(torch.bfloat16).train()
    layers, segment, offload = plan
    model.set_checkpointing(True, layers_per_block=layers, segment_length=segment, offload=offload)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tokens = 16384
    keep = torch.zeros(1, tokens, dtype=torch.bool, device="cuda")
    keep[:, ::64] = True
    for _ in range(2):
        gc.collect()
        base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        x = torch.randn(1, tokens, 1024, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        model.scan(x, output_positions=keep)[0].float().sum().backward()
        torch.cuda.synchronize()
        measured = torch.cuda.max_memory_allocated() - base
        del x
    predicted = predict(model.config, RecomputePlan(*plan), tokens, kept=tokens // 64, head_trains=False)
    model.set_checkpointing(False)
    assert predicted.above_weights == pytest.approx(measured, rel=0.10)
