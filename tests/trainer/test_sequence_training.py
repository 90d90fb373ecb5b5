"""Processes that share every sample learn what one process learns: under DDP, FSDP2 and ZeRO-1, as replicas of each
other, with adapters and accumulation, and when one of them runs out of memory."""

import importlib.util

import pytest
import torch
from tensor_chats import ACCUMULATED, CELLS, adapters, losses, make_trainer, settings, tiny_model, weights
from transformers import Trainer

SHORTAGES = ["shared_full_in_forward", "shared_full_in_backward"]
ALIKE = ["shared", "shared_plain_ddp", "shared_heads", "shared_2x2"]
if hasattr(Trainer, "_defer_fsdp_gradient_reduction"):  # older ones wrap sharded models in DDP, too
    ALIKE.append("shared_fsdp2")
if importlib.util.find_spec("deepspeed") is not None:
    ALIKE.append("shared_zero_1")

pytestmark = [
    pytest.mark.timeout(580),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]


@pytest.fixture(scope="module")
def ranks(run_ranks):
    """Folder with what rank 0 of each scenario saved, and the words of all."""
    return run_ranks(*ALIKE, *SHORTAGES, "shared_accumulated", "shared_lora", "shared_narrow")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A trainer that has run its steps alone."""
    out = tmp_path_factory.mktemp("one")
    made = {}

    def run(name: str, **settings):
        if name not in made:
            made[name] = make_trainer(out / name, **({"per_device_train_batch_size": 2} | settings))
            made[name].train()
        return made[name]

    return run


def assert_learnt_alike(ranks, scenario: str, trainer) -> dict:
    folder, words = ranks
    assert (folder / f"{scenario}.pt").is_file(), words[-6000:]
    found = torch.load(folder / f"{scenario}.pt")
    assert found["losses"] == pytest.approx(losses(trainer), rel=1e-5)
    assert found["losses"][-1] != found["losses"][0]
    assert found["tokens"] == [entry.get("num_tokens") for entry in trainer.state.log_history]
    expected = weights(trainer.model)
    assert found["weights"].keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found["weights"][name], value, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    return found


@pytest.mark.parametrize("scenario", ALIKE)
def test_processes_that_share_samples_equal_one(ranks, one_process, scenario):
    cells = {"max_steps": 4, "gradient_checkpointing_kwargs": CELLS}
    assert_learnt_alike(ranks, scenario, one_process("cells", **cells))


def test_unknown_schedules_are_refused(tmp_path):
    with pytest.raises(ValueError, match="use one of round_robin, stretches, heads"):
        settings(tmp_path, context_parallel_schedule="zigzag")


def test_adapters(ranks, one_process):
    alike = {"max_steps": 4, "gradient_checkpointing_kwargs": CELLS, "peft_config": adapters()}
    assert_learnt_alike(ranks, "shared_lora", one_process("lora", **alike))


def test_weights_in_16_bits(ranks, one_process):
    folder, words = ranks
    alone = one_process("narrow", **{"max_steps": 4, "gradient_checkpointing_kwargs": CELLS, "bf16": False},
                        model=tiny_model().to(torch.bfloat16))  # fmt: skip
    assert (folder / "shared_narrow.pt").is_file(), words[-6000:]
    found = torch.load(folder / "shared_narrow.pt")
    assert found["losses"] == pytest.approx(losses(alone), rel=3e-3)
    assert {value.dtype for value in found["weights"].values()} == {torch.bfloat16}


@pytest.mark.parametrize("scenario", ["shared_accumulated", *SHORTAGES])
def test_one_process_out_of_memory_changes_nothing(ranks, one_process, scenario):
    """Its partners within the sample come to the end of their pass, and all begin the step anew."""
    alike = ACCUMULATED | {"per_device_train_batch_size": 2}
    found = assert_learnt_alike(ranks, scenario, one_process("accumulated", **alike))
    assert found["retries"] == (1 if scenario in SHORTAGES else 0)
