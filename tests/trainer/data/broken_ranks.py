"""Two processes train on data of which much is broken: python broken_ranks.py FOLDER (with model/ and rows.jsonl).

Rows alternate between the ranks. The first of rank 1 is broken, and nothing can replace it: its batch has no labels.
Each rank leaves FOLDER/rankN.pt behind: its losses and its weights.
"""

import faulthandler
import os
import socket
import sys
from pathlib import Path

import torch

from video_ma2mba import VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor
from video_ma2mba.trainer.data import BrokenSamples, VideoChatCollator, load_training_data
from video_ma2mba.trainer.training_config import VideoMa2mbaTrainingConfig
from video_ma2mba.trainer.video_trainer import VideoMa2mbaTrainer


def rank_main(folder: Path, rank: int) -> None:
    faulthandler.dump_traceback_later(120, exit=True)  # says where it hangs
    torch.set_num_threads(1)
    processor = VideoMa2mbaProcessor.from_pretrained(folder / "model")
    args = VideoMa2mbaTrainingConfig(
        str(folder / "run"),
        use_cpu=True,
        ddp_backend="gloo",
        max_steps=4,
        per_device_train_batch_size=1,
        train_sampling_strategy="sequential",
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = VideoMa2mbaTrainer(
        VideoMa2mbaForConditionalGeneration.from_pretrained(folder / "model"),
        args,
        train_dataset=load_training_data(folder / "rows.jsonl"),
        data_collator=VideoChatCollator(processor, report=BrokenSamples(folder / "broken.jsonl")),
        processing_class=processor,
    )
    trainer.train()
    weights = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    torch.save({"weights": weights, "losses": losses}, folder / f"rank{rank}.pt")


def main() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true", "LOCAL_SIZE": "2"}
    children = []
    for rank in range(2):
        if (child := os.fork()) == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            code = 1
            try:
                rank_main(Path(sys.argv[1]), rank)
                code = 0
            finally:
                sys.excepthook(*sys.exc_info()) if code else None
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(any(codes))


if __name__ == "__main__":
    main()
