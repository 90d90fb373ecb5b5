"""Every batch under a plan of its own; a step that runs out of memory once more under the next smaller one."""

import logging
from dataclasses import replace

import pytest
import torch
from tensor_chats import (
    ACCUMULATED,
    PER_FRAME,
    VIDEO,
    FullMemory,
    collate,
    losses,
    make_trainer,
    tiny_model,
    weights,
)

from video_ma2mba.modeling_video_ma2mba import recompute_engine
from video_ma2mba.modeling_video_ma2mba.cost_time import H200
from video_ma2mba.modeling_video_ma2mba.recompute_plan import RecomputeSettings
from video_ma2mba.trainer.step_planner import StepPlanner

ORDER = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 1}


class OneLength(torch.utils.data.Dataset):
    """Videos of 1, 200, 1, 200 … frames."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        frames = 200 if index % 2 else 1
        draw = torch.Generator().manual_seed(index)
        ids = torch.cat([torch.full((frames * PER_FRAME,), VIDEO), torch.randint(6, 40, (5,), generator=draw)])
        pixels = torch.randint(0, 256, (frames, 3, 16, 16), dtype=torch.uint8, generator=draw)
        return {"input_ids": ids, "labels": torch.where(ids == VIDEO, -100, ids), "pixel_values_videos": pixels}


def middle_budget() -> int:
    """Bytes for which a short video needs no recomputation, and a long one does."""
    planner = StepPlanner(tiny_model(), RecomputeSettings(memory_budget="100GB"))
    short, long = (planner.choose(collate([OneLength()[i]])).step_bytes for i in (0, 1))
    assert long > 10 * short
    return long // 2


def test_plan_follows_the_length_of_the_batch(tmp_path):
    trainer = make_trainer(
        tmp_path,
        data=OneLength(),
        max_steps=4,
        gradient_checkpointing_kwargs={"memory_budget": middle_budget()},
        **ORDER,
    )
    base = trainer.video_model.model
    seen = []
    base.language_model.layers[0].register_forward_pre_hook(
        lambda *_: seen.append((base.language_model.gradient_checkpointing, base.recompute_vision))
    )
    trainer.train()
    short, long = set(seen[:1]), {state for state in seen if state[0]}
    assert short == {(False, False)}, "a short video runs without recomputation"
    assert long == {(True, True)}
    logged = [entry["predicted_peak_gb"] for entry in trainer.state.log_history if "predicted_peak_gb" in entry]
    assert len(logged) == 4 and logged[0] == logged[2] < logged[1]
    assert logged[1] * 1e9 <= middle_budget()

    plain = make_trainer(tmp_path, data=OneLength(), max_steps=4, gradient_checkpointing=False, **ORDER)
    plain.train()
    assert plain.video_model.model.language_model.engine.last_plan is None
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-5)


def test_fewer_frames_in_the_tower_where_nothing_fits_otherwise():
    model = tiny_model()
    usual = model.config.vision_chunk_frames = 1600
    inputs = collate([OneLength()[1]])
    planner = StepPlanner(model, RecomputeSettings(memory_budget="100GB"))
    assert planner.choose(inputs).prediction.vision_chunk == usual
    for budget in range(10_000, 0, -200):
        tight = StepPlanner(model, RecomputeSettings(memory_budget=f"{budget}kB"))
        found = tight.choose(inputs)
        if found is None or found.prediction.vision_chunk < usual:
            break
    assert found is not None and found.step_bytes <= budget * 1000
    with tight.applied(found):
        assert model.config.vision_chunk_frames == found.prediction.vision_chunk < usual
    assert model.config.vision_chunk_frames == usual


def test_more_frames_in_a_trained_tower_where_a_gpu_would_wait_for_the_host():
    model = tiny_model()
    model.config.vision_chunk_frames = 4
    inputs = collate([OneLength()[1]])
    frames = len(inputs["pixel_values_videos"])
    planner = StepPlanner(model, RecomputeSettings(memory_budget="100GB"))
    assert planner.choose(inputs).prediction.vision_chunk == 4, "on a CPU as many as the model says"
    planner._costs = H200.on_host(1e-5)  # a tower as small as this one waits for launches whatever it gets
    assert 4 < planner.choose(inputs).prediction.vision_chunk <= min(32, frames)
    planner._costs = replace(H200, tower=1e6, tower_backward=1e6)  # one that never waits takes the fewest
    assert planner.choose(inputs).prediction.vision_chunk == 4
    model.model.vision_tower.requires_grad_(False)
    assert StepPlanner(model, RecomputeSettings(memory_budget="100GB")).choose(inputs).prediction.vision_chunk == 4


def test_a_step_is_planned_once(tmp_path, monkeypatch):
    """The trainer decides and hands the plan to the engine, which asks nobody."""
    monkeypatch.setattr(recompute_engine, "choose_plan", lambda *_: pytest.fail("planned a second time"))
    decisions, budget = [], middle_budget()
    monkeypatch.setattr(
        StepPlanner, "choose", lambda *a, choose=StepPlanner.choose: decisions.append(choose(*a)) or decisions[-1]
    )
    kwargs = {"memory_budget": budget, "backward_order": "anti_diagonal"}
    trainer = make_trainer(tmp_path, data=OneLength(), max_steps=4, gradient_checkpointing_kwargs=kwargs, **ORDER)
    stack = trainer.video_model.model.language_model
    ran = []
    stack.register_forward_hook(lambda *_: ran.append(stack.engine.last_plan))
    trainer.train()
    assert len(decisions) == 4, "one decision a step"
    assert ran == [decision.plan for decision in decisions]
    assert {plan.backward_order for plan in ran} == {"anti_diagonal"}
    assert stack.gradient_checkpointing and stack.engine.settings == RecomputeSettings(**kwargs), "nothing stays"


def test_fixed_plans_stay_fixed(tmp_path):
    cells = {"segment_length": 7, "layers_per_block": 1}
    trainer = make_trainer(tmp_path, max_steps=1, gradient_checkpointing_kwargs=cells)
    trainer.train()
    plan = trainer.video_model.model.language_model.engine.last_plan
    assert (plan.segment_length, plan.layers_per_block) == (7, 1)

    trainer = make_trainer(tmp_path, max_steps=1, gradient_checkpointing_kwargs={"method": "per_layer"})
    full = FullMemory(trainer.video_model, call=1, backward=True)
    with pytest.raises(torch.OutOfMemoryError, match="no smaller plan exists"):
        trainer.train()
    assert len(full.raised) == 1


def test_nothing_fits_is_said_by_the_engine(tmp_path):
    trainer = make_trainer(tmp_path, gradient_checkpointing_kwargs={"memory_budget": "1KB"})
    with pytest.raises(ValueError, match="no checkpointing plan fits"):
        trainer.train()


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_step_out_of_memory_is_repeated_with_the_next_smaller_plan(tmp_path, caplog, backward):
    """The second micro-batch of the second step fails; the run is the same as one that never failed."""
    smooth = make_trainer(tmp_path / "smooth", **ACCUMULATED)
    smooth.train()
    trainer = make_trainer(tmp_path / "full", **ACCUMULATED)
    full = FullMemory(trainer.video_model, call=4, backward=backward)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert len(full.raised) == 1
    assert "ran out of memory (no recomputation): once more with the next smaller plan" in caplog.text
    assert trainer.throughput.oom_retries == 1
    assert losses(trainer) == pytest.approx(losses(smooth), rel=1e-5)
    for name, value in weights(smooth.model).items():
        torch.testing.assert_close(trainer.model.get_parameter(name), value, rtol=1e-3, atol=1e-4)
    counted = [[entry.get("num_tokens") for entry in t.state.log_history] for t in (smooth, trainer)]
    assert counted[0] == counted[1], "tokens of the failed attempt are not counted"


def test_a_second_failure_ends_the_run(tmp_path):
    trainer = make_trainer(tmp_path)
    FullMemory(trainer.video_model, call=1, backward=False, times=2)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    trainer = make_trainer(tmp_path, oom_retry=False)
    full = FullMemory(trainer.video_model, call=1, backward=False)
    with pytest.raises(torch.OutOfMemoryError, match="simulated"):
        trainer.train()
    assert len(full.raised) == 1
