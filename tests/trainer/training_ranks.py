"""Two processes train together: python training_ranks.py FOLDER SCENARIO...

Ranks are forked from this process, which pays for the imports once. Rank 0 leaves FOLDER/SCENARIO.pt behind: its
logged losses and the weights after training.
"""

import faulthandler
import gc
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path

import tiny_clips
import torch

torch.set_num_threads(1)
from tensor_chats import ACCUMULATED, CELLS, FullMemory, TensorChats, adapters, losses, make_trainer, tiny_model  # noqa: E402

from video_ma2mba.modeling_video_ma2mba import parallel_cut  # noqa: E402
from video_ma2mba.trainer import step_planner  # noqa: E402
from video_ma2mba.trainer.memory_retry import RankAgreement  # noqa: E402

STEPS = {"max_steps": 4, "per_device_train_batch_size": 1, "gradient_checkpointing_kwargs": CELLS}
ZERO_1 = {
    "zero_optimization": {"stage": 1, "overlap_comm": False},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
}


def fsdp2(folder: Path, **more):
    """An FSDP unit for each layer, and one for the rest, as transformers makes them while loading."""
    from transformers.distributed import DistributedConfig

    torch.distributed.init_process_group("gloo")
    source = folder / "model"
    if os.environ["RANK"] == "0":
        tiny_model().save_pretrained(source)
    torch.distributed.barrier()
    model = type(tiny_model()).from_pretrained(source, distributed_config=DistributedConfig(fsdp_size=2))
    units = [name for name, module in model.named_modules() if "FSDP" in type(module).__name__]
    assert units == ["", *(f"model.language_model.layers.{i}" for i in range(2))], f"units: {units}"
    return make_trainer(folder, model=model, **({"ddp_backend": "gloo"} | STEPS | more))


def zero_1(folder: Path, **more):
    import deepspeed

    # Its shared-memory all-reduce would be compiled for a minute on first use; gloo does.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return make_trainer(folder, deepspeed=ZERO_1, **({"ddp_backend": "gloo"} | STEPS | more))


def ddp_full(folder: Path, backward: bool, times: int = 1):
    """The second process runs out of memory in the second micro-batch of its second step."""
    trainer = make_trainer(folder, ddp_backend="gloo", **ACCUMULATED)
    if os.environ["RANK"] == "1":
        FullMemory(trainer.video_model, call=4, backward=backward, times=times)
    return trainer


SCENARIOS = {
    "ddp": lambda folder: make_trainer(
        folder, ddp_backend="gloo", eval_dataset=TensorChats(5), per_device_eval_batch_size=2, **STEPS
    ),
    "ddp_full_in_forward": lambda folder: ddp_full(folder, backward=False),
    "ddp_full_in_backward": lambda folder: ddp_full(folder, backward=True),
    "ddp_full_twice": lambda folder: ddp_full(folder, backward=True, times=2),
    "fsdp2": fsdp2,
    "fsdp2_adaptive": lambda folder: fsdp2(
        folder, gradient_checkpointing_kwargs=None, eval_dataset=TensorChats(4), eval_strategy="steps", eval_steps=2
    ),
    "zero_1": zero_1,
}

SHARED = {"context_parallel_size": 2, "ddp_backend": "gloo"}  # two processes share every sample


def shared_lora(folder: Path):
    return make_trainer(folder, peft_config=adapters(), **(STEPS | SHARED | TWO))


def shared_narrow(folder: Path):
    """Weights in 16 bits: gradients are summed in fp32, and the optimizer gets them in the weights' type."""
    trainer = make_trainer(folder, model=tiny_model().to(torch.bfloat16), bf16=False, **(STEPS | SHARED | TWO))
    average = RankAgreement.average_gradients

    def checked(model):
        parameters = [p for p in model.parameters() if p.grad is not None]
        assert {p.grad.dtype for p in parameters} == {torch.float32}
        average(model)
        assert all(p.grad.dtype == p.dtype == torch.bfloat16 for p in parameters)

    RankAgreement.average_gradients = staticmethod(checked)
    return trainer


def shared_full(folder: Path, backward: bool):
    """The second process runs out of memory in the second micro-batch of the second step, its partner does not."""
    parallel_cut.FEWEST_TOKENS = 4  # these samples are short: cells of half their segments take hardly less

    def halves(planner, inputs):
        plan = planner.last.plan
        plan = replace(plan, segment_length=-(-plan.segment_length // 2))
        planner.last = replace(planner.last, prediction=replace(planner.last.prediction, plan=plan))
        return planner.last

    step_planner.StepPlanner.smaller = halves
    trainer = make_trainer(folder, **(ACCUMULATED | SHARED | TWO))
    if os.environ["RANK"] == "1":
        FullMemory(trainer.video_model, call=4, backward=backward)
    return trainer


TWO = {"per_device_train_batch_size": 2}
SMALL_CELLS = {"gradient_checkpointing_kwargs": {"segment_length": 5}}
SCENARIOS |= {
    "shared": lambda folder: make_trainer(folder, **(STEPS | SHARED | TWO)),
    "shared_plain_ddp": lambda folder: make_trainer(folder, adaptive_plan=False, **(STEPS | SHARED | TWO)),
    "shared_2x2": lambda folder: make_trainer(folder, **(STEPS | SHARED)),
    "shared_accumulated": lambda folder: make_trainer(folder, **(ACCUMULATED | SHARED | TWO | SMALL_CELLS)),
    "shared_heads": lambda folder: make_trainer(folder, context_parallel_schedule="heads", **(STEPS | SHARED | TWO)),
    "shared_lora": shared_lora,
    "shared_narrow": shared_narrow,
    "shared_fsdp2": lambda folder: fsdp2(folder, **(TWO | SHARED)),
    "shared_zero_1": lambda folder: zero_1(folder, **(TWO | SHARED)),
    "shared_full_in_forward": lambda folder: shared_full(folder, backward=False),
    "shared_full_in_backward": lambda folder: shared_full(folder, backward=True),
}
# VideoMamba: with everything visible, since processes draw masks of their own.
CLIPS = {"max_steps": 2, "mask": "tube", "mask_ratio": 0.0, "max_grad_norm": 1.0}
SCENARIOS |= {
    way: lambda folder, way=way: tiny_clips.WAYS[way](
        tiny_clips.settings(folder, per_device_train_batch_size=2, ddp_backend="gloo", **CLIPS)
    )
    for way in tiny_clips.WAYS
}
PROCESSES = {"shared_2x2": 4}


def rank_main(folder: Path, scenario: str) -> None:
    faulthandler.dump_traceback_later(90, exit=True)  # says where it hangs
    trainer = SCENARIOS[scenario](folder)
    try:
        trainer.train()
    except torch.OutOfMemoryError as error:  # no process may be left waiting
        folder.with_name(f"{folder.name}.{os.environ['RANK']}.txt").write_text(str(error))
        return
    full = lambda tensor: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # noqa: E731
    found = {name: full(parameter.detach()).clone() for name, parameter in trainer.model.named_parameters()}
    evaluation = trainer.evaluate() if scenario == "ddp" else None  # the last batch is filled up with other samples
    if os.environ["RANK"] == "0":
        result = {"losses": losses(trainer), "weights": found}
        if scenario not in tiny_clips.WAYS:
            result["retries"] = trainer.throughput.oom_retries
        result["tokens"] = [entry.get("num_tokens") for entry in trainer.state.log_history]
        result["evaluation"] = evaluation
        torch.save(result, folder.with_suffix(".pt"))
    torch.distributed.barrier()


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def of_accelerate(count: int) -> dict[str, str]:
    """What `accelerate launch --multi_gpu --num_processes COUNT` tells its processes beside what torchrun does."""
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    words = f"--multi_gpu --num_processes {count} --num_machines 1 --mixed_precision no --dynamo_backend no x.py"
    told = prepare_multi_gpu_env(launch_command_parser().parse_args(words.split()))
    return {name: value for name, value in told.items() if name.startswith("ACCELERATE_")}


def launch(folder: Path, scenario: str) -> None:
    folder.mkdir()
    count = PROCESSES.get(scenario, 2)
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    together |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    together |= {"GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true", "LOCAL_SIZE": str(count)}
    if scenario == "shared_plain_ddp":
        del together["ACCELERATE_USE_CPU"]
        together |= of_accelerate(count)
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            os.environ.update(together | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            try:
                rank_main(folder, scenario)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)  # the other rank's deadline ends it
            os._exit(0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(scenario, codes, flush=True)


if __name__ == "__main__":
    gc.freeze()  # what importing left is never garbage, nor worth copying into every process
    for name in sys.argv[2:]:
        launch(Path(sys.argv[1], name), name)
