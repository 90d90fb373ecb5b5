"""Damaged state files and videos: refused in one clear error, or read right; within bounds of time and memory.

    python benchmarks/fuzz_files.py [--states 2000] [--videos 500]

States: one that the bundled checkpoint read, damaged (see fuzzing.py); or "resealed": its header changed and given a
valid checksum again, as an attacker would. "WRONG" is a damaged file that loads as another state than it was. Videos:
eight codings and containers, damaged or cut off, read at 2 frames a second into 16x16 pixels. Every file is judged in
a process that is replaced when it dies; anything in capitals is a defect. Writes `results/fuzz_files.csv`, a line for
each source and kind of damage.
"""

import argparse
import datetime
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from fuzz_bombs import bombs
from fuzzing import Outcome, mutate, watched
from result_tables import write_rows

OUT = Path(__file__).parent / "results" / "fuzz_files.csv"
LIMIT_SECONDS, LIMIT_MB = 20.0, 1500.0
SCRATCH = Path(os.environ.get("FUZZ_FILES_SCRATCH") or tempfile.mkdtemp(prefix="fuzz_files_"))
os.environ["FUZZ_FILES_SCRATCH"] = str(SCRATCH)
"""One folder for this process and those it starts; the first of them removes it."""

CODINGS = {
    "mp4": ("libx264", {"g": "12", "bf": "2"}),
    "faststart.mp4": ("libx264", {"g": "30"}),
    "fragmented.mp4": ("libx264", {"g": "12"}),
    "mkv": ("libx264", {"g": "24", "bf": "2"}),
    "ts": ("libx264", {"g": "12", "bf": "2"}),
    "avi": ("mpeg4", {"g": "12"}),
    "webm": ("libvpx-vp9", {"g": "20", "deadline": "realtime", "cpu-used": "8"}),
    "flv": ("libx264", {"g": "12"}),
    "gif": ("gif", {}),
}
MOVFLAGS = {"faststart.mp4": "faststart", "fragmented.mp4": "frag_keyframe+empty_moov"}


# ------------------------------------------------------------------------------------------------------------ states
def base_state(seed: int):
    """A state like those of small models, with the metadata that a real one has."""
    import torch

    from video_ma2mba import VideoState

    generator = torch.Generator().manual_seed(seed)
    conv = torch.randn(3, 1, 40, 3, generator=generator)
    ssm = torch.randn(3, 1, 4, 8, 16, generator=generator)
    sources = json.dumps([{"name": f"film{seed}.mp4", "sha256": "0" * 64, "frames": 64, "seconds": 64.0}])
    facts = {"model": "bundled", "weights": "f" * 64, "frames": "64", "seconds": "64.0", "sources": sources}
    return VideoState.from_stacked(conv, ssm, 1033 + seed, facts)


@lru_cache
def state_bytes(seed: int) -> bytes:
    path = SCRATCH / f"base{seed}.state"
    path.parent.mkdir(exist_ok=True)
    base_state(seed).save(path)
    return path.read_bytes()


def state_cases(count: int) -> Iterator[tuple[str, str, bytes]]:
    for seed in range(count):
        random = np.random.default_rng(seed)
        if seed % 5 == 4:
            kind, data = resealed(state_bytes(0), random)
        else:
            kind, data = mutate(state_bytes(0), state_bytes(1), random)
        yield "state", kind, data


def resealed(data: bytes, random: np.random.Generator) -> tuple[str, bytes]:
    """A header that says something else, with a checksum that is right (where one can be made for it)."""
    import torch
    from safetensors.torch import load, save

    from video_ma2mba.modeling_video_ma2mba.state_files import checksum

    length = int.from_bytes(data[:8], "little")
    facts = json.loads(data[8 : 8 + length])["__metadata__"]
    tensors = load(data)
    nested = "[" * 100_000 + "]" * 100_000
    texts = [
        "",
        "-1",
        "1e3",
        "9" * 30,
        "9" * 5000,
        "nan",
        "null",
        "{}",
        "[]",
        '[["a", 1]]',
        '{"a": null}',
        nested,
        "\0",
    ]
    fields = ("seen_tokens", "metadata", "format_version", "layers", "kinds")
    field = fields[int(random.integers(len(fields)))]
    choice = int(random.integers(4))
    if choice == 0:
        facts[field] = texts[int(random.integers(len(texts)))]
    elif choice == 1:
        name = sorted(tensors)[int(random.integers(2))]
        dtypes = [torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn, torch.float64, torch.complex64]
        tensors[name] = tensors[name].to(dtypes[int(random.integers(len(dtypes)))])
    elif choice == 2:
        name = sorted(tensors)[int(random.integers(2))]
        shapes = [(-1,), (1, -1), (3, 1, 0, 4), (1, 1, 1, 1, 1, 1, -1), (-1, 1, 1, 1), (1, -1, 1, 1, 1)]
        shape = shapes[int(random.integers(len(shapes)))]
        tensors[name] = torch.zeros(shape) if 0 in shape else tensors[name].reshape(shape)
    else:
        name = sorted(tensors)[int(random.integers(2))]
        value = (float("nan"), float("inf"), -float("inf"))[int(random.integers(3))]
        tensors[name].view(-1)[int(random.integers(tensors[name].numel()))] = value
    facts["checksum"] = checksum(tensors, facts)
    return "resealed", save(tensors, metadata=facts)


def judge_state(case: tuple[str, str, bytes] | None) -> str:
    import torch

    from video_ma2mba import VideoState

    base = base_state(0)
    if case is None:
        return "ready"
    path = SCRATCH / "damaged.state"
    path.write_bytes(case[2])
    try:
        state = VideoState.load(path)
    except ValueError as error:
        return "refused" if str(path) in str(error) else f"UNCLEAR {error}"
    same = torch.equal(state.conv, base.conv) and torch.equal(state.ssm, base.ssm)
    same = same and state.seen_tokens == base.seen_tokens and state.metadata == base.metadata
    if same:
        return "the same state"
    return "another whole state" if case[1] == "resealed" else "WRONG"


# ------------------------------------------------------------------------------------------------------------ videos
@lru_cache
def video_bytes(name: str) -> bytes:
    """60 noisy frames of 80x48 pixels, 30 a second."""
    import av

    codec, options = CODINGS[name]
    path = SCRATCH / f"base.{name}"
    path.parent.mkdir(exist_ok=True)
    with av.open(str(path), "w", options={"movflags": MOVFLAGS[name]} if name in MOVFLAGS else {}) as container:
        stream = container.add_stream(codec, rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = 80, 48, "rgb8" if codec == "gif" else "yuv420p"
        for number in range(60):
            picture = np.random.default_rng(number).integers(0, 256, (48, 80, 3), np.uint8)
            picture[:24] = number * 4
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path.read_bytes()


def video_cases(count: int) -> Iterator[tuple[str, str, bytes]]:
    names = list(CODINGS)
    for seed in range(count):
        name, random = names[seed % len(names)], np.random.default_rng(10_000 + seed)
        kind, data = mutate(video_bytes(name), video_bytes(names[(seed + 1) % len(names)]), random)
        yield name, kind, data


def judge_video(case: tuple[str, str, bytes] | None) -> str:
    from video_ma2mba import open_video

    if case is None:
        open_video(video_bytes("mp4"), fps=2, size=(16, 16)).read()
        return "ready"
    path = SCRATCH / f"damaged.{case[0]}"
    path.write_bytes(case[2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            with open_video(path, fps=2, max_frames=100, size=(16, 16)) as reader:
                chunk = reader.read()
        except ValueError as error:
            return "refused" if str(error).startswith(str(path)) else f"UNCLEAR {error}"
    count = len(chunk.timestamps)
    whole = chunk.pixels.shape == (count, 16, 16, 3) and 0 < count <= min(100, reader.expected_frames)
    whole = whole and np.isfinite(chunk.timestamps).all() and bool((np.diff(chunk.timestamps) >= 0).all())
    if not whole or not np.isfinite(reader.duration):
        return f"WRONG {chunk.pixels.shape} {chunk.timestamps.tolist()} {reader.duration}"
    if count < reader.expected_frames and not reader.warnings:
        return "WRONG frames are missing without a warning"
    return "read, with a warning" if reader.warnings else "read"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--states", type=int, default=2000)
    parser.add_argument("--videos", type=int, default=500)
    parser.add_argument("--no-bombs", action="store_true")
    parser.add_argument("--keep", type=Path, help="folder for the files that show a defect")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    found: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    defects = 0
    plans = [(judge_state, state_cases(arguments.states)), (judge_video, video_cases(arguments.videos))]
    if not arguments.no_bombs:
        plans.append((judge_video, bombs(video_bytes)))
    for judge, cases in plans:
        told: list[tuple[str, str, bytes]] = []
        for outcome in watched(judge, remembered(cases, told), LIMIT_SECONDS):
            source, kind, data = told.pop()
            if outcome.peak_mb > LIMIT_MB:
                outcome.verdict = f"MEMORY {outcome.peak_mb:.0f} MB, {outcome.verdict}"
            found[source, kind].append(outcome)
            if outcome.verdict.split()[0].isupper():
                defects += 1
                print(f"{source}, {kind}: {outcome.verdict} ({outcome.seconds:.1f} s)", flush=True)
                if arguments.keep:
                    arguments.keep.mkdir(exist_ok=True)
                    (arguments.keep / f"{defects}.{source}").write_bytes(data)
    write(arguments.out, found)
    shutil.rmtree(SCRATCH, ignore_errors=True)
    print(f"{sum(map(len, found.values()))} files, {defects} defects: {arguments.out}")
    sys.exit(defects > 0)


def remembered(cases: Iterator, told: list) -> Iterator:
    for case in cases:
        told.append(case)
        yield case


def write(path: Path, found: dict[tuple[str, str], list[Outcome]]) -> None:
    rows = []
    for (source, kind), outcomes in sorted(found.items()):
        verdicts = [outcome.verdict.split(" (")[0] for outcome in outcomes]
        row = {"source": source, "damage": kind, "files": len(outcomes)}
        for name in ("refused", "read", "read, with a warning", "the same state", "another whole state"):
            row[name] = verdicts.count(name)
        row["defects"] = sum(verdict.split()[0].isupper() for verdict in verdicts)
        row["slowest (s)"] = round(max(outcome.seconds for outcome in outcomes), 3)
        row["most memory (MB)"] = round(max(outcome.peak_mb for outcome in outcomes), 1)
        row["date"] = datetime.date.today().isoformat()
        rows.append(row)
    write_rows(path, rows)


if __name__ == "__main__":
    main()
