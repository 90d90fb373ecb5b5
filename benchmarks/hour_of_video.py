"""A long H.264 file at 720p and 30 frames a second, made in seconds: a rendered clip whose packets are repeated.

    python benchmarks/hour_of_video.py OUT.mp4 [--seconds 3600]

The clip shows the rendered world over a grainy background that pans, coded by x264 with its default groups of pictures
(250 frames, 3 B-frames), about 3 Mbit/s: what it costs to decode is what a real 720p film costs, give or take.
"""

import argparse
import time
from pathlib import Path

import av
import numpy as np
from PIL import Image

from video_ma2mba.world import WorldRenderer, build_world, video_seed

WIDTH, HEIGHT, RATE = 1280, 720, 30


def clip_frames(seconds: int):
    """Yield uint8 (720, 1280, 3) pictures: world frames at 6 a second, enlarged, on a background that moves always."""
    random = np.random.default_rng(0)
    grain = np.asarray(Image.fromarray(random.integers(0, 90, (90, 320, 3), np.uint8)).resize((2 * WIDTH, HEIGHT)))
    world = build_world(video_seed("test", seconds), seconds * 6)
    number = 0
    for chunk in WorldRenderer(world, 64).chunks(1.0):
        for frame in chunk:
            shown = np.asarray(Image.fromarray(frame).resize((HEIGHT - 80, HEIGHT - 80), Image.Resampling.BICUBIC))
            for _ in range(RATE // 6):
                left = (4 * number) % WIDTH
                picture = grain[:, left : left + WIDTH].copy()
                picture[40:-40, 320 : 320 + HEIGHT - 80] = shown
                noise = random.integers(0, 6, (HEIGHT // 4, WIDTH // 4, 1), np.uint8).repeat(4, 0).repeat(4, 1)
                yield picture + noise
                number += 1


def write_hour(path: Path, seconds: int = 3600, clip_seconds: int = 25) -> int:
    """Write the file; returns its bytes. Every repetition begins with a key frame, so it decodes as one video."""
    clip = path.with_suffix(".clip.mp4")
    with av.open(str(clip), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "veryfast", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for picture in clip_frames(clip_seconds):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(clip)) as source:
        given = source.streams.video[0]
        packets = [(bytes(p), p.pts, p.dts, p.duration, p.is_keyframe) for p in source.demux(given) if p.size]
        time_base, length = given.time_base, int(clip_seconds / given.time_base)
        with av.open(str(path), "w") as target:
            stream = target.add_stream_from_template(given)
            for round_ in range(-(-seconds // clip_seconds)):
                for data, pts, dts, duration, key in packets:
                    packet = av.Packet(data)
                    packet.stream, packet.time_base = stream, time_base
                    packet.pts, packet.dts, packet.duration = (
                        pts + round_ * length,
                        dts + round_ * length,
                        duration,
                    )
                    packet.is_keyframe = key
                    target.mux(packet)
    clip.unlink()
    return path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=int, default=3600)
    arguments = parser.parse_args()
    began = time.perf_counter()
    size = write_hour(arguments.out, arguments.seconds)
    print(f"{arguments.out}: {size / 1e6:.0f} MB, {8 * size / arguments.seconds / 1e6:.1f} Mbit/s, "
          f"made in {time.perf_counter() - began:.0f} s")  # fmt: skip


if __name__ == "__main__":
    main()
