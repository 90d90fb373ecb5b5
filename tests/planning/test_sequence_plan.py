"""`plan` for several GPUs: what follows from the length, the number of GPUs and the plan, counted by hand."""

import pytest

from video_ma2mba import plan
from video_ma2mba.conversion.presets import PRESETS
from video_ma2mba.planning.sequence_plan import plan_reading, ranks_of
from video_ma2mba.planning.sequence_simulation import Links


@pytest.fixture(scope="module")
def language_model():
    from video_ma2mba import Ma2mbaTextConfig

    width, layers = PRESETS["2.7b"]
    return Ma2mbaTextConfig(hidden_size=width, num_hidden_layers=layers)


def test_two_gpus_share_a_step(language_model):
    options = {"tokens": 1 << 20, "gpu_memory": "141GB", "host_memory": "256GB", "train": ("lm",)}
    one, two = plan(language_model, **options), plan(language_model, **options, gpus=2)
    assert one.shared is None and one.to_dict()["shared"] is None
    shared, chosen = two.shared, two.plan
    assert (shared.gpus, shared.nodes, shared.sequence, shared.copies) == (2, 1, 2, 1)
    assert shared.segments == -(-(1 << 20) // chosen.segment_length) and shared.segments % 2 == 0
    assert shared.one_gpu_seconds == pytest.approx(one.prediction.step_seconds)
    assert shared.one_gpu_seconds / 2 < two.prediction.step_seconds < shared.one_gpu_seconds / 1.9
    assert shared.host_per_node == 2 * two.prediction.host_peak <= 0.85 * 256e9
    # States of the layers of a block, fp32, and the last three inputs of their convolutions, bf16.
    layers = 64 / -(-64 // chosen.layers_per_block)
    assert shared.message_bytes == pytest.approx(layers * (80 * 64 * 128 * 4 + (5120 + 256) * 3 * 2))
    # fp32 gradients of all parameters cross the link once in either direction.
    parameters = two.prediction.gpu["gradients"] / 4  # kept in fp32 until they are added up, where one GPU's are bf16
    assert parameters == one.prediction.gpu["gradients"] / 2
    seconds = 2 * (1 / 2) * 4 * parameters / Links().all_reduce
    assert two.prediction.seconds["sum of gradients"] == pytest.approx(seconds)
    assert two.to_dict()["shared"]["segments"] == shared.segments
    assert two.to_dict()["tokens_per_second"] == round((1 << 20) / two.prediction.step_seconds)
    assert two.longest_tokens >= 1 << 20
    # One wave's cells, of all that a rank computes, are what it waits for; more where gradients are summed in bands.
    blocks = -(-64 // chosen.layers_per_block)
    assert 1 / (shared.segments / 2 * blocks + 1) * 0.9 < shared.idle_share < 0.05


def test_a_trained_tower_gets_as_many_frames_as_keep_gpus_busy():
    from video_ma2mba import Ma2mbaTextConfig, VideoMa2mbaConfig

    options = {"frames": 7200, "gpu_memory": "141GB", "host_memory": "256GB"}
    width, layers = PRESETS["370m"]
    config = VideoMa2mbaConfig(
        text_config=Ma2mbaTextConfig(hidden_size=width, num_hidden_layers=layers), video_token_id=7
    )
    one, two = (plan(config, **options, gpus=gpus) for gpus in (1, 2))
    assert two.prediction.vision_chunk > 32, "with as many as the model says it waits for the host"
    assert two.prediction.seconds["vision"] < 1.05 / 2 * one.prediction.seconds["vision"]
    small = plan(config, **options | {"gpu_memory": "16GB"}, gpus=2)
    assert small.prediction.vision_chunk < two.prediction.vision_chunk


def test_more_gpus_than_layers_make_groups(language_model):
    assert [ranks_of(n, 64, 1 << 20) for n in (1, 2, 3, 64, 96, 128)] == [1, 2, 3, 64, 48, 64]
    assert ranks_of(8, 64, 700) == 2  # two segments of 256 tokens, and a rest
    assert ranks_of(8, 5, 1 << 20) == 4
    many = plan(language_model, tokens=1 << 16, gpus=128, train=("lm",))
    assert (many.shared.sequence, many.shared.copies, many.shared.nodes) == (64, 2, 16)
    assert many.to_dict()["tokens_per_second"] == round(2 * (1 << 16) / many.prediction.step_seconds)


def test_wrong_numbers_of_gpus_are_refused(language_model):
    for wrong in ({"gpus": 0}, {"gpus_per_node": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            plan(language_model, tokens=1024, **wrong)
    with pytest.raises(ValueError, match="no plan fits"):
        plan(language_model, tokens=1 << 24, gpus=2, host_memory="8GB", gpu_memory="40GB")


def test_reading_is_shared(language_model, make_config):
    one, four = (plan_reading(language_model, tokens=1 << 20, gpus=gpus) for gpus in (1, 4))
    assert (four.segments, four.blocks, one.blocks) == (128, 8, 8)
    # 32 waves of 8 blocks, and three cells until the last rank has begun.
    assert four.idle_share == pytest.approx(3 / (32 * 8 + 3), rel=0.02)
    assert four.one_gpu_seconds == pytest.approx(one.total_seconds)
    assert one.total_seconds / 4 < four.total_seconds < one.total_seconds / 3.9
    assert one.state_bytes == 64 * (80 * 64 * 128 * 4 + 5376 * 3 * 2)
    assert 60_000 < (1 << 20) / one.total_seconds < 100_000  # 82,284 were measured on an H200
    assert sum(one.gpu.values()) == pytest.approx(sum(plan_reading(language_model, tokens=1 << 23).gpu.values()))
    frames = plan_reading(make_config(), frames=3, gpus=8)  # fewer segments than GPUs
    assert frames.segments == 1 and frames.tokens == 12 and frames.seconds["vision"] > 0
    for wrong in ({"frames": 3, "tokens": 5}, {"tokens": 0}, {"tokens": 8, "gpus": 0}, {"tokens": 8, "dtype": "int4"}):
        with pytest.raises(ValueError, match="tokens|gpus|dtype"):
            plan_reading(language_model, **wrong)
