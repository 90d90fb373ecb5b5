"""Two gloo processes learn what one process learns from twice the batch, under DDP, FSDP2 and ZeRO-1."""

import importlib.util

import pytest
import tiny_clips
import torch
from tensor_chats import ACCUMULATED, CELLS, TensorChats, losses, make_trainer, weights
from transformers import Trainer

SHORTAGES = ["ddp_full_in_forward", "ddp_full_in_backward"]
SCENARIOS = ["ddp", *SHORTAGES, "ddp_full_twice", *tiny_clips.WAYS]
if hasattr(Trainer, "_defer_fsdp_gradient_reduction"):  # older ones wrap sharded models in DDP, too
    SCENARIOS += ["fsdp2", "fsdp2_adaptive"]
if importlib.util.find_spec("deepspeed") is not None:
    SCENARIOS.append("zero_1")

pytestmark = [
    pytest.mark.timeout(580),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]


@pytest.fixture(scope="module")
def ranks(run_ranks):
    """Folder with what rank 0 of each scenario saved, and the words of all."""
    return run_ranks(*SCENARIOS)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Losses and weights of one process that sees both ranks' samples in every step."""
    out = tmp_path_factory.mktemp("one")
    trainer = make_trainer(out, max_steps=4, per_device_train_batch_size=2, gradient_checkpointing_kwargs=CELLS)
    trainer.train()
    trainer.eval_dataset, trainer.args.per_device_eval_batch_size = TensorChats(5), 5
    return losses(trainer), weights(trainer.model), trainer.evaluate()


@pytest.mark.parametrize("scenario", ["ddp", "fsdp2", "fsdp2_adaptive", "zero_1"])
def test_two_processes_equal_one_with_twice_the_batch(ranks, one_process, scenario):
    if scenario not in SCENARIOS:
        pytest.skip(f"{scenario} is not installed")
    folder, words = ranks
    assert (folder / f"{scenario}.pt").is_file(), words[-6000:]
    found = torch.load(folder / f"{scenario}.pt")
    assert found["losses"] == pytest.approx(one_process[0], rel=1e-5)
    assert found["losses"][-1] != found["losses"][0]
    assert found["weights"].keys() == one_process[1].keys()
    for name, value in one_process[1].items():
        torch.testing.assert_close(
            found["weights"][name], value, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("way", tiny_clips.WAYS)
def test_two_processes_train_a_videomamba_as_one_does(ranks, tmp_path, way):
    """Beside labels, a smaller teacher, or CLIP: each process sees half of every step's clips."""
    folder, words = ranks
    assert (folder / f"{way}.pt").is_file(), words[-6000:]
    found = torch.load(folder / f"{way}.pt")
    clips = {"max_steps": 2, "mask": "tube", "mask_ratio": 0.0, "max_grad_norm": 1.0}
    alone = tiny_clips.WAYS[way](tiny_clips.settings(tmp_path, per_device_train_batch_size=4, **clips))
    alone.train()
    assert found["losses"] == pytest.approx(losses(alone), rel=1e-5) and found["losses"][1] != found["losses"][0]
    assert found["weights"].keys() == weights(alone.model).keys()
    for name, value in weights(alone.model).items():
        torch.testing.assert_close(found["weights"][name], value, rtol=1e-3, atol=2e-5, msg=f"{way}: {name}")


def test_an_evaluation_over_two_processes_is_that_of_one(ranks, one_process):
    """Means over the tokens of five samples, however they are dealt out and what fills up the last batch."""
    folder, words = ranks
    assert (folder / "ddp.pt").is_file(), words[-6000:]
    found = torch.load(folder / "ddp.pt")["evaluation"]
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert found[name] == pytest.approx(one_process[2][name], rel=1e-4), name


@pytest.mark.parametrize("scenario", SHORTAGES)
def test_one_process_out_of_memory_changes_nothing(ranks, tmp_path, scenario):
    """All processes begin the step anew; losses, weights and tokens are those of one process that never failed."""
    folder, words = ranks
    assert (folder / f"{scenario}.pt").is_file(), words[-6000:]
    found = torch.load(folder / f"{scenario}.pt")
    smooth = make_trainer(tmp_path, **(ACCUMULATED | {"per_device_train_batch_size": 2}))
    smooth.train()
    assert found["retries"] == 1
    assert "step 2 ran out of memory (no recomputation): once more with the next smaller plan" in words
    assert found["losses"] == pytest.approx(losses(smooth), rel=1e-5)
    assert found["tokens"] == [entry.get("num_tokens") for entry in smooth.state.log_history]
    for name, value in weights(smooth.model).items():
        torch.testing.assert_close(
            found["weights"][name], value, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_second_shortage_ends_all_processes(ranks):
    folder, words = ranks
    assert not (folder / "ddp_full_twice.pt").exists(), words[-6000:]
    assert "simulated" in (folder / "ddp_full_twice.1.txt").read_text()
    assert "another process ran out of memory" in (folder / "ddp_full_twice.0.txt").read_text()
