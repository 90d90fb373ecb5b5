"""Five processes share sequences in groups of 2, 3, 4 and 5: python sequence_ranks.py FOLDER

Ranks are forked from this process, which pays for the imports once. Every rank writes FOLDER/RANK.json: for each case
the words of what went wrong, or null.
"""

import faulthandler
import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
import torch.distributed as dist  # noqa: E402
from distributed_worker import whole_model_and_batches  # noqa: E402
from stack_gradients import make_model  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from video_ma2mba.modeling_video_ma2mba.parallel_cut import SequenceCut  # noqa: E402
from video_ma2mba.modeling_video_ma2mba.parallel_gradients import add_up, keep_wide  # noqa: E402
from video_ma2mba.modeling_video_ma2mba.parallel_sequence import SequenceGroup  # noqa: E402
from video_ma2mba.modeling_video_ma2mba.recompute_plan import RecomputePlan  # noqa: E402
from video_ma2mba.modeling_video_ma2mba.state_video import VideoState  # noqa: E402

WORLD = 5
UNEVEN = (0, 1, 3, 9, 10, 12, 19, 20, 26, 31)  # segments of 1 and 2 tokens lie within the convolution's window of 4
TOKENS = UNEVEN[-1]


def close(found: Tensor | None, expected: Tensor | None, name: str, tolerance: float = 1e-10) -> None:
    assert (found is None) == (expected is None), f"{name}: one gradient is missing"
    if found is not None:
        error = ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-3)).item()
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def summed(group: SequenceGroup, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    found = {}
    for name, parameter in parameters.items():
        found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        dist.all_reduce(found[name], group=group.group)
    return found


# --------------------------------------------------------------------------------------------------- the stack
def batch_of(kind: str) -> dict[str, Tensor]:
    """Arguments of `scan` for a batch of `TOKENS` columns."""
    draw = torch.Generator().manual_seed(3)
    rows = 1 if kind == "packed" else 2
    batch = {"inputs_embeds": torch.randn(rows, TOKENS, 16, dtype=torch.float64, generator=draw)}
    if kind == "padded":
        lengths = torch.tensor([TOKENS - 8, TOKENS - 1])
        batch["attention_mask"] = (torch.arange(TOKENS) < lengths[:, None]).long()
    if kind == "packed":  # samples begin within segments, at a border and next to one
        starts = torch.zeros(1, TOKENS, dtype=torch.int64)
        starts[0, [5, 10, 11, 25]] = 1
        batch["seq_idx"] = starts.cumsum(1)
    if kind == "kept":
        keep = torch.zeros(rows, TOKENS, dtype=torch.bool)
        keep[0, [2, 11, 30]] = keep[1, [0, 11]] = True  # most segments keep nothing
        batch["output_positions"] = keep
    return batch


def weights_of(hidden: Tensor) -> Tensor:
    return torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view(hidden.shape)


def stack_run(model: nn.Module, batch: dict[str, Tensor], cut: SequenceCut | None, rank: int, weights: Tensor | None):
    """Hidden states, states at the end, gradients of the input and of the first state."""
    batch = dict(batch)
    rows = len(batch["inputs_embeds"])
    draw = torch.Generator().manual_seed(4)
    sizes = ((4, rows, model.layers[0].mixer.shape.conv_dim, 3), (4, rows, 4, 8, 6))
    conv, ssm = (torch.randn(size, dtype=torch.float64, generator=draw).requires_grad_() for size in sizes)
    x = batch.pop("inputs_embeds")
    if cut is not None:
        x = cut.take(x, rank)
        if "output_positions" in batch:
            batch["output_positions"] = batch["output_positions"] & cut.mask(rank)
    x = x.clone().requires_grad_()
    hidden, state = model.scan(x, VideoState.from_stacked(conv, ssm), cut=cut, **batch)
    weights = weights_of(hidden) if weights is None else weights
    ends = torch.cat([tensor.flatten() for tensor in state.stacked()])
    ((hidden * weights).sum() + 0.01 * (ends**2).sum()).backward()
    return hidden.detach(), ends.detach(), x.grad, conv.grad, ssm.grad


def stack_case(group: SequenceGroup, schedule: str, kind: str, band: int) -> None:
    """All gradients are those of one process without checkpointing (1e-10), and values those of one process that runs
    the same cells, to the bit."""
    batch, cut = batch_of(kind), SequenceCut(UNEVEN, group.size, schedule)
    alone = make_model(4)
    alone.set_checkpointing(False)
    hidden, ends, dx, dconv, dssm = stack_run(alone, batch, None, 0, None)
    model = make_model(4)
    model.set_checkpointing(True, layers_per_block=1, offload=False)
    model.share_sequence(group)
    weights, keep, mine = weights_of(hidden), batch.get("output_positions"), cut.mask(group.rank)
    if keep is None:
        weights, hidden = cut.take(weights, group.rank), cut.take(hidden, group.rank)
    else:
        picked = (keep & mine)[keep]
        weights, hidden = weights[picked], hidden[picked]
    length = cut.longest if kind == "kept" else 4  # in one cell each, or some in two
    with model.engine.planned(RecomputePlan(1, length, band=band)):
        found = stack_run(model, batch, cut, group.rank, weights)
    real = batch.get("attention_mask", torch.ones(2, TOKENS)[: len(batch["inputs_embeds"])]).bool()
    if keep is None:
        own_real = cut.take(real, group.rank)
        close(found[0][own_real], hidden[own_real], "hidden states")
    else:
        close(found[0], hidden, "hidden states") if len(hidden) else None
    close(found[1], ends, "states at the end")
    if len(cut.own(group.rank)):
        close(found[2], cut.take(dx, group.rank), "input")
    for name, own, whole in (("conv", found[3], dconv), ("ssm", found[4], dssm)):
        own = torch.zeros_like(whole) if own is None else own
        dist.all_reduce(own, group=group.group)
        close(own, whole, f"first {name} state")
    expected = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    for name, gradient in summed(group, {n: p for n, p in model.named_parameters() if n in expected}).items():
        close(gradient, expected[name], name)


def bits_case(group: SequenceGroup, single: SequenceGroup, dtype: torch.dtype) -> None:
    """One process that runs the same cells gets the same bits: hidden states, states, gradients of inputs."""
    batch = {name: value.to(dtype) for name, value in batch_of("plain").items()}
    found = {}
    for ranks in (single, group):
        cut = SequenceCut(UNEVEN, ranks.size)
        model = make_model(4, dtype)
        model.share_sequence(ranks)
        x = cut.take(batch["inputs_embeds"], ranks.rank).clone().requires_grad_()
        with model.engine.planned(RecomputePlan(1, cut.longest)):
            hidden, state = model.scan(x, cut=cut)
        (hidden * cut.take(torch.linspace(-1, 1, TOKENS, dtype=dtype)[None, :, None], ranks.rank)).sum().backward()
        found[ranks.size] = (hidden.detach(), x.grad, torch.cat([t.flatten() for t in state.stacked()]).detach())
    one, own = found[1], found[group.size]
    cut = SequenceCut(UNEVEN, group.size)
    for name, whole, part in zip(("hidden states", "input"), one, own, strict=False):
        assert torch.equal(cut.take(whole, group.rank), part), f"{name}: other bits"
    assert torch.equal(one[2], own[2]), "states: other bits"


def rounding_case(group: SequenceGroup, single: SequenceGroup) -> None:
    """Weights in bf16: gradients are as close to those in fp64 as those of one process that runs the same cells, since
    parts are added up before they are rounded; rounded parts are further away."""
    batch = {name: value.to(torch.bfloat16) for name, value in batch_of("plain").items()}

    def gradients(dtype: torch.dtype, ranks: SequenceGroup, wide: bool) -> Tensor:
        cut = SequenceCut(UNEVEN, ranks.size)
        model = make_model(4, torch.bfloat16).to(dtype)  # the same numbers in every type
        model.share_sequence(ranks)
        x, weights = batch["inputs_embeds"].to(dtype), torch.linspace(-1, 1, TOKENS, dtype=dtype)[None, :, None]
        if wide:
            keep_wide(model.parameters())
        with model.engine.planned(RecomputePlan(1, cut.longest)):
            hidden, _ = model.scan(cut.take(x, ranks.rank), cut=cut)
        (hidden * cut.take(weights, ranks.rank)).sum().backward()
        add_up(model.parameters(), ranks.group)
        assert all(p.grad.dtype == p.dtype for p in model.parameters())
        return torch.cat([p.grad.double().flatten() for p in model.parameters()])

    exact = gradients(torch.float64, single, False)
    alone, narrow, shared = (
        ((gradients(torch.bfloat16, ranks, wide) - exact).norm() / exact.norm()).item()
        for ranks, wide in ((single, False), (group, False), (group, True))
    )
    assert shared <= alone * 1.0001, f"{shared:.5f} on {group.size} ranks, {alone:.5f} on one"
    assert narrow > shared * 1.001, f"{narrow:.5f} rounded before the sum, {shared:.5f} after: nothing is tested"


def uneven_heads_case(group: SequenceGroup) -> None:
    model = make_model(4)
    model.share_sequence(group)
    cut = SequenceCut(UNEVEN, group.size, "heads")
    with pytest.raises(ValueError, match="4 heads in 2 groups cannot be dealt out evenly to 3 ranks"):
        model.scan(cut.take(batch_of("plain")["inputs_embeds"], group.rank), cut=cut)


# ----------------------------------------------------------------------------------------------- the whole model
def whole_case(group: SequenceGroup, kind: str, schedule: str, borders: tuple[int, ...] | None) -> None:
    """Tower, projector, embedding, head: loss and every gradient of one process that sees the whole batch."""
    model, batches = whole_model_and_batches()
    model.model.vision_tower.requires_grad_(True)
    model.model.freeze_unused_parameters()
    if kind == "frozen":
        model.model.vision_tower.requires_grad_(False)
        model.model.language_model.layers[0].requires_grad_(False)
        model.model.get_input_embeddings().requires_grad_(False)
    batch = batches[0]
    if kind != "one row":
        long, short = batches[1], batches[0]
        pad = long["input_ids"].shape[1] - short["input_ids"].shape[1]
        grown = lambda name, fill: torch.cat(  # noqa: E731  padding on the left, as chats are often padded
            [torch.nn.functional.pad(short[name], (pad, 0), value=fill), long[name]]
        )
        batch = {"input_ids": grown("input_ids", 0), "labels": grown("labels", -100)}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, :pad] = 0
        batch["pixel_values_videos"] = torch.cat([short["pixel_values_videos"], long["pixel_values_videos"]])
        batch["num_frames"] = torch.tensor([3, 1])
    loss = model(**batch).loss
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable({"layers_per_block": 1, "segment_length": 7, "offload": False})
    model.model.language_model.share_sequence(group)
    if borders is not None:
        batch["sequence_cut"] = SequenceCut(borders, group.size, schedule)
    part = model(**batch).loss
    part.backward()
    total = part.detach().clone()
    dist.all_reduce(total, group=group.group)
    close(total, loss.detach(), "loss")
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert named.keys() == expected.keys()
    assert all(p.grad is not None for p in named.values()), "a rank without part in a parameter gives no gradient"
    for name, gradient in summed(group, named).items():
        close(gradient, expected[name], name)


def own_frames_case(group: SequenceGroup) -> None:
    """A rank that is given the frames of its own segments and no others learns the same."""
    model, batches = whole_model_and_batches()
    batch = batches[0]
    model.gradient_checkpointing_enable({"layers_per_block": 1, "segment_length": 4, "offload": False})
    model.model.language_model.share_sequence(group)
    is_video = batch["input_ids"] == 39
    cut = model.model.cut(batch["input_ids"])
    frames = [cut.frames(is_video, rank, 4) for rank in range(group.size)]
    assert sorted(torch.cat(frames).tolist()) == [0, 1, 2], f"cuts between frames share them out once: {frames}"
    found = []
    for pixels in (batch["pixel_values_videos"], batch["pixel_values_videos"][frames[group.rank]]):
        model.zero_grad()
        model(**(batch | {"pixel_values_videos": pixels if len(pixels) else None}), sequence_cut=cut).loss.backward()
        found.append(summed(group, dict(model.named_parameters())))
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name
    with pytest.raises(ValueError, match="got 7 frames"):
        model(**(batch | {"pixel_values_videos": torch.zeros(7, 3, 16, 16, dtype=torch.uint8)}), sequence_cut=cut)


def steps_case(group: SequenceGroup, dtype: torch.dtype, steps: int, tolerance: float) -> None:
    """Optimizer steps make the curve of one process."""
    curves = []
    for shared in (False, True):
        model, batches = whole_model_and_batches()
        model.to(dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        if shared:
            model.model.language_model.share_sequence(group)
        curve = []
        for step in range(steps):
            loss = model(**batches[step % 2]).loss
            loss.backward()
            total = loss.detach().clone()
            if shared:
                dist.all_reduce(total, group=group.group)
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.grad = group.sum(parameter.grad)
            optimizer.step()
            optimizer.zero_grad()
            curve.append(total.item())
        curves.append(torch.tensor(curve, dtype=torch.float64))
    assert curves[0][-1] < curves[0][0] * 0.9, "nothing is learnt: the curves say little"
    close(curves[1], curves[0], "loss curve", tolerance)


def drain_case(group: SequenceGroup, where: str) -> None:
    """A rank that cannot go on lets the others come to the end of the pass; the next step is whole again."""
    model = make_model(4)
    model.set_checkpointing(True, layers_per_block=1, segment_length=4, offload=False)
    model.share_sequence(group)
    cut = SequenceCut(UNEVEN, group.size)
    runs, broken = [], group.size - 1
    for attempt in range(2):
        model.zero_grad()
        x = cut.take(batch_of("plain")["inputs_embeds"], group.rank).clone().requires_grad_()
        model.engine.open(model, cut, len(x))
        fails = attempt == 0 and group.rank == broken
        calls = 0

        def fail(*_):
            nonlocal calls
            calls += 1
            if calls == 4:
                raise torch.OutOfMemoryError("out of memory (simulated)")

        if fails and where == "before":
            model.engine.drain(backward=False)
            continue
        handle = model.layers[2].register_forward_hook(fail) if fails and where == "forward" else None
        try:
            hidden, _ = model.scan(x, cut=cut)
        except torch.OutOfMemoryError:
            model.engine.drain(backward=False)
            continue
        finally:
            if handle is not None:
                handle.remove()
        if where in ("before", "forward") and attempt == 0:
            continue
        handle = model.layers[2].register_forward_hook(fail) if fails else None
        try:
            hidden.sum().backward()
        except torch.OutOfMemoryError:
            model.engine.drain(backward=True)
        finally:
            if handle is not None:
                handle.remove()
        runs.append(x.grad)
    reference = make_model(4)
    whole = batch_of("plain")["inputs_embeds"].clone().requires_grad_()
    reference.scan(whole)[0].sum().backward()
    close(runs[-1], cut.take(whole.grad, group.rank), "input after the failure")


def cases(groups: dict[int, SequenceGroup]) -> Iterator[tuple[str, int, Callable[[], None]]]:
    """Name, ranks and work of every case."""
    for size, group in groups.items():
        if size == 1:
            continue
        for number, kind in enumerate(("plain", "padded", "packed", "kept")):
            schedule = ("round_robin", "round_robin", "stretches")[(number + size) % 3]
            band = 2 if number % 2 == size % 2 else 0
            name = f"stack {size} {schedule} {kind}"
            yield name, size, lambda g=group, s=schedule, k=kind, b=band: stack_case(g, s, k, b)
    for size in (2, 4):  # of 4 heads
        for kind in ("plain", "padded", "packed", "kept"):
            yield f"heads {size} {kind}", size, lambda g=groups[size], k=kind: stack_case(g, "heads", k, 0)
    yield "heads whole 2", 2, lambda: whole_case(groups[2], "one row", "heads", (0, 2, 5, 11, 18))
    yield "heads whole rows 4", 4, lambda: whole_case(groups[4], "rows", "heads", (0, 1, 6, 7, 13, 29))
    for size in (2, 5):
        yield f"rounding {size}", size, lambda g=groups[size]: rounding_case(g, groups[1])
    yield "heads uneven 3", 3, lambda: uneven_heads_case(groups[3])
    yield "bits 2", 2, lambda: bits_case(groups[2], groups[1], torch.float64)
    yield "bits 4", 4, lambda: bits_case(groups[4], groups[1], torch.bfloat16)
    yield "whole one row 2", 2, lambda: whole_case(groups[2], "one row", "round_robin", None)
    yield "whole one row 3", 3, lambda: whole_case(groups[3], "one row", "stretches", (0, 2, 5, 11, 18))
    yield "whole rows 3", 3, lambda: whole_case(groups[3], "rows", "round_robin", None)
    yield "whole rows 5", 5, lambda: whole_case(groups[5], "rows", "round_robin", (0, 1, 6, 7, 13, 29))
    yield "whole frozen 2", 2, lambda: whole_case(groups[2], "frozen", "round_robin", None)
    yield "whole short 5", 5, lambda: whole_case(groups[5], "one row", "round_robin", (0, 6, 18))  # ranks without any
    yield "own frames 2", 2, lambda: own_frames_case(groups[2])
    yield "own frames 3", 3, lambda: own_frames_case(groups[3])
    yield "steps fp64 3", 3, lambda: steps_case(groups[3], torch.float64, 8, 1e-9)
    yield "steps fp32 2", 2, lambda: steps_case(groups[2], torch.float32, 50, 1e-4)
    for where in ("before", "forward", "backward"):
        yield f"drain {where} 3", 3, lambda w=where: drain_case(groups[3], w)


def rank_main(rank: int, folder: Path) -> None:
    faulthandler.dump_traceback_later(200, exit=True)  # says where it hangs
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    alone = [dist.new_group([other]) for other in range(WORLD)][rank]
    groups = {1: SequenceGroup(alone, alone, "cpu")}
    for size in range(2, WORLD + 1):
        pair = dist.new_group(list(range(size))), dist.new_group(list(range(size)))
        if rank < size:
            groups[size] = SequenceGroup(*pair, "cpu")
    found: dict[str, str | None] = {}
    for name, size, work in cases({size: groups.get(size) for size in range(1, WORLD + 1)}):
        if len(sys.argv) > 2 and not name.startswith(tuple(sys.argv[2:])):
            continue
        if rank < size:
            try:
                work()
                found[name] = None
            except Exception:
                found[name] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(found))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    gc.freeze()  # what importing left is never garbage, nor worth copying into every process
    target = Path(sys.argv[1])
    children = []
    for number in range(WORLD):
        child = os.fork()
        if child == 0:
            try:
                rank_main(number, target)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print("exit codes", codes)
    sys.exit(any(codes))
