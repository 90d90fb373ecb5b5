"""One training step of the whole model on a long video: GPU peak and seconds, split by part.

    python benchmarks/whole_model_step.py --frames 7200 --preset 370m --out benchmarks/results/whole_model_step.csv

Random weights in bf16, CLIP ViT-L/14-336 and projector trainable, random uint8 frames in host memory, one question
and a 32-token answer after the video. Two hours at 1 FPS are 7,200 frames, 1,036,800 visual tokens. A first step on
few frames tunes the kernels; the long step is timed by itself. `gpu_peak_gb` includes weights and gradients.
"""

import argparse
import datetime
import time
from pathlib import Path

import torch
from random_models import SIZES, video_model
from result_tables import append_rows

from video_ma2mba.modeling_video_ma2mba import vision_features
from video_ma2mba.modeling_video_ma2mba.modeling_video_ma2mba import VideoMa2mbaForConditionalGeneration

ANSWER = 32


class Clock:
    """Seconds spent in marked functions, each closed by a synchronisation."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, owner: object, name: str, part: str) -> None:
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            torch.cuda.synchronize()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            torch.cuda.synchronize()
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start
            return result

        setattr(owner, name, timed)


def batch(model: VideoMa2mbaForConditionalGeneration, frames: int, device: str = "cuda") -> dict:
    config = model.config
    visual = torch.full((frames * config.tokens_per_frame,), config.video_token_id)
    text = torch.randint(10, 50000, (16 + ANSWER,))
    ids = torch.cat([text[:8], visual, text[8:]]).unsqueeze(0)
    labels = torch.full_like(ids, -100)
    labels[0, -ANSWER:] = ids[0, -ANSWER:]
    side = config.vision_config.image_size
    pixels = torch.empty(frames, 3, side, side, dtype=torch.uint8)
    for piece in pixels.split(256):
        piece.random_(0, 256)
    return {"input_ids": ids.to(device), "labels": labels.to(device), "pixel_values_videos": pixels}


def step(model: VideoMa2mbaForConditionalGeneration, data: dict) -> tuple[float, float]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    loss = model(**data, use_cache=False).loss
    loss.backward()
    torch.cuda.synchronize()
    return loss.item(), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="370m", choices=SIZES)
    parser.add_argument("--frames", type=int, default=7200)
    parser.add_argument("--layers-per-block", type=int, default=8)
    parser.add_argument("--segment-length", type=int, default=16384)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/whole_model_step.csv"))
    arguments = parser.parse_args()
    model = video_model(arguments.preset).train()
    model.gradient_checkpointing_enable(
        {"method": "multi_axis", "layers_per_block": arguments.layers_per_block,
         "segment_length": arguments.segment_length, "offload": True}
    )  # fmt: skip
    step(model, batch(model, 64))
    data = batch(model, arguments.frames)
    model.zero_grad(set_to_none=False)
    clock = Clock()
    clock.wrap(vision_features.ChunkedRows, "forward", "vision forward")
    clock.wrap(vision_features.ChunkedRows, "backward", "vision recompute and backward")
    clock.wrap(model.model.language_model.engine, "run", "language model forward")
    weights = sum(p.nbytes + (p.grad.nbytes if p.grad is not None else 0) for p in model.parameters())
    loss, seconds = step(model, data)
    peak = torch.cuda.max_memory_allocated()
    squares = [p.grad.float().pow(2).sum() for p in model.parameters() if p.grad is not None]
    engine = model.model.language_model.engine
    row = {
        "hardware": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "model": arguments.preset,
        "frames": arguments.frames,
        "tokens": data["input_ids"].shape[1],
        "plan": engine.last_plan,
        "seconds": round(seconds, 1),
        "gpu_peak_gb": round(peak / 1e9, 2),
        "weights_gradients_gb": round(weights / 1e9, 2),
        "host_checkpoints_gb": round(engine.last_host_bytes / 1e9, 2),
        "loss": round(loss, 4),
        "grad_norm": f"{torch.stack(squares).sum().sqrt().item():.5g}",
    }
    row |= {part: round(value, 1) for part, value in clock.seconds.items()}
    row["language model backward and rest"] = round(seconds - sum(clock.seconds.values()), 1)
    print(row, flush=True)
    append_rows(arguments.out, [row])


if __name__ == "__main__":
    main()
