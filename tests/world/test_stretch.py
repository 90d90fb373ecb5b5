"""Calm frames that count as longer: where they are, and that a state is much as if they had stayed so long."""

import math

import pytest
import torch

from video_ma2mba.loading import load_pipeline
from video_ma2mba.modeling_video_ma2mba.vision_features import encode_frames
from video_ma2mba.world import WorldDataset, render
from video_ma2mba.world.batches import MOST_STRETCHED, WorldBatches
from video_ma2mba.world.stretch import STRETCH, Stretch, calm_frames
from video_ma2mba.world.world import with_decoys


@pytest.fixture(scope="module")
def bundled():
    return load_pipeline(None, device="cpu")


@pytest.mark.bundled
def test_only_calm_frames_of_a_batch_are_lengthened(bundled):
    data = WorldDataset("train", 40, frames=(40, 40), questions=4, seed=2, decoys=8)
    numbers = torch.zeros(1), torch.ones(len(data.kinds))
    batches = WorldBatches(data, bundled.processor, 4000, *numbers, ramp_from=40, stretch=86400)
    batch = batches.batch([0, 1], 40, stretch=1.5)
    shown = batch["input_ids"] == bundled.processor.video_token_id
    for row, index in enumerate((0, 1)):
        world = data.world(index)
        busy = {second for thing in world.things for second in range(thing.start, thing.end + 1)}
        busy |= {card.start + late for card in (world.card, *world.decoys) for late in (0, 1)}
        calm = torch.tensor([second not in busy for second in range(40)])
        assert torch.equal(calm_frames(world), calm) and 0 < calm.sum() < 40
        frames = batch[STRETCH][row][shown[row]].view(40, 16)
        assert torch.equal(frames, 1.5 * calm[:, None].expand(40, 16))
        text = batch[STRETCH][row][~shown[row]]
        assert set(text.tolist()) <= {0.0, 1.5} and bool((text[-8:] == 0).all()), "time stamps at most"
    assert STRETCH not in batches.batch([0], 40)
    drawn = iter(batches)
    amounts = [float(found[STRETCH].max()) if STRETCH in (found := next(drawn)) else 0.0 for _ in range(12)]
    assert 0.0 in amounts and max(amounts) > 0 and max(amounts) <= math.log(MOST_STRETCHED)
    stream = WorldDataset("train", 4, frames=(90, 90), streams=1.0).world(0)
    assert not calm_frames(stream).any() and len(calm_frames(stream)) == 90


@pytest.mark.bundled
def test_a_lengthened_frame_is_much_as_if_it_had_stayed(bundled):
    """Against reading each calm frame four times: plain reading misses what lengthened steps add and forget."""
    world, model = WorldDataset("test", 40, frames=(24, 24), seed=9).world(3), bundled.model
    calm, times = calm_frames(world), 4
    assert 8 <= calm.sum() < 24
    with torch.no_grad():
        rows = encode_frames(model.model.vision_tower, model.config, torch.from_numpy(render(world)).movedim(3, 1))
        rows = model.model.multi_modal_projector(rows).view(24, 16, -1)

    def state(frames, lengthened=None):
        stretch.now = lengthened
        with torch.no_grad():
            found = model.model.language_model(inputs_embeds=frames.reshape(1, -1, rows.shape[-1]), use_cache=True)
        stretch.now = None
        return [layer.ssm.flatten(2) for layer in found.past_key_values.layers]

    stretch = Stretch(model)
    try:
        stayed = state(rows.repeat_interleave(torch.where(calm, times, 1), 0))
        missed, lengthened = (
            torch.cat(
                [((layer - true).norm(dim=2) / true.norm(dim=2))[0] for layer, true in zip(found, stayed, strict=True)]
            )
            for found in (state(rows), state(rows, (calm * math.log(times)).repeat_interleave(16)[None].float()))
        )
        with pytest.raises(ValueError, match="tokens come at once where .* train with method=per_layer"):
            state(rows, torch.zeros(1, 7))
    finally:
        stretch.remove()
    assert lengthened.median() < 0.35 * missed.median() and lengthened.mean() < 0.5 * missed.mean()
    assert not any(module._forward_hooks for module in model.modules())


def test_decoys_stand_where_nothing_else_is_seen():
    data = WorldDataset("train", 200, frames=(64, 64), seed=5)
    worlds = [with_decoys(data.world(number), 16) for number in range(60)]
    counts = [len(world.decoys) for world in worlds]
    assert 15 < counts.count(0) < 45 and 4 < max(counts) <= 16
    world = max(worlds, key=lambda world: len(world.decoys))
    frames, plain = render(world), render(data.world(worlds.index(world)))
    changed = [second for second in range(64) if (frames[second] != plain[second]).any()]
    assert changed == [card.start for card in world.decoys]
    things = {second for thing in world.things for second in range(thing.start, thing.end)}
    assert world.card.start not in changed and not things & set(changed)
    assert with_decoys(world, 0) == world, "none asked for"
    with pytest.raises(ValueError, match="decoys=-1"):
        WorldDataset(decoys=-1)
