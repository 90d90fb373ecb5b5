"""The recipe `lora` within the memory of a small card: one optimizer step on videos of growing length.

    python benchmarks/lora_card.py --preset 2.7b --card-gb 24 --frames 120 600 3600

Mamba-2 of the given size and CLIP-L/14-336 with random weights in bf16, adapters of rank 16 in `in_proj` and
`out_proj`, the projector trainable; random uint8 frames in host memory, a 32-token answer. PyTorch may allocate no
more than the card's memory less `--context-gb` (what CUDA itself takes), whatever GPU this runs on; so its seconds
are that GPU's.
"""

import argparse
import datetime
import time
from pathlib import Path

import torch
from random_models import SIZES, processor_of, video_model
from result_tables import append_rows
from whole_model_step import ANSWER, batch

from video_ma2mba.trainer.recipe import read_recipe
from video_ma2mba.trainer.train_run import lora_config
from video_ma2mba.trainer.video_trainer import VideoMa2mbaTrainer


class Videos(torch.utils.data.Dataset):
    """One random video of each length, in order; the first only tunes the kernels."""

    def __init__(self, model, lengths: list[int]) -> None:
        self.model, self.lengths = model, lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value.cpu() for name, value in batch(self.model, self.lengths[index]).items()}


class Card(VideoMa2mbaTrainer):
    """Writes down every step as it ends, but for the first."""

    about: dict
    table: Path

    def training_step(self, model, inputs, num_items_in_batch=None):
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        torch.cuda.synchronize()
        row = self.about | {
            "frames": len(inputs["pixel_values_videos"]),
            "tokens": inputs["input_ids"].shape[1],
            "plan": str(self._retry.planner.last),
            "seconds": round(time.perf_counter() - start, 1),
            "gpu_peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
            "predicted_peak_gb": round(self.throughput.predicted_peak / 1e9, 2),
            "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2),
            "host_checkpoints_gb": round(self.video_model.model.language_model.engine.last_host_bytes / 1e9, 2),
            "oom_retries": self.throughput.oom_retries,
            "loss": round(loss.item(), 3),
        }
        print(row, flush=True)
        if self.state.global_step:
            append_rows(self.table, [row])
        self.throughput.restart()
        return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="2.7b", choices=SIZES)
    parser.add_argument("--card-gb", type=float, default=24.0)
    parser.add_argument("--context-gb", type=float, default=1.0)
    parser.add_argument("--frames", type=int, nargs="+", default=[120, 600, 3600])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/lora_card.csv"))
    options = parser.parse_args()
    allowed = (options.card_gb - options.context_gb) * 1e9
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.mem_get_info()[1])
    model = video_model(options.preset).train()
    budget = 0.95 * (allowed - torch.cuda.memory_allocated()) - 1e9  # adapters, their optimizer state, fragments
    lengths = [32, *options.frames]
    overrides = ["output_dir=/tmp/lora_card", "eval_share=0", "eval_strategy=no", "early_stopping_patience=null"]
    overrides += [
        "save_strategy=no",
        "report_to=none",
        "dataloader_num_workers=0",
        "dataloader_persistent_workers=false",
        "dataloader_prefetch_factor=null",
    ]
    overrides += ["global_batch_size=1", f"max_steps={len(lengths)}", "train_sampling_strategy=sequential"]
    overrides += ["disable_tqdm=true", f"gradient_checkpointing_kwargs={{memory_budget: {int(budget)}}}"]
    recipe, args = read_recipe("lora", overrides)
    processor = processor_of(model.config)
    data = Videos(model, lengths)
    trainer = Card(
        model,
        args,
        train_dataset=data,
        data_collator=lambda items: items[0],
        processing_class=processor,
        peft_config=lora_config(recipe),
    )
    trainer.table = options.out
    trainer.about = {"hardware": torch.cuda.get_device_name(), "date": datetime.date.today().isoformat()}
    trainer.about |= {"model": options.preset, "card_gb": options.card_gb, "answer_tokens": ANSWER}
    trainer.train()


if __name__ == "__main__":
    main()
