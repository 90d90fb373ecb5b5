"""Footage that nobody rendered, to measure whether a model notices (`world/familiarity.py`); needs ffmpeg.

    python benchmarks/strange_videos.py OUT      # KIND-NAME.mp4, eight seconds each
    python -m video_ma2mba.world.familiarity bundled --strange OUT --out benchmarks/results/familiarity.csv

The kinds "looked at" were seen while the measure was chosen (which features, how many directions; the threshold comes
from rendered videos alone); those "held back" were made afterwards. Photographs and films are of
installed packages.
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from video_ma2mba.world import WorldDataset, render
from video_ma2mba.world.video_files import write_video

ROOT = Path(__file__).resolve().parents[1]
SECONDS, SIZE = 8, (320, 240)
LOOKED_AT = {
    "test cards": ["testsrc2", "testsrc", "smptehdbars", "rgbtestsrc", "yuvtestsrc", "pal75bars", "colorspectrum"],
    "fractals": ["mandelbrot", "sierpinski"],
    "automata": ["life=mold=10:ratio=0.3:s=80x60", "cellauto=rule=110:s=160x120"],
    "gradients": ["gradients=speed=0.05", "gradients=n=5:type=radial:speed=0.05:seed=3"],
    "noise": ["nullsrc,geq=random(1)*255:128:128", "nullsrc=s=80x60,geq=random(1)*255:random(2)*255:random(3)*255"],
    "one colour": ["color=white", "color=gray", "color=blue", "color=brown"],
    "black": ["color=black"],
}
HELD_BACK = {
    "other test cards": ["pal100bars", "smptebars", "haldclutsrc=6", "allrgb,scale=320:240", "allyuv,scale=320:240"],
    "other fractals": ["mandelbrot=start_x=-0.1:start_y=0.9:start_scale=0.3", "sierpinski=type=triangle:seed=5"],
    "other automata": ["life=s=40x30:rule=B36/S23:ratio=0.5", "cellauto=rule=30:s=64x48"],
    "other colours": ["color=pink", "color=0x808000", "color=0xC0E0FF"],
}
SWAPPED = {
    "channels swapped": [1, 2, 0],
    "channels swapped the other way": [2, 0, 1],
    "red and blue swapped": [2, 1, 0],
    "green and blue swapped": [0, 2, 1],
    "red and green swapped": [1, 0, 2],
}
PICTURES = {
    "photographs": [
        "gradio:media_assets/images/*.jp*g",
        "gradio:test_data/*.jpg",
        "matplotlib:mpl-data/sample_data/*.jpg",
    ],
    "plots": ["sympy:plotting/tests/*.png", "networkx:drawing/tests/baseline/*.png"],
}


def main() -> None:
    """Write all videos."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for where, kinds in (("looked at", LOOKED_AT), ("held back", HELD_BACK)):
        for kind, sources in kinds.items():
            for number, source in enumerate(sources):
                _ffmpeg(out / f"{where}: {kind}-{number}.mp4", ["-f", "lavfi", "-i", source])
    for kind, patterns in PICTURES.items():
        pictures = sorted({path.stat().st_size: path for pattern in patterns for path in _inside(pattern)}.values())
        for number, path in enumerate(pictures):  # the same picture in two places counts once
            zoom = f"scale=480:360,zoompan=z='1+0.05*on':d=1:s={SIZE[0]}x{SIZE[1]}:fps=4"
            where = "looked at" if kind == "photographs" else "held back"
            _ffmpeg(out / f"{where}: {kind}-{number}.mp4", ["-loop", "1", "-i", str(path), "-vf", zoom])
    for path in _inside("gradio:media_assets/videos/[abw]*.mp4"):
        kind = "a slate with a line of text" if path.stem == "a" else "a dark globe on black"
        _ffmpeg(out / f"looked at: {kind}-{path.stem}.mp4", ["-i", str(path)])
    for kind, number, frames in drawn():
        write_video(out / f"held back: {kind}-{number}.mp4", [frames], fps=2)
    print(f"{len(list(out.iterdir()))} videos in {out}")


def _ffmpeg(path: Path, source: list[str]) -> None:
    scale = [] if "-vf" in source else ["-vf", f"scale={SIZE[0]}:{SIZE[1]}"]
    command = ["ffmpeg", "-v", "error", "-y", *source, *scale, "-t", str(SECONDS), "-r", "4", "-pix_fmt", "yuv420p"]
    subprocess.run([*command, str(path)], check=True, stdin=subprocess.DEVNULL)


def _inside(pattern: str) -> Iterator[Path]:
    """Files inside an installed package, `package:pattern`."""
    package, _, names = pattern.partition(":")
    found = find_spec(package)
    if found is not None and found.origin:
        yield from sorted(Path(found.origin).parent.glob(names))


def drawn() -> Iterator[tuple[str, int, np.ndarray]]:
    """Kind, number and frames (n, H, W, 3): rendered worlds out of the rules, pages of text, pictures of the docs."""
    data = WorldDataset("test", 6, frames=(8, 24), seed=9)
    for number in range(6):
        frames = render(data.world(number), size=128)
        yield "rendered, negative", number, 255 - frames
        for name, order in SWAPPED.items():
            yield f"rendered, {name}", number, np.ascontiguousarray(frames[..., order])
        yield "rendered, four times as bright", number, np.clip(frames.astype(int) * 4, 0, 255).astype(np.uint8)
        yield "rendered, tiled 3x3", number, np.tile(frames[:, ::3, ::3], (1, 3, 3, 1))[:, :128, :128]
    random = np.random.default_rng(0)
    for number in range(4):
        frames = []
        for _ in range(16):
            page = Image.new("RGB", SIZE, ("white", "ivory", "black", "navy")[number])
            for line in range(14):
                text = " ".join("".join(random.choice(list("etaoinshrdlu"), random.integers(2, 9))) for _ in range(8))
                ImageDraw.Draw(page).text((8, 6 + 16 * line), text, fill="black" if number < 2 else "white")
            frames.append(np.asarray(page))
        yield "pages of text", number, np.stack(frames)
    for number, path in enumerate(sorted((ROOT / "docs" / "images").glob("*.png"))):
        picture = np.asarray(Image.open(path).convert("RGB").resize(SIZE))
        yield "pictures of the documentation", number, np.stack([picture] * 8)


if __name__ == "__main__":
    main()
