"""Two processes share every sample under torchrun's agent, and one is killed: python killed_rank.py FOLDER

Both runs are forked from this process, which pays for the imports once. In the first, rank 1 dies in the middle of the
backward pass of step 5 of 6, after the checkpoint of step 4; the second goes on from there. Prints what the agent says
and the seconds until the first run had ended.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch

torch.set_num_threads(1)
from tensor_chats import CELLS, losses, make_trainer, weights  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: E402
from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # noqa: E402


def run(folder: str, deadly: bool) -> None:
    shared = {"context_parallel_size": 2, "ddp_backend": "gloo", "save_strategy": "steps", "save_steps": 2}
    shared["gradient_checkpointing_kwargs"] = CELLS  # such short samples would else be one process's
    trainer = make_trainer(Path(folder, "run"), **shared)
    died_at = Path(folder, "died")

    def die(_: torch.Tensor) -> None:
        if trainer.state.global_step == 4:
            died_at.write_text(str(time.time()), encoding="utf-8")
            os.kill(os.getpid(), signal.SIGKILL)

    if deadly and os.environ["RANK"] == "1":
        trainer.video_model.get_input_embeddings().weight.register_post_accumulate_grad_hook(die)
    try:
        trainer.train(resume_from_checkpoint=None if deadly else True)
    except ConnectionError as error:  # as the command does
        print("error:", error, file=sys.stderr, flush=True)
        raise
    if os.environ["RANK"] == "0":
        torch.save({"losses": losses(trainer), "weights": weights(trainer.model)}, Path(folder, "end.pt"))


if __name__ == "__main__":
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true"}
    config = LaunchConfig(1, 1, 2, run_id="killed", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
                          start_method="fork")  # fmt: skip
    try:
        elastic_launch(config, run)(sys.argv[1], True)
    except ChildFailedError as error:
        print(error)
    print("seconds", time.time() - float(Path(sys.argv[1], "died").read_text(encoding="utf-8")), flush=True)
    elastic_launch(config, run)(sys.argv[1], False)
