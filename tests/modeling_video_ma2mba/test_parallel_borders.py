"""Cells shared out among several ranks: the same values as on one, with nothing but border states passed around.

The ranks are threads here, each with a model of its own, and hand states to each other through queues.
"""

import copy
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from queue import Queue

import pytest
import torch
from stack_gradients import make_model

from video_ma2mba.modeling_video_ma2mba.parallel_borders import LocalBorders
from video_ma2mba.modeling_video_ma2mba.recompute_cell import CellRunner
from video_ma2mba.modeling_video_ma2mba.recompute_schedule import CellOrder, wavefront
from video_ma2mba.modeling_video_ma2mba.recompute_store import DeviceStore
from video_ma2mba.modeling_video_ma2mba.stack_token_layout import TokenLayout
from video_ma2mba.modeling_video_ma2mba.state_layers import flatten, regroup
from video_ma2mba.modeling_video_ma2mba.state_video import VideoState


class QueueBorders(LocalBorders):
    """States to the right and gradients to the left, where the neighbouring segment has another owner."""

    def __init__(self, order: CellOrder, rank: int, mail: dict, *arguments) -> None:
        super().__init__(*arguments)
        self.order, self.rank, self.mail = order, rank, mail

    def elsewhere(self, segment: int) -> bool:
        return 0 <= segment < self.order.segments and self.order.owner(segment) != self.rank

    def state_before(self, block, segment):
        if self.elsewhere(segment - 1):
            self._states[block] = self.mail["states", block, segment].get(timeout=60)
        return super().state_before(block, segment)

    def state_after(self, block, segment, states):
        super().state_after(block, segment, states)
        if self.elsewhere(segment + 1):
            self.mail["states", block, segment + 1].put(states)

    def gradient_after(self, block, segment):
        if self.elsewhere(segment + 1):
            self._gradients[block] = self.mail["gradients", block, segment].get(timeout=60)
        return super().gradient_after(block, segment)

    def gradient_before(self, block, segment, gradients):
        super().gradient_before(block, segment, gradients)
        if self.elsewhere(segment - 1):
            self.mail["gradients", block, segment - 1].put(gradients)


def run_rank(rank: int, order: CellOrder, model, plan, x, dout, start, mail: dict) -> dict:
    """Forward and backward of one rank's cells; values by segment."""
    blocks, segments = plan
    store = DeviceStore()
    borders = QueueBorders(order, rank, mail, store, [flatten(start[i] for i in block) for block in blocks])
    runner = CellRunner(model, blocks, segments, TokenLayout(), None)
    parameters = [runner.parameters(k) for k in range(len(blocks))]
    found = {"out": {}, "dx": {}, "start": None, "sums": [[torch.zeros_like(p) for p in own] for own in parameters]}
    stream = None
    with torch.no_grad():
        for k, i in order.forward(rank):
            a, b = segments[i]
            stream = x[:, a:b] if k == 0 else stream
            store.put(("x", k, i), [stream])
            stream, states = runner.forward((k, i), stream, borders.state_before(k, i))
            borders.state_after(k, i, states)
            if k == len(blocks) - 1:
                found["out"][i] = stream
    borders.start_backward([[] for _ in blocks])
    gradient = None
    for k, i in order.backward(rank):
        a, b = segments[i]
        gradient = dout[:, a:b] if k == len(blocks) - 1 else gradient
        before = (store.take(("x", k, i))[0], borders.kept_state(k, i), gradient, borders.gradient_after(k, i))
        gradient, states, own = runner.backward((k, i), *before, parameters[k])
        borders.gradient_before(k, i, states)
        for total, new in zip(found["sums"][k], own, strict=True):
            total += new
        if k == 0:
            found["dx"][i] = gradient
    if order.owner(0) == rank:
        found["start"] = borders.start_gradients()
    return found


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("cells", [(2, 5), (1, 4), (3, 3)], ids=str)
def test_ranks_that_share_segments_compute_what_one_computes(ranks, cells):
    layers, length, tokens = cells[0], cells[1], 23
    model = make_model(6)
    x = torch.randn(2, tokens, 16, dtype=torch.float64, requires_grad=True)
    conv = torch.randn(6, 2, model.layers[0].mixer.shape.conv_dim, 3, dtype=torch.float64, requires_grad=True)
    ssm = torch.randn(6, 2, 4, 8, 6, dtype=torch.float64, requires_grad=True)
    model.set_checkpointing(True, layers_per_block=layers, segment_length=length, offload=False)
    state = VideoState.from_stacked(conv, ssm)
    out, _ = model.engine.run(model, x, state, TokenLayout(), None)
    dout = torch.randn_like(out)
    out.backward(dout)

    plan = model.engine.last_plan
    parts = plan.blocks(6), plan.segments(tokens)
    order = wavefront(len(parts[0]), len(parts[1]), ranks)
    mail = {(kind, *cell): Queue() for kind in ("states", "gradients") for cell in order.cells}
    models = [copy.deepcopy(model) for _ in range(ranks)]
    start = state.detach().layers
    with ThreadPoolExecutor(ranks) as pool:
        arguments = (parts, x.detach(), dout, start, mail)
        jobs = [pool.submit(run_rank, r, order, models[r], *arguments) for r in range(ranks)]
        found = [job.result(timeout=120) for job in jobs]

    for name, whole in (("out", out), ("dx", x.grad)):
        pieces = {i: piece for rank in found for i, piece in rank[name].items()}
        assert torch.equal(torch.cat([pieces[i] for i in sorted(pieces)], dim=1), whole)
    dconv, dssm = zip(*regroup(state.kinds, chain(*found[0]["start"])), strict=True)
    assert torch.equal(torch.stack(dconv), conv.grad) and torch.equal(torch.stack(dssm), ssm.grad)
    runner = CellRunner(model, *parts, TokenLayout(), None)
    for block in range(len(parts[0])):
        for n, parameter in enumerate(runner.parameters(block)):
            total = sum(rank["sums"][block][n] for rank in found)
            torch.testing.assert_close(total, parameter.grad, rtol=1e-12, atol=1e-12)
