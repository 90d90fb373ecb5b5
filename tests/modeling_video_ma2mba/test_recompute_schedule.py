"""Orders of cells as values, and that every valid one gives the same gradients, bit by bit."""

import random
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stack_gradients import gradients, make_model, random_state

from video_ma2mba.modeling_video_ma2mba import recompute_schedule
from video_ma2mba.modeling_video_ma2mba.recompute_plan import RecomputePlan, RecomputeSettings
from video_ma2mba.modeling_video_ma2mba.recompute_schedule import (
    ORDERS,
    SCHEDULES,
    CellOrder,
    named_order,
    shared_order,
    stretches,
    wavefront,
)

SIZES = [(1, 1), (1, 7), (7, 1), (3, 4), (4, 3), (5, 5), (2, 11)]


def drawn_order(draw: random.Random, blocks: int, segments: int) -> CellOrder:
    """Any order that meets the dependencies, cell by cell."""
    done, cells = [0] * blocks, []
    while len(cells) < blocks * segments:
        ready = [k for k in range(blocks) if done[k] < segments and (k == 0 or done[k - 1] > done[k])]
        block = draw.choice(ready)
        cells.append((block, done[block]))
        done[block] += 1
    return CellOrder(blocks, segments, tuple(cells))


# -------------------------------------------------------------------------------------------------- values
@pytest.mark.parametrize(("blocks", "segments"), SIZES)
@pytest.mark.parametrize("name", sorted(ORDERS))
def test_every_cell_comes_after_those_it_depends_on(name, blocks, segments):
    order = named_order(name, blocks, segments)
    place = {cell: n for n, cell in enumerate(order.forward())}
    assert len(place) == len(order.cells) == blocks * segments
    for (k, i), n in place.items():
        assert k == 0 or place[k - 1, i] < n
        assert i == 0 or place[k, i - 1] < n
    assert order.backward() == order.forward()[::-1]


def test_named_orders():
    assert named_order("block_major", 2, 2).cells == ((0, 0), (0, 1), (1, 0), (1, 1))
    assert named_order("segment_major", 2, 2).cells == ((0, 0), (1, 0), (0, 1), (1, 1))
    sums = [k + i for k, i in named_order("anti_diagonal", 4, 6).cells]
    assert sums == sorted(sums)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (((0, 0), (0, 1), (1, 0)), "3 cells do not make up"),
        (((0, 0), (1, 0), (1, 1), (0, 1)), r"cell \(1, 1\) comes twice, or before"),
        (((1, 0), (0, 0), (0, 1), (1, 1)), r"cell \(1, 0\) comes twice, or before"),
        (((0, 1), (0, 0), (1, 0), (1, 1)), r"cell \(0, 1\) comes twice, or before"),
        (((0, 0), (0, 0), (1, 0), (1, 1)), r"cell \(0, 0\) comes twice"),
        (((0, 0), (0, 1), (1, 0), (2, 0)), r"cell \(2, 0\) lies outside"),
    ],
)
def test_orders_that_cannot_run_are_refused(cells, message):
    with pytest.raises(ValueError, match=message):
        CellOrder(2, 2, cells)


def test_owners_are_checked():
    cells = named_order("block_major", 1, 3).cells
    with pytest.raises(ValueError, match="a rank for each of 3 segments"):
        CellOrder(1, 3, cells, (0, 1))
    with pytest.raises(ValueError, match="ranks=0"):
        wavefront(2, 2, 0)


def steps_until_all_are_done(order: CellOrder, ranks: int, backward: bool) -> int:
    """Every rank runs its own cells in order, each in one step, as soon as what it depends on is there."""
    to_do = [list(order.backward(r) if backward else order.forward(r)) for r in range(ranks)]
    sign = 1 if backward else -1
    done: set[tuple[int, int]] = set()
    steps = 0
    while any(to_do):
        ready = []
        for cells in to_do:
            if cells:
                (k, i) = cells[0]
                needed = [(k + sign, i), (k, i + sign)]
                inside = [(a, b) for a, b in needed if 0 <= a < order.blocks and 0 <= b < order.segments]
                if all(cell in done for cell in inside):
                    ready.append(cells.pop(0))
        assert ready, "ranks wait for each other for ever"
        done.update(ready)
        steps += 1
    return steps


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("blocks", "segments", "ranks", "steps"),
    [
        (32, 16, 4, 128 + 3),  # segments dealt evenly: only filling and draining
        (32, 64, 4, 512 + 3),
        (8, 64, 4, 128 + 3),
        (32, 4, 2, 64 + 1),
        (4, 8, 4, 8 + 3),
        (8, 7, 4, 16 + 2),  # 7 segments on 4 ranks: three ranks have two
        (2, 8, 4, 2 * 4 + 1),  # fewer blocks than ranks: the wave comes round late
        (5, 3, 1, 15),
    ],
)
def test_ranks_wait_only_while_the_wave_fills_and_drains(blocks, segments, ranks, steps, backward):
    order = wavefront(blocks, segments, ranks)
    assert [order.owner(i) for i in range(segments)] == [i % ranks for i in range(segments)]
    assert sum(len(order.forward(r)) for r in range(ranks)) == blocks * segments
    assert steps_until_all_are_done(order, ranks, backward) == steps


SHARED = [
    (schedule, *sizes, band)
    for schedule in SCHEDULES
    for sizes in ((4, 8, 2), (8, 7, 4), (2, 8, 4), (5, 3, 5), (9, 12, 3))
    for band in (0, 2)
]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("schedule", "blocks", "segments", "ranks", "band"), SHARED)
def test_programmes_of_shared_orders_fit_together(schedule, blocks, segments, ranks, band, backward):
    """Each message is received once, after it was sent, in the order of its sender, and before it is needed."""
    order = shared_order(schedule, blocks, segments, ranks, band)
    step = 1 if backward else -1
    sent: dict[tuple[int, int], list] = {}  # by sender and receiver, in order
    received: dict[tuple[int, int], list] = {}
    for rank in range(ranks):
        known = set()
        cells = []
        for arriving, (k, i) in order.programme(rank, backward):
            for cell in arriving:
                source = order.owner(cell[1] + step)
                assert source != rank and cell not in known
                known.add(cell)
                received.setdefault((source, rank), []).append(cell)
            assert ((k, i) in known) == (order.needs((k, i), backward) is not None)
            cells.append((k, i))
            if 0 <= i - step < segments and order.owner(i - step) != rank:
                sent.setdefault((rank, order.owner(i - step)), []).append((k, i - step))
        assert tuple(cells) == (order.backward(rank) if backward else order.forward(rank))
    assert received == sent
    steps = steps_until_all_are_done(order, ranks, backward)
    assert order.idle_share(backward) == pytest.approx(1 - blocks * segments / (steps * order.ranks))


def test_stretches_wait_longer_than_waves():
    assert stretches(4, 6, 3).owners == (0, 0, 1, 1, 2, 2)
    assert stretches(8, 32, 4).idle_share() == pytest.approx(1 - 8 / 11)  # (W - 1) of K + W - 1
    assert wavefront(8, 32, 4).idle_share() == pytest.approx(1 - 64 / 67)
    banded = wavefront(8, 32, 4, band=4)
    assert {k for k, _ in banded.backward(0)[:32]} == {4, 5, 6, 7}, "backward ends with one band before the next"
    assert banded.idle_share(backward=True) == pytest.approx(1 - 64 / 67), "and costs nothing"
    with pytest.raises(ValueError, match="ranks=0"):
        stretches(2, 2, 0)


def test_plans_and_settings_name_their_orders():
    assert "block_major" not in str(RecomputePlan(2, 8))
    assert "forward block_major" in str(RecomputePlan(2, 8, forward_order="block_major"))
    with pytest.raises(ValueError, match=r"backward_order='sideways' is not valid: use one of .*anti_diagonal"):
        RecomputeSettings(backward_order="sideways")
    plan = RecomputeSettings(method="sqrt", backward_order="anti_diagonal").fixed_plan(9, 100)
    assert plan == RecomputePlan(3, 100, backward_order="anti_diagonal")


# ----------------------------------------------------------------------------------------------- gradients
def assert_bit_equal(model, x, plan: dict, forward: str, backward: str, **batch) -> None:
    model.set_checkpointing(True, offload=False, **plan)
    loss, expected = gradients(model, x, **batch)
    model.set_checkpointing(True, offload=False, forward_order=forward, backward_order=backward, **plan)
    other_loss, found = gradients(model, x, **batch)
    used = model.engine.last_plan
    assert (used.forward_order, used.backward_order) == (forward, backward)
    assert torch.equal(loss, other_loss)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("forward", sorted(ORDERS))
@pytest.mark.parametrize("backward", sorted(ORDERS))
def test_named_orders_give_the_same_bits(forward, backward, dtype):
    model = make_model(4, dtype)
    for plan in ((1, 4), (2, 7), (3, 100)):
        x = torch.randn(2, 19, 16, dtype=dtype)
        assert_bit_equal(model, x, {"layers_per_block": plan[0], "segment_length": plan[1]}, forward, backward)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_property_any_valid_order_gives_the_same_bits(data):
    tokens, batch = data.draw(st.integers(1, 33), label="tokens"), data.draw(st.integers(1, 2), label="batch")
    layers = data.draw(st.integers(1, 4), label="layers")
    plan = {
        "layers_per_block": data.draw(st.integers(1, layers), label="layers_per_block"),
        "segment_length": data.draw(st.integers(1, tokens + 2), label="segment_length"),
    }
    model = make_model(layers)
    x = torch.randn(batch, tokens, 16, dtype=torch.float64)
    extra = {}
    kind = data.draw(st.sampled_from(["plain", "padded", "packed"]), label="kind")
    if kind == "padded":
        mask = torch.rand(batch, tokens) > 0.3
        mask[:, 0] = True
        extra["attention_mask"] = mask.long()
    elif kind == "packed":
        extra["seq_idx"] = (torch.rand(batch, tokens) > 0.7).long().cumsum(1)
    if data.draw(st.booleans(), label="keep"):
        keep = torch.rand(batch, tokens) > 0.5
        extra["keep"] = keep & mask if kind == "padded" else keep
    if data.draw(st.booleans(), label="from a state"):
        extra["state"] = random_state(model, batch)
    if data.draw(st.booleans(), label="to a state"):
        extra["final_state_weight"] = 0.7
    frozen = data.draw(st.integers(0, layers), label="frozen layers")
    model.layers[:frozen].requires_grad_(False)
    draw = data.draw(st.randoms(use_true_random=False), label="order")
    drawn = {f"drawn {n}": lambda blocks, segments: drawn_order(draw, blocks, segments) for n in (1, 2)}
    recompute_schedule.named_order.cache_clear()
    with patch.dict(ORDERS, drawn):
        assert_bit_equal(model, x, plan, *drawn, **extra)
    recompute_schedule.named_order.cache_clear()


@pytest.mark.parametrize("order", sorted(ORDERS))
def test_randomness_is_replayed_in_any_order(order):
    """Forward decides what is dropped; whatever the order of backward, it drops the same."""
    model = make_model()
    for layer in model.layers:
        layer.mixer.out_proj = torch.nn.Sequential(layer.mixer.out_proj, torch.nn.Dropout(0.4))
    x = torch.randn(1, 14, 16, dtype=torch.float64)
    plan = {"layers_per_block": 2, "segment_length": 5, "offload": False, "forward_order": order}
    model.set_checkpointing(True, **plan)
    _, expected = gradients(model, x)
    for backward in ORDERS:
        model.set_checkpointing(True, **plan, backward_order=backward)
        _, found = gradients(model, x)
        assert all(torch.equal(found[name], value) for name, value in expected.items())

    def loss(inputs: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        return (model(inputs_embeds=inputs, use_cache=False).last_hidden_state ** 2).sum()

    x.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x)
    direction, step = torch.randn_like(x), 1e-6
    slope = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    assert torch.allclose((gradient * direction).sum(), slope.detach(), rtol=1e-5)


@pytest.mark.parametrize("backward", sorted(ORDERS))
def test_gradients_are_handed_over_once_and_from_the_top(backward):
    model = make_model(4)
    calls: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: calls.append(name))
    model.set_checkpointing(True, layers_per_block=1, segment_length=3, offload=False, backward_order=backward)
    model(input_ids=torch.arange(20)[None] % 31, use_cache=False).last_hidden_state.sum().backward()
    assert len(calls) == len(set(calls)) == len(list(model.parameters()))
    layers = [int(name.split(".")[1]) for name in calls if name.startswith("layers.")]
    assert layers == sorted(layers, reverse=True)


@pytest.mark.parametrize("order", sorted(ORDERS))
def test_adapters_get_the_same_bits(order):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=3, target_modules=["in_proj", "out_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make_model(), lora).to(torch.float64).base_model.model.train()
    plan = {"layers_per_block": 2, "segment_length": 4}
    assert_bit_equal(model, torch.randn(2, 13, 16, dtype=torch.float64), plan, order, order)


@pytest.mark.parametrize("backward", sorted(ORDERS))
def test_an_error_or_a_part_of_the_gradients_leaves_nothing_behind(backward):
    model = make_model(4)
    model.set_checkpointing(True, layers_per_block=1, segment_length=3, offload=False, backward_order=backward)
    x = torch.randn(1, 11, 16, dtype=torch.float64, requires_grad=True)
    wanted = [model.layers[2].mixer.D, model.layers[3].mixer.D]
    hidden = model.scan(x)[0]
    top = torch.autograd.grad((hidden**2).sum(), wanted)
    hidden = model.scan(x)[0]
    (hidden**2).sum().backward()
    assert all(torch.equal(gradient, parameter.grad) for gradient, parameter in zip(top, wanted, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("forward", sorted(ORDERS))
@pytest.mark.parametrize("backward", sorted(ORDERS))
def test_orders_with_activations_in_host_memory(forward, backward):
    """Streams come back from the host where an order leaves their segment; steps follow each other in one pool."""
    model = make_model(4).to("cuda")
    plan = {"layers_per_block": 1, "segment_length": 4}
    for tokens in (19, 32, 5):
        x = torch.randn(2, tokens, 16, dtype=torch.float64, device="cuda")
        model.set_checkpointing(True, offload=False, **plan)
        _, expected = gradients(model, x)
        model.set_checkpointing(True, offload=True, forward_order=forward, backward_order=backward, **plan)
        _, found = gradients(model, x)
        assert model.engine.last_host_bytes > 0
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)
    model.set_checkpointing(False)
    assert model.engine._pool.nbytes == 0 and not model.engine._pool._lent
