"""From a file to an answer: decoding, vision tower and language model alone, in turns, and overlapped.

    python benchmarks/read_overlap.py                # the bundled checkpoint, 10 minutes of 64x64 world video
    python benchmarks/read_overlap.py --hour --preset 2.7b --device cuda   # CLIP-L + 2.7B with random weights

`--hour` writes one hour of 720p30 H.264 first (see hour_of_video.py). Each stage alone: the file is decoded to frames
of the model's size and these are thrown away; frames kept in memory go through the tower; rows kept in memory go
through the language model. "in turns" decodes when a chunk is asked for, in the thread that runs the model. The second
question's time to first token is the median of five on the state just read. Appends to `results/read_overlap.csv`.
"""

import argparse
import datetime
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from random_models import SIZES, processor_of, video_model
from result_tables import append_rows, hardware

from video_ma2mba import BUNDLED_CHECKPOINT, VideoQuestionAnsweringPipeline, VideoState
from video_ma2mba.processing import frame_decoding

OUT = Path(__file__).parent / "results" / "read_overlap.csv"
QUESTIONS = ("Which sign did the card show?", "How many squares are there?")


def random_pipeline(preset: str, device: torch.device, chunk_frames: int | None, segment: int | None):
    """A pipeline of the paper's sizes with random bf16 weights and the byte tokenizer."""
    settings = {"vision_chunk_frames": chunk_frames, "prefill_segment_length": segment}
    model = video_model(preset, device=device, **{name: value for name, value in settings.items() if value})
    return VideoQuestionAnsweringPipeline(model=model, processor=processor_of(model.config), device=device)


def bundled_pipeline(device: torch.device):
    from video_ma2mba.loading import load_pipeline

    return load_pipeline(str(BUNDLED_CHECKPOINT), device=str(device))


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock seconds, the GPU's work included."""
    begin = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def open_reader(pipe, video: Path):
    return pipe.processor.video_processor.open(str(video), fps=1)


def stages_alone(pipe, video: Path) -> dict[str, float]:
    """Seconds of each stage for the whole video while the others stand still."""
    model, size = pipe.model, pipe.model.config.read_chunk_frames
    with open_reader(pipe, video) as reader:
        found = {"look for frames (scan)": seconds(lambda: reader.expected_frames)}
        found["digest of the file"] = seconds(reader.content_digest)
        frames = reader.expected_frames
        found["decode"] = seconds(lambda: sum(len(chunk) for chunk in reader.chunks(size)))
        chunk = next(reader.chunks(size))
    pixels = torch.from_numpy(chunk.pixels).permute(0, 3, 1, 2)
    pieces = [min(size, frames - first) for first in range(0, frames, size)]

    def vision() -> None:
        for count in pieces:
            model.get_video_features(pixels[:count])

    rows = model.get_video_features(pixels).unsqueeze(0)
    language_model, per_frame = model.model.language_model, model.config.tokens_per_frame
    state = VideoState.zeros(language_model.config, 1, rows.device, rows.dtype)

    def language() -> None:
        for count in pieces:
            wanted = torch.zeros(1, count * per_frame, dtype=torch.bool)
            wanted[:, -1] = True
            language_model(
                inputs_embeds=rows[:, : count * per_frame],
                past_key_values=state,
                use_cache=True,
                output_positions=wanted,
            )

    with torch.no_grad():
        seconds(lambda: (vision(), language()) if frames <= 64 else language_model(inputs_embeds=rows))  # warm up
        found["vision tower"] = seconds(vision)
        found["language model"] = seconds(language)
    return found


def first_token(pipe, state, question: str) -> float:
    return seconds(lambda: pipe.ask(state, question, max_new_tokens=1))


def measure(pipe, video: Path, in_turns: bool) -> dict[str, object]:
    pipe.ask(pipe.read(str(video), fps=1, end=60), QUESTIONS[0], max_new_tokens=2)  # kernels, caches
    states: list[VideoState] = []
    alone = stages_alone(pipe, video)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    together = seconds(lambda: states.append(pipe.read(str(video), fps=1)))
    answer = seconds(lambda: pipe.ask(states[0], QUESTIONS[0], max_new_tokens=16))
    second = median(first_token(pipe, states[0], QUESTIONS[1]) for _ in range(5))
    row: dict[str, object] = {"frames": states[0].metadata["frames"], "tokens": states[0].seen_tokens}
    row |= {f"{name}, alone (s)": round(value, 2) for name, value in alone.items()}
    compute = alone["vision tower"] + alone["language model"]
    parts = {"decode": alone["look for frames (scan)"] + alone["decode"], "model (vision + language)": compute}
    slowest = max(parts, key=parts.get)
    row |= {
        "read, overlapped (s)": round(together, 2),
        "file to first answer (s)": round(together + answer, 2),
        "slowest part": slowest,
        "overlapped / slowest part alone": round((together + answer) / parts[slowest], 3),
        "second question to first token (ms)": round(second * 1000, 1),
        "state (MB)": round(states[0].nbytes / 1e6, 1),
    }
    row |= {"GPU peak (GB)": "", "read, in turns (s)": ""}
    if torch.cuda.is_available():
        row["GPU peak (GB)"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    if in_turns:
        overlapped = frame_decoding.in_order
        frame_decoding.in_order = lambda parts, threads, outstanding, room: overlapped(parts, 0, outstanding, room)
        row["read, in turns (s)"] = round(seconds(lambda: states.append(pipe.read(str(video), fps=1))), 2)
        frame_decoding.in_order = overlapped
        assert torch.equal(states[0].ssm, states[1].ssm), "overlapped reading must give the same state"
    return row


def describe(video: Path) -> str:
    import av

    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        picture = f"{stream.width}x{stream.height} at {float(stream.average_rate):g} fps"
        length = f"{float(stream.duration * stream.time_base):.0f} s"
        return f"{stream.codec_context.name}, {picture}, {length}, {video.stat().st_size / 1e6:.1f} MB"


def make_video(path: Path, hour: bool, length: int) -> None:
    if hour:
        import hour_of_video  # beside this script

        hour_of_video.write_hour(path, length)
        return
    from video_ma2mba.world import build_world, video_seed
    from video_ma2mba.world.video_files import write_world

    write_world(path, build_world(video_seed("test", length), length))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--preset", choices=SIZES, help="random weights of this size (default: the bundled checkpoint)"
    )
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--video", type=Path, help="read this file instead of making one")
    parser.add_argument("--hour", action="store_true", help="make 720p30 H.264 instead of 64x64 at 1 frame a second")
    parser.add_argument("--seconds", type=int, help="length of the video made (default 600; with --hour 3600)")
    parser.add_argument("--chunk-frames", type=int, help="frames that run through the tower together")
    parser.add_argument("--segment", type=int, help="tokens that run through the language model together")
    parser.add_argument("--in-turns", action="store_true", help="read once more without overlap, and compare states")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    device = arguments.device
    if arguments.preset:
        pipe = random_pipeline(arguments.preset, device, arguments.chunk_frames, arguments.segment)
    else:
        pipe = bundled_pipeline(device)
    with tempfile.TemporaryDirectory() as folder:
        video = arguments.video or Path(folder) / "video.mp4"
        if arguments.video is None:
            length = arguments.seconds or (3600 if arguments.hour else 600)
            print(f"video made in {seconds(lambda: make_video(video, arguments.hour, length)):.0f} s", flush=True)
        row = {
            "date": datetime.date.today().isoformat(),
            "hardware": hardware(device)
            + (f", {len(os.sched_getaffinity(0))} CPU cores" if device.type == "cuda" else ""),
            "threads": torch.get_num_threads(),
            "model": f"CLIP-L + {arguments.preset}, random, bf16" if arguments.preset else "bundled, fp32",
            "video": describe(video),
            "frames at once": pipe.model.config.read_chunk_frames,
            "frames in the tower at once": pipe.model.config.vision_chunk_frames,
            "segment": pipe.model.config.prefill_segment_length,
            **measure(pipe, video, arguments.in_turns),
        }
    for name, value in row.items():
        print(f"{name}: {value}", flush=True)
    append_rows(arguments.out, [row])


if __name__ == "__main__":
    main()
