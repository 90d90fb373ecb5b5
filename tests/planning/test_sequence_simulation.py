"""The simulated step against closed forms, and against counting by hand."""

import pytest

from video_ma2mba.modeling_video_ma2mba.recompute_plan import RecomputePlan
from video_ma2mba.modeling_video_ma2mba.recompute_schedule import stretches, wavefront
from video_ma2mba.planning.sequence_simulation import Links, fastest_step, simulate_step, table, walk, wave_seconds

# Segments, blocks, ranks, and the efficiency of a step with messages of 0.4 % of a cell: a pass takes
# (n - 1) mod W + max(K, W) ((n - 1) div W) + K steps where n K / W would do.
EFFICIENCIES = [
    (16, 32, 4, 0.977),
    (64, 32, 4, 0.994),
    (64, 8, 4, 0.977),
    (4, 32, 4, 0.914),
    (4, 32, 2, 0.985),
    (7, 32, 4, 0.848),  # segments that cannot be dealt evenly
    (512, 4, 4, 0.990),  # no more blocks than ranks: every message is waited for
]


@pytest.mark.parametrize(("segments", "blocks", "ranks", "efficiency"), EFFICIENCIES)
def test_the_efficiency_of_the_wavefront(segments, blocks, ranks, efficiency):
    order = wavefront(blocks, segments, ranks)
    passes = [walk(order, 1.0, lambda *_: 0.004), walk(order, 3.0, lambda *_: 0.012, backward=True)]
    seconds = sum(p.seconds for p in passes)
    assert segments * blocks * 4 / ranks / seconds == pytest.approx(efficiency, abs=6e-4)
    assert sum(map(sum, (p.busy for p in passes))) == pytest.approx(segments * blocks * 4)
    closed = wave_seconds(blocks, segments, ranks, 1.0, 0.004) + wave_seconds(blocks, segments, ranks, 3.0, 0.012)
    assert seconds == pytest.approx(closed)


def test_fewer_blocks_than_ranks_leave_steps_empty():
    # 2 blocks on 4 ranks: 16 waves of 4 steps, the last one of 2, and 3 until the last rank has begun.
    assert wave_seconds(2, 64, 4, 1.0) == walk(wavefront(2, 64, 4), 1.0).seconds == 15 * 4 + 2 + 3
    assert walk(wavefront(2, 64, 4), 1.0).idle_share == pytest.approx(1 - 32 / 65)


def test_stretches_wait_a_block_of_a_stretch_for_every_rank_before():
    # 8 blocks over 4 stretches of 16 segments: (8 + 4 - 1) x 16 steps.
    found = walk(stretches(8, 64, 4), 1.0)
    assert found.seconds == (8 + 4 - 1) * 16 and found.busy == (8 * 16,) * 4


def test_a_slow_link_is_hidden_behind_blocks_to_spare():
    order = wavefront(16, 64, 4)
    fast, slow = walk(order, 1.0), walk(order, 1.0, lambda *_: 2.0)
    assert slow.seconds - fast.seconds == pytest.approx(3 * 2.0)  # only while the first wave fills
    assert walk(wavefront(4, 64, 4), 1.0, lambda *_: 2.0).seconds == pytest.approx(wave_seconds(4, 64, 4, 1.0, 2.0))


def test_links_within_and_between_machines():
    links = Links(link=100.0, network=10.0, latency=1.0, network_latency=2.0, all_reduce=50.0, gpus_per_node=8)
    assert links.message(3, 4, 1000.0) == 11.0
    assert links.message(7, 8, 1000.0) == 102.0
    assert links.sum(100.0, 1) == 0.0
    assert links.sum(100.0, 2) == 2.0
    assert links.sum(100.0, 16) == pytest.approx(2 * 15 / 16 * 10)


def test_a_simulated_step_adds_up(make_text_config):
    config = make_text_config(hidden_size=2560, num_hidden_layers=64, state_size=128, head_dim=64, chunk_size=256)
    plan = RecomputePlan(2, 16384, offload=True)
    one = simulate_step(config, 1 << 18, 1, plan)
    assert one.efficiency == pytest.approx(1) and (one.idle_share, one.all_reduce_seconds, one.copies) == (0, 0, 1)
    two = simulate_step(config, 1 << 18, 2, plan)
    assert two.message_megabytes == pytest.approx(2 * (80 * 64 * 128 * 4 + 5376 * 3 * 2) / 1e6)  # states and halo
    assert two.seconds - two.all_reduce_seconds == pytest.approx(one.seconds / 2 * 257 / 256, rel=1e-4)  # 8 x 32 cells
    # Streams of 31 block borders and states at 15 segment borders, in fp32 and bf16; both GPUs in one machine.
    kept = 31 * 2**18 * 2560 * 4 + 15 * 64 * (80 * 64 * 128 * 4 + 5376 * 3 * 2)
    assert two.host_gb_per_node == pytest.approx(kept / 1e9)
    worse = simulate_step(config, 1 << 18, 2, plan, schedule="stretches")
    assert worse.seconds > two.seconds
    many = simulate_step(config, 1 << 20, 256, RecomputePlan(1, 8192, offload=True))
    assert (many.sequence, many.copies) == (64, 4)
    best = fastest_step(config, 1 << 18, 4)
    assert best is not None and best.seconds <= simulate_step(config, 1 << 18, 4, plan).seconds
    assert fastest_step(config, 1 << 23, 1, host_gb_per_node=0.001, cell_gb=0.1) is None
    assert "| 256 (4 x 64) | 1,048,576 | 1 x 8,192 |" in table([many])
