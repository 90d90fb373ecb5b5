"""GPU and host memory, and time per frame, of a session that is asked while it reads; one row every 500 frames.

    python benchmarks/stream_memory_gpu.py [--preset 370m] [--frames 5000] --out FILE.csv

Random weights in bf16, CLIP ViT-L/14-336 shape, 144 tokens a frame, random frames of 336x336 pixels from memory. Two
states take turns (`remember`), so every frame is read into two rows. One answer of 16 tokens is asked for per row of
the table, while the reading goes on; its time includes waiting for the chunk of frames that is being read.
"""

import argparse
import datetime
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from result_tables import hardware, write_rows

from video_ma2mba import VideoMa2mbaProcessor, VideoMa2mbaVideoProcessor, VideoSession
from video_ma2mba.modeling_video_ma2mba.configuration_video_ma2mba import VideoMa2mbaConfig
from video_ma2mba.modeling_video_ma2mba.modeling_video_ma2mba import VideoMa2mbaForConditionalGeneration
from video_ma2mba.processing.byte_tokenizer import build_byte_tokenizer

SIZES = {"370m": (1024, 48), "1.3b": (2048, 48), "2.7b": (2560, 64)}
EVERY = 500
WAITING = 128


def build(preset: str, device: str) -> tuple[VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor]:
    width, layers = SIZES[preset]
    tokenizer = build_byte_tokenizer()
    video_token_id = tokenizer.convert_tokens_to_ids("<video>")
    text = {"hidden_size": width, "num_hidden_layers": layers}
    torch.manual_seed(0)
    with torch.device(device):
        model = VideoMa2mbaForConditionalGeneration(VideoMa2mbaConfig(text_config=text, video_token_id=video_token_id))
    for name, parameter in model.named_parameters():
        if not name.endswith(("A_log", "D", "dt_bias")):
            parameter.data = parameter.data.bfloat16()
    side = model.config.vision_config.image_size
    pictures = VideoMa2mbaVideoProcessor(size={"height": side, "width": side})
    return model.eval(), VideoMa2mbaProcessor(tokenizer, pictures, tokens_per_frame=model.config.tokens_per_frame)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=SIZES, default="370m")
    parser.add_argument("--frames", type=int, default=5000)
    parser.add_argument("--remember", type=float, default=600)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    cuda = arguments.device.startswith("cuda")
    model, processor = build(arguments.preset, arguments.device)
    side = processor.video_processor.size["height"]
    pictures = np.random.default_rng(0).integers(0, 256, (64, side, side, 3), np.uint8)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    rows = []
    with VideoSession(model, processor, policy="queue", waiting=WAITING, remember=arguments.remember) as session:
        began, read = time.perf_counter(), 0
        for number in range(1, arguments.frames + 1):
            session.push(pictures[number % len(pictures)])
            if number % EVERY:
                continue
            while session.seen is None:
                time.sleep(0.001)
            asking = time.perf_counter()
            session.ask("What is shown?", max_new_tokens=16, min_new_tokens=16)
            answered = time.perf_counter()
            rows.append(
                {
                    "frames": session.report.frames_read,
                    "ms_per_frame": round(1e3 * (answered - began) / (session.report.frames_read - read), 3),
                    "answer_ms": round(1e3 * (answered - asking), 1),
                    "gpu_peak_mb_above_weights": round((torch.cuda.max_memory_allocated() - weights) / 1e6)
                    if cuda
                    else "",
                    "host_rss_mb": round(psutil.Process().memory_info().rss / 1e6),
                    "state_mb": round(session.seen.state.nbytes / 1e6, 2),
                }
            )
            print(rows[-1], flush=True)
            began, read = time.perf_counter(), session.report.frames_read
            if cuda:
                torch.cuda.reset_peak_memory_stats()
        session.finish()
    setting = {
        "preset": arguments.preset,
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(arguments.device),
        "torch": torch.__version__,
    }
    write_rows(arguments.out, [{**row, **setting} for row in rows])


if __name__ == "__main__":
    main()
