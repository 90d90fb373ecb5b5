"""Training runs that end by SIGKILL: python killed_runs.py FOLDER WHERE...

Each run is a process of its own, killed at step 5 of 6, after the checkpoint of step 4: "step" in the middle of a
backward pass, "save" in the middle of writing the checkpoint of step 4, "delete" in the middle of deleting that of
step 2. "clips" is a VideoMamba beside a smaller teacher, killed in a backward pass. All runs are forked from this
one, which pays for the imports once.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

import tiny_clips
import torch

torch.set_num_threads(1)
from tensor_chats import make_trainer  # noqa: E402


def die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run(out: Path, where: str) -> None:
    saves = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1 if where == "delete" else None}
    if where == "clips":
        trainer = tiny_clips.distillation_of(tiny_clips.settings(out, **tiny_clips.AUGMENTED, **saves))
    else:
        trainer = make_trainer(out, **saves)
    if where in ("step", "clips"):
        embeddings = trainer.model.get_parameter("student.videomamba.cls_token") if where == "clips" else None
        embeddings = trainer.video_model.get_input_embeddings().weight if embeddings is None else embeddings
        embeddings.register_post_accumulate_grad_hook(lambda _: die() if trainer.state.global_step == 4 else None)
    elif where == "save":
        save = torch.save

        def save_half(value, target, *arguments, **keywords):
            save(value, target, *arguments, **keywords)
            if str(target).endswith("checkpoint-4/optimizer.pt"):
                os.truncate(target, os.path.getsize(target) // 2)
                die()

        torch.save = save_half
    else:

        def remove_half(folder, *arguments, **keywords):
            os.unlink(os.path.join(folder, "optimizer.pt"))
            die()

        shutil.rmtree = remove_half
    trainer.train()


if __name__ == "__main__":
    for place in sys.argv[2:]:
        child = os.fork()
        if child == 0:
            run(Path(sys.argv[1], place), place)
            os._exit(1)  # it should not have come this far
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"{place}: ended by itself"
