"""The two processes of `test_distributed.py`: python distributed_worker.py FOLDER SCENARIO...

Ranks are forked from this process, two for each scenario, which pays for the imports once. Rank 0 and 1 write their
words to FOLDER/SCENARIO.RANK.log, the exit codes of both stand in FOLDER/codes.json.

Every scenario computes the gradients (or updated parameters) of one process without checkpointing from the data of
both ranks, then its own under an engine with checkpointing on, and compares. The ranks' sequences differ in length
and in number of segments.
"""

import copy
import faulthandler
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from video_ma2mba.modeling_video_ma2mba.configuration_video_ma2mba import Ma2mbaTextConfig
from video_ma2mba.modeling_video_ma2mba.stack_language_model import Ma2mbaTextModel

WORLD = 2
VOCABULARY = 31
LENGTHS = ((20, 33), (9, 26))  # tokens of ranks 0 and 1 in the first and second micro-batch: 3 to 7 segments


class NextToken(nn.Module):
    """Language model and head; forward returns the loss, as in any training loop."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = Ma2mbaTextConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=3, state_size=6, head_dim=8, chunk_size=8
        )
        self.language_model = Ma2mbaTextModel(config)
        self.head = nn.Linear(16, VOCABULARY, bias=False)
        self.to(dtype).train()

    def checkpoint(self) -> "NextToken":
        self.language_model.set_checkpointing(True, layers_per_block=2, segment_length=5, offload=False)
        return self

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.language_model(input_ids=ids, use_cache=False).last_hidden_state
        return F.cross_entropy(self.head(hidden[0, :-1]), ids[0, 1:])


def micro_batch(number: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * number + rank)
    return torch.randint(0, VOCABULARY, (1, LENGTHS[number][rank]), generator=generator)


def single_process_gradients(model: NextToken, batches: list[int]) -> dict[str, Tensor]:
    """Mean over ranks, sum over micro-batches, plain autograd."""
    model = copy.deepcopy(model)
    model.language_model.set_checkpointing(False)
    sum(model(micro_batch(n, rank)) / WORLD for n in batches for rank in range(WORLD)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = ((found[name] - value).abs().max() / value.abs().max().clamp(min=1e-3)).item()
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def ddp(rank: int) -> None:
    """Gradients with and without accumulation; every parameter is handed over once per backward."""
    from torch.nn.parallel import DistributedDataParallel

    model = NextToken(torch.float64).checkpoint()
    expected = single_process_gradients(model, [0])
    calls: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: calls.update({name: calls.get(name, 0) + 1}))
    wrapped = DistributedDataParallel(model)
    wrapped(micro_batch(0, rank)).backward()
    assert_same({n: p.grad for n, p in model.named_parameters()}, expected, 1e-10)
    assert set(calls.values()) == {1} and len(calls) == len(expected), calls

    wrapped.zero_grad()
    expected = single_process_gradients(model, [0, 1])
    with wrapped.no_sync():
        wrapped(micro_batch(0, rank)).backward()
    wrapped(micro_batch(1, rank)).backward()
    assert_same({n: p.grad for n, p in model.named_parameters()}, expected, 1e-10)


def ddp_with_frozen_layers(rank: int) -> None:
    """A frozen embedding and block: DDP with and without its search for unused parameters."""
    from torch.nn.parallel import DistributedDataParallel

    for search in (False, True):
        model = NextToken(torch.float64).checkpoint()
        model.language_model.embeddings.requires_grad_(False)
        model.language_model.layers[0].requires_grad_(False)
        expected = {n: g for n, g in single_process_gradients(model, [0]).items() if g is not None}
        wrapped = DistributedDataParallel(model, find_unused_parameters=search)
        wrapped(micro_batch(0, rank)).backward()
        assert_same({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected, 1e-10)


def fsdp2(rank: int) -> None:
    """The language model as one unit: ranks with different numbers of segments neither hang nor lose gradients."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    model = NextToken(torch.float64).checkpoint()
    expected, both = single_process_gradients(model, [0]), single_process_gradients(model, [0, 1])
    fully_shard(model.language_model, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for _ in range(2):  # the second step starts from resharded parameters
        model.zero_grad()
        model(micro_batch(0, rank)).backward()
        assert_same({n: p.grad.full_tensor() for n, p in model.named_parameters()}, expected, 1e-10)

    model.zero_grad()
    model.set_requires_gradient_sync(False)
    model(micro_batch(0, rank)).backward()
    model.set_requires_gradient_sync(True)
    model(micro_batch(1, rank)).backward()
    assert_same({n: p.grad.full_tensor() for n, p in model.named_parameters()}, both, 1e-10)


def fsdp2_layers(rank: int) -> None:
    """Every layer a unit: ranks with different numbers of segments gather alike, in training and without gradients."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    model = NextToken(torch.float64).checkpoint()
    expected, both = single_process_gradients(model, [0]), single_process_gradients(model, [0, 1])
    for layer in model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    first = model.language_model.layers[0].mixer.in_proj
    whole, seen = first.weight.shape, []
    first.register_forward_hook(lambda module, *_: seen.append(module.weight.shape))
    for _ in range(2):  # the second step starts from resharded parameters
        model.zero_grad()
        model(micro_batch(0, rank)).backward()
        assert first.weight.to_local().shape[0] < whole[0], "at rest a layer is spread over the ranks"
        assert_same({n: p.grad.full_tensor() for n, p in model.named_parameters()}, expected, 1e-10)
    assert set(seen) == {whole}

    model.zero_grad()
    model.set_requires_gradient_sync(False)
    model(micro_batch(0, rank)).backward()
    model.set_requires_gradient_sync(True)
    model(micro_batch(1, rank)).backward()
    assert_same({n: p.grad.full_tensor() for n, p in model.named_parameters()}, both, 1e-10)

    alone = NextToken(torch.float64).checkpoint()
    model.language_model.prefill_segment_length = alone.language_model.prefill_segment_length = 4
    with torch.no_grad():
        torch.testing.assert_close(model(micro_batch(0, rank)), alone(micro_batch(0, rank)))

    halves = NextToken(torch.float64).checkpoint()
    fully_shard(halves.language_model.layers[0].mixer, mesh=mesh)
    with pytest.raises(ValueError, match="make every layer one unit"):
        halves(micro_batch(0, rank))


def whole_model_and_batches() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """The vision-language model with its tied head, everything trainable, and a batch for each rank: one with three
    frames, one with a single frame and a longer text."""
    from video_ma2mba import VideoMa2mbaConfig, VideoMa2mbaForConditionalGeneration

    torch.manual_seed(0)
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 4, "projection_dim": 16,
    }  # fmt: skip
    text = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "state_size": 6, "head_dim": 8}
    config = VideoMa2mbaConfig(text_config=text, vision_config=vision, video_token_id=39, vision_chunk_frames=2)
    model = VideoMa2mbaForConditionalGeneration(config).to(torch.float64).train()
    batches = []
    for frames, words in ((3, 6), (1, 25)):
        ids = torch.cat([torch.full((frames * config.tokens_per_frame,), 39), torch.randint(0, 39, (words,))])[None]
        pixels = torch.randint(0, 256, (frames, 3, 16, 16), dtype=torch.uint8)
        batches.append({"input_ids": ids, "labels": ids.masked_fill(ids == 39, -100), "pixel_values_videos": pixels})
    return model, batches


def fsdp2_whole_model(rank: int) -> None:
    """One unit for all, as the tied head needs; vision in recomputed chunks, ranks with different work."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, batches = whole_model_and_batches()
    sum(model(**batch).loss / WORLD for batch in batches).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    arguments = {"layers_per_block": 2, "segment_length": 5, "offload": False}
    model.gradient_checkpointing_enable(arguments)
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    for _ in range(2):
        model.zero_grad()
        model(**batches[rank]).loss.backward()
        found = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
        assert_same(found, expected, 1e-9)


def zero(rank: int, stage: int, accumulation: int) -> None:
    """DeepSpeed: parameters after two SGD steps, as one process would have them."""
    import deepspeed

    # Its shared-memory all-reduce would be compiled for a minute on first use; gloo does.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    rate, steps = 0.1, 2
    expected = NextToken(torch.float32)
    for _ in range(steps):
        gradients = single_process_gradients(expected, list(range(accumulation)))
        with torch.no_grad():
            for name, parameter in expected.named_parameters():
                parameter -= rate * gradients[name] / accumulation
    model = NextToken(torch.float32).checkpoint()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=rate),
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": accumulation,
            "zero_optimization": {"stage": stage, "overlap_comm": False},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
        },
    )
    for _ in range(steps):
        for number in range(accumulation):
            engine.backward(engine(micro_batch(number, rank)))
            engine.step()
    found = {name: p.detach() for name, p in engine.module.named_parameters()}
    assert_same(found, dict(expected.named_parameters()), 1e-5)
    moved = (expected.head.weight - NextToken(torch.float32).head.weight).abs().max().item()
    assert moved > 1e-3, "the steps are too small to show anything"


SCENARIOS: dict[str, Callable[[int], None]] = {
    "ddp": ddp,
    "ddp_with_frozen_layers": ddp_with_frozen_layers,
    "fsdp2": fsdp2,
    "fsdp2_layers": fsdp2_layers,
    "fsdp2_whole_model": fsdp2_whole_model,
    "zero_1": lambda rank: (zero(rank, 1, 1), zero(rank, 1, 2)),
    "zero_2": lambda rank: (zero(rank, 2, 1), zero(rank, 2, 2)),
}


def rank_main(folder: Path, scenario: str, rank: int) -> None:
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_SIZE": str(WORLD)})
    with (folder / f"{scenario}.{rank}.log").open("w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    faulthandler.dump_traceback_later(90, exit=True)  # says where it hangs, and where it waits for one that failed
    dist.init_process_group("gloo", init_method=f"file://{folder}/{scenario}", rank=rank, world_size=WORLD)
    with torch.random.fork_rng():
        SCENARIOS[scenario](rank)
    dist.barrier()
    dist.destroy_process_group()


def launch(folder: Path, scenario: str) -> list[int]:
    """Exit codes of both ranks; one that fails takes the other with it."""
    ranks = {}
    for rank in range(WORLD):
        child = os.fork()
        if child == 0:
            try:
                rank_main(folder, scenario, rank)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        ranks[child] = rank
    codes = [0] * WORLD
    while ranks:
        child, status = os.wait()
        codes[ranks.pop(child)] = os.waitstatus_to_exitcode(status)
        for other in ranks if status else ():
            os.kill(other, signal.SIGKILL)
    return codes


if __name__ == "__main__":
    torch.set_num_threads(1)
    target, codes = Path(sys.argv[1]), {}
    for name in sys.argv[2:]:
        codes[name] = launch(target, name)
        (target / "codes.json").write_text(json.dumps(codes))
